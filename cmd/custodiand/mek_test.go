package main

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/kafka"
)

// The end of the MEK is told to the webhook, over restarts, and a plan of its
// rotation lies ready; a draft that somebody has changed stays.
func TestTellMEK(t *testing.T) {
	dir := t.TempDir()
	book, quiet := filepath.Join(dir, "incidents.json"), slog.New(slog.DiscardHandler)
	d := &daemon{config: &Config{MEK: MEKConfig{DraftDir: dir}}, log: quiet, book: openIncidentBook(book, true, quiet)}
	a := custodian.MEKAlert{ID: "mek-v1-30d", MEK: "mek-v1", Version: 1, Days: 30, Time: time.Now(), EndTime: time.Now().Add(29 * 24 * time.Hour)}
	if err := d.tellMEK(a); err != nil {
		t.Fatal(err)
	}
	draft := filepath.Join(dir, "mek-rotation-mek-v1-30d.yaml")
	text, err := os.ReadFile(draft)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := custodian.ParsePlan(text); err != nil || p.Kind != custodian.KindMEKRotation || p.MEKVersion != 1 {
		t.Errorf("the draft is %v, %v:\n%s", p, err, text)
	}
	if err := os.WriteFile(draft, []byte("changed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.tellMEK(a); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(draft); err != nil || string(text) != "changed" {
		t.Errorf("the officers' draft: got %q, %v", text, err)
	}
	event, id, body, ok := openIncidentBook(book, true, quiet).next()
	var m mekMessage
	if err := json.Unmarshal(body, &m); !ok || err != nil || event != "mek.ending" || id != a.ID || m.Days != 30 || m.Draft != draft || m.Version != 1 {
		t.Errorf("after a restart: %s %s waits, %s, %v", event, id, body, err)
	}
	d.config.MEK.DraftDir = filepath.Join(dir, "gone")
	if err := d.tellMEK(a); err == nil {
		t.Error("a plan that cannot be drafted is no error")
	}
}

func TestEventConfigFaults(t *testing.T) {
	c, err := parseConfig([]byte("mek: {draft_dir: /nowhere/at/all}\nkafka:\n  brokers: [kafka:9092]\n  tls: {disable: true}\n  topics: [{name: media}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	err = c.check()
	for _, want := range []string{"mek.draft_dir: stat /nowhere/at/all", "kafka.tls.disable: brokers are spoken to in clear in mode: development only", "kafka.topics[0].dead_letter: must be set"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no fault with %q in\n%v", want, err)
		}
	}
	if c.Kafka.Group != "custodian" || c.Kafka.Topics[0].Format != kafka.FormatCloudEvents || c.Kafka.Topics[0].Types["media.drm.packaged"] != custodian.EventPackaged {
		t.Errorf("defaults: got %+v", c.Kafka)
	}
}
