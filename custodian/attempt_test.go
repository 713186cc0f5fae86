package custodian_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"filippo.io/age"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
)

// Administrative actions are written before they begin and after they end, with
// one end for each beginning, whatever comes of them. What is refused has not
// begun.
func TestAttempts(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	ctx := t.Context()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	create := func(name custodian.CategoryName) error {
		_, err := w.c.CreateCategory(ctx, officer, custodian.CreateCategoryRequest{Name: name})
		return err
	}
	device := errors.New("out of order")
	for _, test := range []struct {
		what string
		do   func() error
		err  error
		want []string
	}{
		{"create", func() error { return create("series") }, nil,
			[]string{"category.create begun officer officer series", "category.create allowed officer officer series series/1 +"}},
		{"create, the token fails", func() error {
			w.hsm.Fail("GenerateKey", custodian.ErrHSMUnavailable, 1)
			return create("sports")
		}, custodian.ErrHSMUnavailable,
			[]string{"category.create begun officer officer sports", "category.create failed HSM_UNAVAILABLE officer officer sports"}},
		{"create, it is there", func() error { return create("series") }, custodian.ErrCategoryExists,
			[]string{"category.create failed CATEGORY_EXISTS officer officer series"}},
		{"freeze, the store fails", func() error {
			w.breaker.arm("store.Update", 1, false)
			_, err := w.c.SetCategoryMode(ctx, officer, custodian.SetModeRequest{Name: "movies", Mode: custodian.CategoryFrozen})
			return err
		}, custodian.ErrStoreUnavailable,
			[]string{"category.freeze begun officer officer movies", "category.freeze failed STORE_UNAVAILABLE officer officer movies"}},
		{"backup", func() error { return w.c.Backup(ctx, operator, id.Recipient().String(), new(bytes.Buffer)) }, nil,
			[]string{"backup begun operator operator", "backup allowed operator operator"}},
		{"backup, nobody takes it", func() error { return w.c.Backup(ctx, operator, id.Recipient().String(), fullDisk{device}) }, device,
			[]string{"backup begun operator operator", "backup failed INTERNAL operator operator"}},
	} {
		from := w.log.Size()
		wantErr(t, test.what, test.do(), test.err)
		entries := w.entries(from)
		var got []string
		for _, e := range entries {
			got = append(got, line(e))
		}
		if len(got) != len(test.want) {
			t.Errorf("%s: got %q, want %q", test.what, got, test.want)
			continue
		}
		for i := range got {
			if got[i] != test.want[i] {
				t.Errorf("%s: got %q, want %q", test.what, got[i], test.want[i])
			}
		}
		if len(got) == 2 && (!entries[1].HasAttempt || entries[1].Attempt != entries[0].Index) {
			t.Errorf("%s: the end is of %d, want of %d", test.what, entries[1].Attempt, entries[0].Index)
		}
	}
	if n := w.attemptsEnd(); n != 7 { // with init and the first category
		t.Errorf("%d attempts, want 7", n)
	}
}

type fullDisk struct{ err error }

func (f fullDisk) Write([]byte) (int, error) { return 0, f.err }

// A copier copies store and log as they are when it is first written to.
type copier struct {
	w    *world
	to   string
	done bool
}

func (c *copier) Write(b []byte) (int, error) {
	if !c.done {
		c.done = true
		if err := os.CopyFS(c.to, os.DirFS(c.w.dir)); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// The machine stops in the middle of a backup. The log shows the attempt, and
// the next start ends it, once.
func TestInterrupted(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	c := &copier{w: w, to: t.TempDir()}
	if err := w.c.Backup(t.Context(), operator, id.Recipient().String(), c); err != nil || !c.done {
		t.Fatal(err)
	}
	w.close()
	w.dir = c.to
	from := uint64(0)
	for _, e := range w.entries(0) {
		from = e.Index
		if e.Action == "backup" && e.Outcome != audit.Begun {
			t.Fatalf("the backup has ended already: %s", line(e))
		}
	}
	w.reopen()
	entries := w.entries(from)
	if len(entries) != 3 || line(entries[0]) != "backup begun operator operator" ||
		line(entries[1]) != "backup failed INTERRUPTED operator operator" || entries[1].Attempt != from || !entries[1].HasAttempt {
		t.Errorf("entries = %+v, want the attempt, its end and a start", entries)
	}
	w.reopen()
	w.attemptsEnd()
	if again := w.entries(from); len(again) != 4 {
		t.Errorf("%d entries after another start, want one more", len(again))
	}
	w.whole()
}
