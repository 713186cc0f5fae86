package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// signedLog is a log of 20 entries in signed batches, its receipts and key.
func signedLog(t testing.TB) (dir string, receipts []audit.Receipt, k *testKey) {
	t.Helper()
	dir, k = filepath.Join(fastDir(t), "audit"), newTestKey(t)
	l := create(t, dir, audit.Options{})
	signWith(t, l, k)
	for len(receipts) < 20 {
		var entries []audit.Entry
		for range min(len(receipts)%3+1, 20-len(receipts)) {
			entries = append(entries, release(len(receipts)+len(entries)))
		}
		receipts = append(receipts, appendTo(t, l, entries...)...)
	}
	return dir, receipts, k
}

// Every entry is proved to every checkpoint that covers it, as a receipt names
// it, and every checkpoint to every older one.
func TestProofs(t *testing.T) {
	dir, receipts, k := signedLog(t)
	ctx := context.Background()
	for i, r := range receipts {
		c, err := checkpoint.Verify(r.Checkpoint, k.key.Public())
		if err != nil {
			t.Fatal(err)
		}
		for index := range c.Size {
			p, err := audit.ProveInclusion(ctx, dir, index, c.Size)
			if err != nil || p.LeafHash != receipts[index].LeafHash || !bytes.Equal(p.Checkpoint, r.Checkpoint) {
				t.Fatalf("proof of %d in %d: %+v, %v", index, c.Size, p, err)
			}
			if err := c.CheckInclusion(index, receipts[index].LeafHash, p.Hashes); err != nil || p.Entry.RequestID != release(int(index)).RequestID {
				t.Errorf("proof of %d in %d: entry %s, %v", index, c.Size, p.Entry.RequestID, err)
			}
		}
		for _, older := range receipts[:i] {
			old, err := checkpoint.Verify(older.Checkpoint, k.key.Public())
			if err != nil {
				t.Fatal(err)
			}
			hashes, signed, err := audit.ProveConsistency(ctx, dir, old.Size, c.Size)
			if err == nil {
				err = c.CheckConsistency(old, hashes)
			}
			if err != nil || !bytes.Equal(signed, r.Checkpoint) {
				t.Errorf("%d after %d: %v", c.Size, old.Size, err)
			}
		}
	}
	if p, err := audit.ProveInclusion(ctx, dir, 3, 0); err != nil || !bytes.Equal(p.Checkpoint, receipts[19].Checkpoint) {
		t.Errorf("to the newest: %v", err)
	}
	for _, tt := range []struct {
		index, size uint64
		want        error
	}{{20, 0, audit.ErrNoEntry}, {3, 2, audit.ErrNoEntry}, {3, 3, audit.ErrNoEntry}, {3, 21, audit.ErrNoCheckpoint}} {
		if _, err := audit.ProveInclusion(ctx, dir, tt.index, tt.size); !errors.Is(err, tt.want) {
			t.Errorf("proof of %d in %d: error = %v, want %v", tt.index, tt.size, err, tt.want)
		}
	}
	unsigned := t.TempDir()
	store(t, unsigned, load(t, filepath.Join("testdata", "log_v1")))
	if _, err := audit.ProveInclusion(ctx, unsigned, 0, 0); !errors.Is(err, audit.ErrNoCheckpoint) {
		t.Errorf("unsigned log: error = %v, want ErrNoCheckpoint", err)
	}
}

// Every range that is exported verifies with the key alone.
func TestExport(t *testing.T) {
	dir, _, k := signedLog(t)
	ctx := context.Background()
	for from := uint64(0); from < 20; from++ {
		for to := from + 1; to <= 20; to++ {
			var b bytes.Buffer
			want, err := audit.Export(ctx, dir, from, to, nil, &b)
			if err != nil {
				t.Fatal(err)
			}
			next := from
			got, err := audit.VerifyExport(ctx, &b, k.check, func(e *audit.Entry) error {
				if e.Index != next || e.RequestID != release(int(next)).RequestID {
					return fmt.Errorf("entry %d is %s", e.Index, e.RequestID)
				}
				next++
				return nil
			})
			if err != nil || got != want || next != to || got.Checkpoint.Size != 20 {
				t.Errorf("%d to %d: %+v, %v, want %+v", from, to, got, err, want)
			}
		}
	}
	for _, r := range [][2]uint64{{20, 0}, {3, 3}, {5, 4}, {0, 21}} {
		if _, err := audit.Export(ctx, dir, r[0], r[1], nil, new(bytes.Buffer)); !errors.Is(err, audit.ErrNoEntry) {
			t.Errorf("%d to %d: error = %v, want ErrNoEntry", r[0], r[1], err)
		}
	}
}

// An export shows that the log continues an older checkpoint of it, and no other.
func TestExportSince(t *testing.T) {
	dir, receipts, k := signedLog(t)
	ctx := context.Background()
	for _, r := range receipts {
		var b bytes.Buffer
		want, err := checkpoint.Parse(r.Checkpoint)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := audit.Export(ctx, dir, 3, 4, r.Checkpoint, &b); err != nil {
			t.Fatal(err)
		}
		if got, err := audit.VerifyExport(ctx, &b, k.check, nil); err != nil || got.Since != want {
			t.Errorf("since %d: %+v, %v", want.Size, got.Since, err)
		}
	}
	otherDir, others, otherKey := signedLog(t)
	for name, since := range map[string][]byte{"another log's": others[3].Checkpoint, "no": []byte("hello")} {
		if _, err := audit.Export(ctx, dir, 3, 4, since, new(bytes.Buffer)); err == nil {
			t.Errorf("%s checkpoint is continued", name)
		}
	}
	// One that the log's own key has not signed is not believed.
	var b bytes.Buffer
	if _, err := audit.Export(ctx, otherDir, 3, 4, others[3].Checkpoint, &b); err != nil {
		t.Fatal(err)
	}
	resigned := bytes.ReplaceAll(b.Bytes(), quoted(t, others[3].Checkpoint), quoted(t, resign(t, others[3].Checkpoint, k)))
	if bytes.Equal(resigned, b.Bytes()) {
		t.Fatal("the older checkpoint is not in the export")
	}
	if _, err := audit.VerifyExport(ctx, bytes.NewReader(resigned), otherKey.check, nil); !errors.Is(err, checkpoint.ErrSignature) {
		t.Errorf("error = %v, want ErrSignature", err)
	}
}

func quoted(t testing.TB, s []byte) []byte {
	t.Helper()
	b, err := json.Marshal(string(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// resign has another key sign the same.
func resign(t testing.TB, signed []byte, k *testKey) []byte {
	t.Helper()
	c, err := checkpoint.Parse(signed)
	if err != nil {
		t.Fatal(err)
	}
	s, err := checkpoint.NewSigner(c.Origin, k.key)
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.Sign(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Whatever byte of an export is changed, whatever line is dropped or repeated,
// it does not verify, or says the very same.
func TestDamagedExport(t *testing.T) {
	dir, receipts, k := signedLog(t)
	ctx := context.Background()
	var out bytes.Buffer
	if _, err := audit.Export(ctx, dir, 5, 9, receipts[2].Checkpoint, &out); err != nil {
		t.Fatal(err)
	}
	texts := func(b []byte) (string, error) {
		var s []byte
		r, err := audit.VerifyExport(ctx, bytes.NewReader(b), k.check, func(e *audit.Entry) (err error) {
			s, err = e.AppendBinary(s)
			return err
		})
		return fmt.Sprintf("%+v %x", r, s), err
	}
	want, err := texts(out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	for at := range out.Bytes() {
		b := bytes.Clone(out.Bytes())
		b[at] ^= 0x21
		if got, err := texts(b); err == nil && got != want {
			t.Errorf("byte %d changed: it verifies", at)
		} else if err != nil && !errors.Is(err, checkpoint.ErrMalformed) && !errors.Is(err, checkpoint.ErrProof) && !errors.Is(err, checkpoint.ErrSignature) {
			t.Errorf("byte %d changed: error = %v", at, err)
		}
	}
	lines := bytes.SplitAfter(out.Bytes(), []byte("\n"))
	lines = lines[:len(lines)-1]
	for i := range lines {
		dropped := bytes.Join(append(append([][]byte{}, lines[:i]...), lines[i+1:]...), nil)
		twice := bytes.Join(append(append([][]byte{}, lines[:i+1]...), lines[i:]...), nil)
		for _, b := range [][]byte{dropped, twice} {
			if _, err := texts(b); !errors.Is(err, checkpoint.ErrMalformed) {
				t.Errorf("line %d dropped or repeated: error = %v, want ErrMalformed", i, err)
			}
		}
	}
	other := newTestKey(t)
	if _, err := audit.VerifyExport(ctx, bytes.NewReader(out.Bytes()), other.check, nil); !errors.Is(err, checkpoint.ErrSignature) {
		t.Errorf("another key: error = %v, want ErrSignature", err)
	}
}
