package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/keycustody/custodian/custodian"
)

// maxMessages is how many messages wait for the webhook; what comes then is
// not told.
const maxMessages = 256

// An incidentBook keeps, over restarts, which incidents are open and which
// messages nobody has taken yet. A message can be sent twice, where the daemon
// ends between its delivery and the next line of the book, but none is lost. A
// book that cannot be read is begun anew: nothing of custody is in it.
type incidentBook struct {
	path   string
	queues bool // there is a webhook
	log    *slog.Logger
	poke   chan struct{} // of one place: there is a message

	// mu guards the field below.
	mu    sync.Mutex
	pages bookPages
}

// bookPages are what is on disk, as JSON.
type bookPages struct {
	Open  []custodian.Incident `json:"open"`
	Queue []json.RawMessage    `json:"queue"` // bodies
}

func openIncidentBook(path string, queues bool, log *slog.Logger) *incidentBook {
	b := &incidentBook{path: path, queues: queues, log: log, poke: make(chan struct{}, 1)}
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return b
	}
	if err == nil {
		err = json.Unmarshal(raw, &b.pages)
	}
	if err != nil {
		log.Error("incidents of before are forgotten", "file", path, "err", err)
		b.pages = bookPages{}
	}
	if !queues {
		b.pages.Queue = nil
	}
	return b
}

// open are the incidents that were declared and not closed.
func (b *incidentBook) open() []custodian.Incident {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.pages.Open)
}

// tell takes an incident down, and does not wait for the webhook.
func (b *incidentBook) tell(i custodian.Incident) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pages.Open = slices.DeleteFunc(b.pages.Open, func(o custodian.Incident) bool { return o.ID == i.ID })
	if i.Closed.IsZero() {
		b.pages.Open = append(b.pages.Open, i)
	}
	b.queue(messageOf(i))
	b.save()
}

// say takes a message about something else down, and does not wait either.
func (b *incidentBook) say(body any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue(body)
	b.save()
}

// queue puts a message behind the others; mu is held.
func (b *incidentBook) queue(body any) {
	if !b.queues {
		return
	}
	raw, err := json.Marshal(body)
	if err != nil || len(b.pages.Queue) == maxMessages {
		b.log.Error("the webhook takes nothing; a message is not sent", "message", string(raw), "err", err)
		return
	}
	b.pages.Queue = append(b.pages.Queue, raw)
	select {
	case b.poke <- struct{}{}:
	default:
	}
}

// next is the message that waits for the longest time: what event it is of,
// which one, and all of it.
func (b *incidentBook) next() (event, id string, body json.RawMessage, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.pages.Queue) == 0 {
		return "", "", nil, false
	}
	var m struct{ Event, ID string }
	if err := json.Unmarshal(b.pages.Queue[0], &m); err != nil {
		b.log.Error("a message to the webhook is malformed", "err", err)
	}
	return m.Event, m.ID, b.pages.Queue[0], true
}

// done takes the message that next returned out.
func (b *incidentBook) done() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pages.Queue = b.pages.Queue[1:]
	b.save()
}

// save puts the pages on disk; mu is held. Where that does not work, they hold
// until the daemon ends.
func (b *incidentBook) save() {
	if err := b.write(); err != nil {
		b.log.Error("incidents are not kept over a restart", "err", err)
	}
}

func (b *incidentBook) write() error {
	raw, err := json.MarshalIndent(b.pages, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(b.path), filepath.Base(b.path)+".new-") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone where all goes well
	if _, err := f.Write(raw); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return os.Rename(f.Name(), b.path)
}
