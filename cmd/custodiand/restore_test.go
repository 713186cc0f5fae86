package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
)

// backup takes a backup of the running daemon and returns its file and that
// of the identity that opens it.
func (c *custody) backup() (file, identity string) {
	t := c.t
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	file, identity = filepath.Join(t.TempDir(), "backup.age"), filepath.Join(t.TempDir(), "identity")
	if err := os.WriteFile(identity, []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := c.dial(custodian.RoleOperator).Backup(t.Context(), &v1.BackupRequest{Recipient: id.Recipient().String()}, out); err != nil {
		t.Fatal(err)
	}
	return file, identity
}

// TestBackupAndRestore: a backup is taken while the daemon runs; afterwards
// more keys are issued and a category is frozen; then the store is lost. The
// restore goes only into an empty place, gives every category a new KEK,
// lists what the backup lacks, and serves what it has.
func TestBackupAndRestore(t *testing.T) {
	s := serve(newCustody(t))
	file, identity := s.backup()
	later, err := s.issue("film-after-the-backup")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "later"}); err != nil {
		t.Fatal(err)
	}
	if code := s.stop(); code != 0 {
		t.Fatalf("stop: exit %d", code)
	}
	args := []string{"restore", "-config", s.dev.configFile(), "-from", file, "-identity", identity}
	if out, code := s.run(args...); code == 0 || !strings.Contains(out, "empty place") {
		t.Fatalf("restore over a store: exit %d, want a refusal\n%s", code, out)
	}

	// The old store put back by hand is noticed: it is behind the audit log.
	current, err := os.ReadFile(s.config.storePath())
	if err != nil {
		t.Fatal(err)
	}
	if err := decryptBackup(file, identity, s.config.storePath()); err != nil {
		t.Fatal(err)
	}
	if out, code := s.run("-config", s.dev.configFile()); code != exitIntegrity || !strings.Contains(out, "older than the audit log") {
		t.Errorf("an older store behind the audit log: exit %d, want %d and its own error\n%s", code, exitIntegrity, out)
	}
	if err := os.WriteFile(s.config.storePath(), current, 0o600); err != nil {
		t.Fatal(err)
	}

	if err := os.Remove(s.config.storePath()); err != nil {
		t.Fatal(err)
	}
	out, code := s.run(args...)
	if code != 0 {
		t.Fatalf("restore: exit %d\n%s", code, out)
	}
	var rep struct {
		Missing []struct {
			KID string `json:"kid"`
		} `json:"missing_kids"`
		Lost []struct {
			Action string `json:"action"`
		} `json:"lost_control_changes"`
		Rotated []string `json:"rotated_keks"`
	}
	if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &rep); err != nil {
		t.Fatalf("report: %v\n%s", err, out)
	}
	if want := custodian.KID(later.Keys[0].Key.Kid).String(); len(rep.Missing) != 1 || rep.Missing[0].KID != want {
		t.Errorf("missing KIDs: got %v, want %s", rep.Missing, want)
	}
	if len(rep.Lost) != 1 || rep.Lost[0].Action != "category.create" {
		t.Errorf("lost control changes: got %v, want the category that was made after the backup", rep.Lost)
	}
	if len(rep.Rotated) != 1 || rep.Rotated[0] != "movies/2" {
		t.Errorf("rotated KEKs: got %v, want movies/2", rep.Rotated)
	}
	s.mustStart()
	s.packager, s.provider = s.dial(custodian.RolePackager), s.dial(custodian.RoleProvider)
	if got := s.get(); got != "" {
		t.Errorf("key of the backup: %s", got)
	}
	if _, err := s.issue("film-after-the-restore"); err != nil {
		t.Errorf("issue after the restore: %v", err)
	}
	if code := s.stop(); code != 0 {
		t.Errorf("stop: exit %d", code)
	}
	s.checkAtRest(&ledger{released: map[custodian.KID]bool{custodian.KID(s.kid): true}}, "custodian-mek-v1")
}

// TestRestoreRefusesABadBackup: a cut or changed backup, or another identity,
// leaves the place empty.
func TestRestoreRefusesABadBackup(t *testing.T) {
	s := serve(newCustody(t))
	file, identity := s.backup()
	if code := s.stop(); code != 0 {
		t.Fatalf("stop: exit %d", code)
	}
	if err := os.Remove(s.config.storePath()); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{"cut": good[:len(good)-100], "changed": append(bytes.Clone(good[:len(good)/2]), bytes.Repeat([]byte{1}, len(good)/2)...), "empty": nil} {
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, code := s.run("restore", "-config", s.dev.configFile(), "-from", file, "-identity", identity); code == 0 {
			t.Errorf("%s backup: restored\n%s", name, out)
		}
		if _, err := os.Stat(s.config.storePath()); !os.IsNotExist(err) {
			t.Errorf("%s backup: a store is there: %v", name, err)
		}
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := s.run("restore", "-config", s.dev.configFile(), "-from", file, "-identity", identity); code != 0 {
		t.Errorf("the good backup after the bad ones: exit %d\n%s", code, out)
	}
}

// TestReloadGrants: SIGHUP takes new grants; a bad file keeps the last good
// ones.
func TestReloadGrants(t *testing.T) {
	s := serve(newCustody(t))
	await := func(want string) {
		t.Helper()
		limit := time.Now().Add(10 * time.Second)
		for s.get() != want {
			if time.Now().After(limit) {
				t.Fatalf("callback: got %q, want %q\n%s", s.get(), want, tail(s.logText()))
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	before := len(s.logText())
	s.edit("role: drm-provider", "role: no-such-role")
	s.cmd.Process.Signal(syscall.SIGHUP)
	for limit := time.Now().Add(10 * time.Second); !strings.Contains(s.logText()[before:], "last good"); {
		if time.Now().After(limit) {
			t.Fatalf("a bad file is not complained of:\n%s", tail(s.logText()))
		}
		time.Sleep(20 * time.Millisecond)
	}
	await("")
	s.edit("role: no-such-role", "role: auditor")
	s.cmd.Process.Signal(syscall.SIGHUP)
	await("DENIED")
	if _, err := s.issue("film-2"); err != nil {
		t.Errorf("a grant that did not change: %v (%s)", err, client.ReasonOf(err))
	}
}
