package custodian_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// backup makes a backup as the operator does, and opens its envelope.
func (w *world) backup() []byte {
	w.t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		w.t.Fatal(err)
	}
	var sealed bytes.Buffer
	if err := w.c.Backup(w.t.Context(), operator, id.Recipient().String(), &sealed); err != nil {
		w.t.Fatal(err)
	}
	if bytes.Contains(sealed.Bytes(), []byte("custodian key store")) {
		w.t.Error("the backup is in clear")
	}
	clear, err := age.Decrypt(&sealed, id)
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := io.ReadAll(clear)
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// restore puts a backup in the place of the store, and finishes the restore.
func (w *world) restore(backup []byte) (custodian.RestoreReport, error) {
	w.t.Helper()
	w.close()
	writeFile(w.t, w.storePath(), backup)
	if err := w.tryParts(); err != nil {
		return custodian.RestoreReport{}, err
	}
	rep, err := custodian.Restore(w.t.Context(), w.cfg)
	w.close()
	return rep, err
}

// forget drops what was answered and is lost with a restore.
func (w *world) forget(kids ...custodian.KID) {
	for _, kid := range kids {
		delete(w.answered, kid)
	}
}

func TestBackupAndRestore(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	w.issue("movies", "film-1", "SD", "HD")
	w.issue("series", "show-1", "SD")
	backup := w.backup()

	lost := kidsOf(w.issue("movies", "film-2", "SD", "HD"))
	w.freeze("series", custodian.CategoryFrozen)
	w.category("late")
	lost = append(lost, kidsOf(w.issue("late", "film-3", "SD"))...)
	w.close()
	later := readFile(t, w.storePath())

	// The backup alone is a rollback.
	writeFile(t, w.storePath(), backup)
	w.refused("a backup without restore", custodian.ErrStoreRollback)

	rep, err := w.restore(backup)
	if err != nil {
		t.Fatal(err)
	}
	var missing []custodian.KID
	for _, m := range rep.MissingKIDs {
		missing = append(missing, m.KID)
	}
	for _, kids := range [][]custodian.KID{missing, lost} {
		slices.SortFunc(kids, func(a, b custodian.KID) int { return bytes.Compare(a[:], b[:]) })
	}
	if !slices.Equal(missing, lost) {
		t.Errorf("missing KIDs: got %v, want %v", missing, lost)
	}
	var changes []string
	for _, c := range rep.LostChanges {
		changes = append(changes, c.Action+" "+c.Category)
	}
	if want := []string{"category.freeze series", "category.create late", "kek.reserve late"}; !slices.Equal(changes, want) {
		t.Errorf("lost changes: got %q, want %q", changes, want)
	}
	if got, want := fmt.Sprint(rep.Rotated), "[movies/2 series/2]"; got != want || len(rep.Closed) != 0 {
		t.Errorf("rotated: got %s and %v closed, want %s", got, rep.Closed, want)
	}

	// What was frozen after the backup is frozen again, until an officer opens it.
	if fmt.Sprint(rep.Frozen) != "[series]" {
		t.Errorf("frozen again: got %v, want series", rep.Frozen)
	}
	w.reopen()
	w.freeze("series", custodian.CategoryOpen)
	w.forget(lost...)
	w.whole() // the keys of the backup open under their old KEKs
	w.consistent()
	for _, kid := range lost {
		wantErr(t, "a key that is lost", w.release(provider, kid), custodian.ErrKeyNotFound)
	}
	for _, k := range w.issue("movies", "film-2", "SD", "HD") {
		if k.KEK.Version != 2 || slices.Contains(lost, k.KID) {
			t.Errorf("issued after the restore: got %s under %s, want a new key under movies/2", k.KID, k.KEK)
		}
	}
	w.whole()

	// What was before the restore is a rollback now.
	w.close()
	writeFile(t, w.storePath(), later)
	w.refused("the store of before the restore", custodian.ErrStoreRollback)

	// And the same backup can be restored once more.
	w.forget(kidsOf(mustRestore(w, backup))...)
	w.whole()
}

// mustRestore restores, and returns the keys that are lost with it.
func mustRestore(w *world, backup []byte) (lost []custodian.IssuedKey) {
	w.t.Helper()
	rep, err := w.restore(backup)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, m := range rep.MissingKIDs {
		lost = append(lost, custodian.IssuedKey{ContentKey: custodian.ContentKey{KID: m.KID}})
	}
	return lost
}

func TestRestoreWithoutLog(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	kid := w.issue("movies", "film-1", "SD")[0].KID
	backup := w.backup()
	w.close()
	if err := os.RemoveAll(w.auditDir()); err != nil {
		t.Fatal(err)
	}
	log, err := audit.Create(w.auditDir(), audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	w.refused("a store with an empty log", custodian.ErrLogRollback)
	rep, err := w.restore(backup)
	if err != nil || len(rep.MissingKIDs) != 0 || len(rep.Rotated) != 1 {
		t.Fatalf("restore: got %+v and %v", rep, err)
	}
	w.reopen()
	wantErr(t, "release", w.release(provider, kid), nil)
	w.issue("movies", "film-2", "SD")
}

// A MEK that is past its year keeps no one from releasing what a backup holds.
func TestRestoreAfterMEKYear(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.issue("movies", "film-1", "SD")
	backup := w.backup()
	w.close()
	w.advance(custodian.MEKPeriod + time.Hour)
	w.cfg.ConfirmTime = true
	rep, err := w.restore(backup)
	if err != nil || fmt.Sprint(rep.Closed) != "[movies/1]" || len(rep.Rotated) != 0 {
		t.Fatalf("restore: got %+v and %v, want movies/1 closed", rep, err)
	}
	w.whole()
	_, err = w.c.Issue(t.Context(), packager, ask("movies", "film-2", "SD"))
	wantErr(t, "issue under a KEK that the backup knew", err, custodian.ErrMEKExpired)
	w.whole()
}

func TestRestoreFaults(t *testing.T) {
	w := newWorld(t)
	small(w)
	backup := w.backup()
	lost := kidsOf(w.issue("movies", "film-2", "SD", "HD"))
	w.freeze("movies", custodian.CategoryFrozen)
	w.forget(lost...)
	putBack := w.save()
	faults := 0
	everyFault(func(op string, nth int, after bool) (hit bool) {
		putBack()
		w.breaker.arm(op, nth, after)
		rep, err := w.restore(backup)
		if hit = w.breaker.disarm(); !hit {
			return false
		}
		faults++
		t.Run(fmt.Sprintf("%s %d after=%v", op, nth, after), func(t *testing.T) {
			w.t = t
			if err != nil { // who sees it restores again
				if rep, err = w.restore(backup); err != nil {
					t.Fatalf("restore again: %v", err)
				}
			}
			if len(rep.MissingKIDs) != len(lost) || len(rep.LostChanges) == 0 || len(rep.Rotated) != 1 {
				t.Errorf("report: got %+v, want %d missing KIDs, lost changes and one new KEK", rep, len(lost))
			}
			if len(rep.Frozen) > 1 || rep.Frozen != nil && rep.Frozen[0] != "movies" {
				t.Errorf("frozen again: got %v, want movies", rep.Frozen)
			}
			w.reopen()
			w.freeze("movies", custodian.CategoryOpen)
			w.whole()
			w.consistent()
			for _, k := range w.issue("movies", "film-3", "SD") {
				if k.KEK.Version < 2 {
					t.Errorf("issued under %s, which the backup knew", k.KEK)
				}
			}
			w.forget(kidsOf(w.issue("movies", "film-3", "SD"))...)
		})
		w.t = t
		return true
	})
	if faults < 20 {
		t.Errorf("%d faults were met, want more than 20", faults)
	}
}

func TestBackupRefusals(t *testing.T) {
	w := newWorld(t)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	good := id.Recipient().String()
	wantErr(t, "as an officer", w.c.Backup(t.Context(), officer, good, &out), custodian.ErrDenied)
	for _, recipient := range []string{"", "age1", id.String(), "ssh-ed25519 AAAA"} {
		err := w.c.Backup(t.Context(), operator, recipient, &out)
		wantErr(t, "to no recipient", err, custodian.ErrInvalid)
		if err != nil && bytes.Contains([]byte(err.Error()), []byte("AGE-SECRET-KEY")) {
			t.Error("an identity that was given in place of a recipient is in the error")
		}
	}
	w.breaker.down("audit.Sync")
	wantErr(t, "with a blocked log", w.c.Backup(t.Context(), operator, good, &out), custodian.ErrAuditBlocked)
	w.breaker.disarm()
	if out.Len() != 0 {
		t.Errorf("%d bytes of backup came out of refused calls", out.Len())
	}
	w.reopen()
	full := errors.New("no space left")
	if err := w.c.Backup(t.Context(), operator, good, failingWriter{full}); !errors.Is(err, full) {
		t.Errorf("to a full disk: got %v, want %v", err, full)
	}
	w.whole()
}

type failingWriter struct{ err error }

func (f failingWriter) Write([]byte) (int, error) { return 0, f.err }

// A backup that is made while keys are issued is one state of the store.
func TestBackupWhileServing(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			keys, err := w.c.Issue(t.Context(), packager, ask("movies", fmt.Sprintf("film-%d", i), "SD", "HD"))
			if err != nil {
				t.Error(err)
				return
			}
			for _, k := range keys {
				k.Key.Destroy()
			}
		}
	})
	var backups [][]byte
	for range 4 {
		backups = append(backups, w.backup())
	}
	stop()
	wg.Wait()
	for _, b := range backups {
		rep, err := w.restore(b)
		if err != nil {
			t.Fatal(err)
		}
		w.whole()
		if n := len(w.contentKeys()); n%2 != 0 {
			t.Errorf("a backup holds %d keys; content of two was cut in the middle", n)
		}
		for _, m := range rep.MissingKIDs {
			wantErr(t, "a missing key", w.release(provider, m.KID), custodian.ErrKeyNotFound)
		}
	}
}
