package store_test

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
	"github.com/keycustody/custodian/store"
)

var rewrite = flag.Bool("update", false, "write the golden files anew")

// A golden file is a whole store as text: a line for each entry with the name
// of the bucket, the key and the value in hexadecimal. Schema n must read
// testdata/schemaN.golden for ever.
const goldenFile = "testdata/schema1.golden"

var (
	when = time.Date(2026, 3, 1, 12, 30, 45, 123456789, time.UTC)

	goldenKeys = []custodian.SealedKey{
		custodiantest.Sealed(custodian.ContentKey{
			NaturalKey: custodian.NaturalKey{Category: "movies", ContentID: custodian.ContentID("film-1"), TrackType: "UHD1", Scheme: custodian.SchemeCENC, Generation: 1},
			KID:        custodian.KID{0x10, 6: 0x40, 8: 0x80, 15: 1},
			Origin:     custodian.OriginGenerated, KEK: custodian.KEKID{Category: "movies", Version: 4}, BirthKEK: 3,
			CreateTime: when, Revision: 2, Fingerprint: custodian.Fingerprint{Version: 1, MAC: [16]byte{0xf1}},
		}),
		custodiantest.Sealed(custodian.ContentKey{
			NaturalKey: custodian.NaturalKey{
				Category: "live", ContentID: custodian.ContentID{'a', 0, 0xff}, TrackType: "AUDIO", Scheme: custodian.SchemeCBCS,
				HasPeriod: true, Period: 258, Generation: 3,
			},
			KID: custodian.KID{0x20, 6: 0x40, 8: 0x80, 15: 2}, IV: bytes.Repeat([]byte{0x1f}, 16),
			PeriodStart: when, PeriodEnd: when.Add(time.Hour),
			Origin: custodian.OriginImported, KEK: custodian.KEKID{Category: "live", Version: 1}, BirthKEK: 1,
			CreateTime: when, Revision: 1, Fingerprint: custodian.Fingerprint{Version: 300, MAC: [16]byte{0xf2}},
		}),
	}
	goldenControl = custodian.ControlRecord{
		Kind: custodian.ControlKEK, Name: "movies/4", Body: []byte("body"), MACVersion: 300, MAC: [16]byte{1, 15: 16},
	}
	goldenHead    = custodian.ControlRecord{Body: []byte("head"), MACVersion: 1, MAC: [16]byte{2}}
	goldenJournal = custodian.InitJournal{
		StoreID: [16]byte{1}, MEKLabel: "custodian-mek-v1", MEKID: [16]byte{2}, Profile: custodian.ProfileSealed,
		Start: when, End: when.AddDate(1, 0, 0), SignLbl: "custodian-audit-v1", SignID: [16]byte{3},
	}
)

// writeGolden writes what the golden file holds into an empty store.
func writeGolden(t *testing.T, s custodian.Store) {
	t.Helper()
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
		return errors.Join(
			tx.InsertContentKey(goldenKeys[0]), tx.InsertContentKey(goldenKeys[1]),
			tx.PutControl(goldenControl), tx.PutHead(goldenHead), tx.PutInitJournal(goldenJournal),
			tx.PutCursor("rewrap", []byte{1, 2, 3}))
	})
	if err != nil {
		t.Fatalf("update: %v", err)
	}
}

// wantGolden demands that a store reads as what writeGolden wrote.
func wantGolden(t *testing.T, s custodian.Store) {
	t.Helper()
	err := s.View(t.Context(), func(tx custodian.Tx) error {
		for _, want := range goldenKeys {
			got, err := tx.HighestGeneration(want.Key.NaturalKey)
			if err != nil {
				return err
			}
			want.Key, err = custodian.DecodeContentKey(want.Body)
			if err != nil {
				return err
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("content key: got %+v, want %+v", got, want)
			}
		}
		if got, err := tx.Control(goldenControl.Kind, goldenControl.Name); err != nil || !reflect.DeepEqual(got, goldenControl) {
			t.Errorf("control: got %+v, %v, want %+v", got, err, goldenControl)
		}
		if got, err := tx.Head(); err != nil || !reflect.DeepEqual(got, goldenHead) {
			t.Errorf("head: got %+v, %v, want %+v", got, err, goldenHead)
		}
		if got, err := tx.InitJournal(); err != nil || got != goldenJournal {
			t.Errorf("journal: got %+v, %v, want %+v", got, err, goldenJournal)
		}
		if got, err := tx.Cursor("rewrap"); err != nil || !bytes.Equal(got, []byte{1, 2, 3}) {
			t.Errorf("cursor: got %x, %v, want 010203", got, err)
		}
		return nil
	})
	if err != nil {
		t.Errorf("view: %v", err)
	}
}

// dump is a store file as text.
func dump(t *testing.T, path string) []byte {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, ReadOnly: true})
	if err != nil {
		t.Fatalf("bolt: %v", err)
	}
	var out bytes.Buffer
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				_, err := fmt.Fprintf(&out, "%s %x %x\n", name, k, v)
				return err
			})
		})
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatalf("bolt: %v", err)
	}
	return out.Bytes()
}

// undump makes a store file of text.
func undump(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "keys.db")
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatalf("bolt: %v", err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		lines := bufio.NewScanner(bytes.NewReader(text))
		for lines.Scan() {
			f := strings.Split(lines.Text(), " ")
			b, err := tx.CreateBucketIfNotExists([]byte(f[0]))
			if err != nil {
				return err
			}
			k, err := hex.DecodeString(f[1])
			if err != nil {
				return err
			}
			v, err := hex.DecodeString(f[2])
			if err != nil {
				return err
			}
			if err := b.Put(k, v); err != nil {
				return err
			}
		}
		return lines.Err()
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatalf("bolt: %v", err)
	}
	return path
}

func TestGoldenWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	writeGolden(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	got := dump(t, path)
	if *rewrite {
		if err := os.WriteFile(goldenFile, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the store is written as\n%s\nwant %s\n%s", got, goldenFile, want)
	}
}

func TestGoldenRead(t *testing.T) {
	s := open(t, undump(t, goldenFile))
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	wantGolden(t, s)
}

// goldenRecords are the records of one bucket of the golden file, under meta
// of one key.
func goldenRecords(tb testing.TB, bucket, key string) [][]byte {
	tb.Helper()
	text, err := os.ReadFile(goldenFile)
	if err != nil {
		tb.Fatal(err)
	}
	var records [][]byte
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if f[0] != bucket || key != "" && f[1] != hex.EncodeToString([]byte(key)) {
			continue
		}
		v, err := hex.DecodeString(f[2])
		if err != nil {
			tb.Fatal(err)
		}
		records = append(records, v)
	}
	if len(records) == 0 {
		tb.Fatalf("%s: no record in bucket %s", goldenFile, bucket)
	}
	return records
}

var recordKinds = []struct{ kind, bucket, key string }{
	{"content key", "content", ""},
	{"control", "control", ""},
	{"head", "meta", "head"},
	{"journal", "meta", "journal"},
	{"counters", "meta", "counters"},
}

// TestRecordsAreStrict cuts and lengthens a record of each kind, and passes
// it off as one of each other kind.
func TestRecordsAreStrict(t *testing.T) {
	for _, k := range recordKinds {
		for _, b := range goldenRecords(t, k.bucket, k.key) {
			decode := store.Recode[k.kind]
			if got, err := decode(b); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%s: got %x, %v, want %x", k.kind, got, err, b)
			}
			for n := range b {
				if _, err := decode(b[:n]); err == nil {
					t.Errorf("%s cut to %d bytes: no error", k.kind, n)
				}
			}
			if _, err := decode(append(bytes.Clone(b), 0)); err == nil {
				t.Errorf("%s with a byte more: no error", k.kind)
			}
			format := bytes.Clone(b)
			format[0]++
			if _, err := decode(format); err == nil || !strings.Contains(err.Error(), "format 2, want 1") {
				t.Errorf("%s of another format: got %v", k.kind, err)
			}
			for other, decode := range store.Recode {
				if _, err := decode(b); other != k.kind && err == nil {
					t.Errorf("%s as %s: no error", k.kind, other)
				}
			}
		}
	}
}

// TestNumbersAreStrict: a number has one form only, so a record has.
func TestNumbersAreStrict(t *testing.T) {
	for name, b := range map[string][]byte{
		"not in its shortest form": {1, 5, 0x81, 0x00, 0},
		"of more than 64 bits":     {1, 5, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0},
		"cut":                      {1, 5, 0x81},
	} {
		if _, err := store.Recode["counters"](b); err == nil {
			t.Errorf("a number %s: no error", name)
		}
	}
}

func fuzzRecord(f *testing.F, kind, bucket, key string) {
	for _, b := range goldenRecords(f, bucket, key) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := store.Recode[kind](b)
		if err == nil && !bytes.Equal(got, b) {
			t.Errorf("%s: %x is read as what is written %x", kind, b, got)
		}
	})
}

func FuzzDecodeContentKey(f *testing.F) { fuzzRecord(f, "content key", "content", "") }
func FuzzDecodeControl(f *testing.F)    { fuzzRecord(f, "control", "control", "") }
func FuzzDecodeHead(f *testing.F)       { fuzzRecord(f, "head", "meta", "head") }
func FuzzDecodeJournal(f *testing.F)    { fuzzRecord(f, "journal", "meta", "journal") }
func FuzzDecodeCounters(f *testing.F)   { fuzzRecord(f, "counters", "meta", "counters") }
