package audit_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// The golden logs are signed with a key that was thrown away; its public half is
// beside them. log_v2 is one file, log_v3 has five segments, of which the first
// is pruned.
var goldenLogs = []struct {
	name     string
	segments int
	pruned   uint64
	unsigned uint64
}{{"log_v2", 1, 0, 1}, {"log_v3", 5, 10, 1}}

const (
	goldenEntries = 40
	goldenKey     = "audit.pem"
)

func writeGolden(t *testing.T) {
	t.Helper()
	k := newTestKey(t)
	der, err := x509.MarshalPKIXPublicKey(k.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range goldenLogs {
		dir := filepath.Join("testdata", g.name)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		o := audit.Options{}
		if g.segments > 1 {
			o = small
		}
		l := create(t, dir, o)
		appendTo(t, l, release(0))
		signWith(t, l, k)
		fill(t, l, 1, goldenEntries)
		shut(t, l)
		if g.pruned > 0 {
			if _, err := audit.Prune(context.Background(), dir, audit.PruneOptions{Whole: g.segments - 2, Keep: keepThirds, Now: time.Unix(1e9, 0)}); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(dir, "prune.lock")); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range segmentFiles(t, dir) { // without the room ahead
			b := bytes.TrimRight(readFile(t, dir, name), "\x00")
			if bytes.HasSuffix(b, []byte("\nbatch.\n")) {
				if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := os.WriteFile(filepath.Join(dir, goldenKey), checkpoint.FormatKey(der), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// Logs that were written and signed once are read, verified and gone on with,
// by this and every later version.
func TestGoldenSigned(t *testing.T) {
	if *update {
		writeGolden(t)
	}
	for _, g := range goldenLogs {
		t.Run(g.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "audit")
			copyLog(t, filepath.Join("testdata", g.name), dir)
			key, err := checkpoint.ParseKey(readFile(t, dir, goldenKey))
			if err != nil {
				t.Fatal(err)
			}
			check := func(signed []byte) error {
				_, err := checkpoint.Verify(signed, key)
				return err
			}
			r, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{Check: check})
			if err != nil || r.Entries != goldenEntries || r.Segments != g.segments || r.Unsigned != g.unsigned || r.Torn != 0 {
				t.Fatalf("report = %+v, %v", r, err)
			}
			gone := uint64(0)
			for _, p := range r.Pruned {
				gone += p.Entries
			}
			if gone != g.pruned {
				t.Errorf("%d entries are pruned, want %d", gone, g.pruned)
			}
			var want []audit.Entry
			for i := range goldenEntries {
				if uint64(i) >= gone || i%3 == 0 {
					want = append(want, release(i))
				}
			}
			got := readAll(t, dir)
			for i := range got {
				if i >= len(want) || got[i].RequestID != want[i].RequestID || !got[i].Time.Equal(want[i].Time) || got[i].Caller != want[i].Caller {
					t.Fatalf("entry %d = %+v, want one of %d", i, got[i], len(want))
				}
			}
			if len(got) != len(want) {
				t.Errorf("%d entries, want %d", len(got), len(want))
			}
			if p, err := audit.ProveInclusion(context.Background(), dir, 7, 0); err != nil || checkInclusion(p, key) != nil {
				t.Errorf("proof of entry 7: %v, %v", err, checkInclusion(p, key))
			}
			l := open(t, dir, small)
			if l.Size() != goldenEntries || l.Root() != r.Root {
				t.Errorf("opened with %d entries", l.Size())
			}
			if err := l.SignWith(audit.Signer{Check: check}); err != nil {
				t.Errorf("its last checkpoint: %v", err)
			}
		})
	}
}

func checkInclusion(p audit.Proof, key any) error {
	c, err := checkpoint.Verify(p.Checkpoint, key)
	if err != nil {
		return err
	}
	return c.CheckInclusion(p.Entry.Index, p.LeafHash, p.Hashes)
}

// The log of the first version becomes the first segment, byte for byte, of one
// that is signed, and its entries stay what they were.
func TestUpgrade(t *testing.T) {
	golden := load(t, filepath.Join("testdata", "log_v1"))
	dir, k := t.TempDir(), newTestKey(t)
	store(t, dir, golden)
	before := readAll(t, dir)
	l := open(t, dir, small)
	signWith(t, l, k)
	receipts := fill(t, l, len(before), 60)
	if got := l.Stats().Segments; got < 3 {
		t.Errorf("%d segments, want several", got)
	}
	shut(t, l)
	if got := load(t, dir); !bytes.HasPrefix(got, golden) {
		t.Error("what was there is not the beginning of the first segment")
	}
	r, err := verifySigned(dir, k)
	if err != nil || r.Entries != 60 || r.Unsigned != uint64(len(before)) {
		t.Errorf("report = %+v, %v, want %d unsigned entries", r, err, len(before))
	}
	after := readAll(t, dir)
	newest, err := checkpoint.Verify(receipts[len(receipts)-1].Checkpoint, k.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range before {
		if got, want := after[i].RequestID, e.RequestID; got != want || after[i].Salt != e.Salt {
			t.Errorf("entry %d is %s, want %s", i, got, want)
		}
		p, err := audit.ProveInclusion(context.Background(), dir, uint64(i), 0)
		if err == nil {
			err = newest.CheckInclusion(uint64(i), p.LeafHash, p.Hashes)
		}
		if err != nil {
			t.Errorf("proof of %d: %v", i, err)
		}
	}
}
