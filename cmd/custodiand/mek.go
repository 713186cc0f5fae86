package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/keycustody/custodian/custodian"
)

// MEKConfig says what is done before the end of the MEK's year.
type MEKConfig struct {
	// DraftDir is where a plan of its rotation is drafted for the officers, each
	// time that the end is told of: mek-rotation-LABEL-DAYSd.yaml. Without it,
	// none is.
	DraftDir string `yaml:"draft_dir"`
}

func (c MEKConfig) check() []error {
	if c.DraftDir == "" {
		return nil
	}
	fi, err := os.Stat(c.DraftDir)
	if err == nil && !fi.IsDir() {
		err = fmt.Errorf("%s: not a folder", c.DraftDir)
	}
	if err != nil {
		return []error{fmt.Errorf("mek.draft_dir: %w", err)}
	}
	return nil
}

// A mekMessage is the body of a webhook about the MEK.
type mekMessage struct {
	Event string `json:"event"` // mek.ending or mek.ended
	custodian.MEKAlert
	Draft string `json:"draft,omitempty"` // file of the plan
}

// tellMEK drafts the plan and tells the webhook.
func (d *daemon) tellMEK(a custodian.MEKAlert) error {
	m := mekMessage{Event: "mek.ending", MEKAlert: a}
	if a.Days == 0 {
		m.Event = "mek.ended"
	}
	if dir := d.config.MEK.DraftDir; dir != "" {
		plan, err := a.Plan()
		if err != nil {
			return err
		}
		m.Draft = filepath.Join(dir, fmt.Sprintf("mek-rotation-%s.yaml", a.ID))
		if err := writeNew(m.Draft, plan); err != nil {
			return fmt.Errorf("draft the plan: %w", err)
		}
		d.log.Warn("a plan is drafted for the officers", "file", m.Draft)
	}
	d.book.say(m)
	return nil
}

// writeNew writes a file that others may read. One that is there stays as it is:
// somebody may have worked on it.
func writeNew(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path)) // so that it is written whole the next time
	}
	return nil
}
