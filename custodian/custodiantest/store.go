// Package custodiantest holds in-memory counterparts of what custodian asks
// of a store, a token and a KMS, and the conformance suites that every
// implementation of these must pass.
package custodiantest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// An OpenStore makes an empty store for one test. reopen closes the store
// that was open last and opens it again; a store that cannot outlive its
// process returns itself.
type OpenStore func(t *testing.T) (s custodian.Store, reopen func() custodian.Store)

// TestStore holds a store to the contract of custodian.Store. Each scenario
// looks at its outcome twice: in the store that made it, and after a reopen.
func TestStore(t *testing.T, open OpenStore) {
	for _, sc := range storeScenarios {
		t.Run(sc.name, func(t *testing.T) {
			s, reopen := open(t)
			sc.do(t, s)
			if t.Failed() {
				t.FailNow()
			}
			sc.want(t, s)
			if t.Failed() {
				t.FailNow()
			}
			s = reopen()
			sc.want(t, s)
			if err := s.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if err := s.Close(); err != nil {
				t.Errorf("second close: %v", err)
			}
			checkClosed(t, s)
		})
	}
}

// A scenario does something and says what is so afterwards, for ever.
type scenario struct {
	name string
	do   func(t *testing.T, s custodian.Store)
	want func(t *testing.T, s custodian.Store)
}

var storeScenarios = []scenario{
	{"Empty", func(*testing.T, custodian.Store) {}, wantEmpty},
	{"HeadAndJournal", doHeadAndJournal, wantHeadAndJournal},
	{"Controls", doControls, wantControls},
	{"InsertContentKey", doInsert, wantInsert},
	{"InsertConflicts", doConflicts, wantConflicts},
	{"InsertMalformed", doMalformed, wantEmpty},
	{"ReplaceContentKey", doReplace, wantReplace},
	{"HighestGeneration", doGenerations, wantGenerations},
	{"ContentKeys", doListing, wantListing},
	{"ListWhileWriting", doListWhileWriting, wantListWhileWriting},
	{"KeysUnderKEK", doUnderKEK, wantUnderKEK},
	{"Cursors", doCursors, wantCursors},
	{"Sequence", doSequence, wantSequence},
	{"FailedUpdate", doFailedUpdate, wantFailedUpdate},
	{"PanickingUpdate", doPanickingUpdate, wantFailedUpdate},
	{"ReadYourWrites", doReadYourWrites, wantReadYourWrites},
	{"NoSharedMemory", doNoSharedMemory, wantNoSharedMemory},
	{"Isolation", doIsolation, wantIsolation},
	{"ConcurrentUpdates", doConcurrentUpdates, wantConcurrentUpdates},
	{"ConcurrentInserts", doConcurrentInserts, wantConcurrentInserts},
	{"Context", doContext, wantEmpty},
	{"Backup", doBackup, func(*testing.T, custodian.Store) {}},
}

// sentinels are all errors of which at most one may match.
var sentinels = []error{
	custodian.ErrNotFound, custodian.ErrChanged, custodian.ErrNaturalKey, custodian.ErrFingerprint,
	custodian.ErrContentCategory, custodian.ErrKIDConflict, custodian.ErrStoreUnavailable,
	custodian.ErrRecordCorrupt, custodian.ErrInvalid,
}

// wantOnly demands that err is want and nothing else that a caller acts on.
func wantOnly(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got error %v, want %v", what, err, want)
	}
	for _, other := range sentinels {
		if other != want && errors.Is(err, other) {
			t.Errorf("%s: error %v is also %v", what, err, other)
		}
	}
}

func update(t *testing.T, s custodian.Store, f func(tx custodian.UpdateTx) error) {
	t.Helper()
	if err := s.Update(t.Context(), f); err != nil {
		t.Fatalf("update: %v", err)
	}
}

func view(t *testing.T, s custodian.Store, f func(tx custodian.Tx)) {
	t.Helper()
	err := s.View(t.Context(), func(tx custodian.Tx) error {
		f(tx)
		return nil
	})
	if err != nil {
		t.Fatalf("view: %v", err)
	}
}

// start is when test keys are made.
var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// SealedKey is a content key for tests, number n of its kind: KID,
// fingerprint and sealed bytes follow from n, and what change does to the key
// is in its body. The sealed bytes are no ciphertext.
func SealedKey(n uint32, change func(k *custodian.ContentKey)) custodian.SealedKey {
	k := custodian.ContentKey{
		NaturalKey: custodian.NaturalKey{
			Category:   "movies",
			ContentID:  fmt.Appendf(nil, "film-%06d", n),
			TrackType:  "HD",
			Scheme:     custodian.SchemeCENC,
			Generation: 1,
		},
		KID:        testKID(n),
		Origin:     custodian.OriginGenerated,
		KEK:        custodian.KEKID{Category: "movies", Version: 1},
		BirthKEK:   1,
		CreateTime: start.Add(time.Duration(n) * time.Millisecond),
		Revision:   1,
	}
	k.Fingerprint.Version = 1
	binary.BigEndian.PutUint32(k.Fingerprint.MAC[:], n*0x9e3779b1)
	binary.BigEndian.PutUint32(k.Fingerprint.MAC[12:], n)
	if change != nil {
		change(&k)
	}
	return Sealed(k)
}

// Sealed is k as it would rest, with sealed bytes that are no ciphertext.
func Sealed(k custodian.ContentKey) custodian.SealedKey {
	body := custodian.EncodeContentKey(k)
	s := custodian.SealedKey{Key: k, Body: body, Sealed: bytes.Repeat(k.KID[:], 2)}
	copy(s.IV[:], k.KID[4:])
	return s
}

// testKID spreads numbers over all KIDs, as random ones are.
func testKID(n uint32) custodian.KID {
	var kid custodian.KID
	binary.BigEndian.PutUint32(kid[:], n*0x85ebca6b)
	binary.BigEndian.PutUint32(kid[12:], n+1)
	kid[6] = 0x40
	kid[8] = 0x80
	return kid
}

func insert(t *testing.T, s custodian.Store, keys ...custodian.SealedKey) {
	t.Helper()
	update(t, s, func(tx custodian.UpdateTx) error {
		for _, k := range keys {
			if err := tx.InsertContentKey(k); err != nil {
				return err
			}
		}
		return nil
	})
}

// wantKey demands that the store has exactly k, by every way there is to it.
func wantKey(t *testing.T, s custodian.Store, want custodian.SealedKey) {
	t.Helper()
	view(t, s, func(tx custodian.Tx) {
		got, err := tx.ContentKey(want.Key.KID)
		if err != nil {
			t.Errorf("content key: %v", err)
			return
		}
		compareKeys(t, got, want)
		if c, err := tx.ContentCategory(want.Key.ContentID); err != nil || c != want.Key.Category {
			t.Errorf("category of %q: got %q, %v, want %q", want.Key.ContentID, c, err, want.Key.Category)
		}
		if kid, err := tx.FingerprintOwner(want.Key.Fingerprint); err != nil || kid != want.Key.KID {
			t.Errorf("owner of the fingerprint: got %s, %v, want %s", kid, err, want.Key.KID)
		}
		kids, err := tx.KeysUnderKEK(want.Key.KEK, custodian.KID{}, 1<<20)
		if err != nil || !slices.Contains(kids, want.Key.KID) {
			t.Errorf("keys under %s: got %v, %v, want %s among them", want.Key.KEK, kids, err, want.Key.KID)
		}
	})
}

func compareKeys(t *testing.T, got, want custodian.SealedKey) {
	t.Helper()
	if !bytes.Equal(got.Body, want.Body) || got.IV != want.IV || !bytes.Equal(got.Sealed, want.Sealed) {
		t.Errorf("content key %s: got body %x, iv %x, sealed %x, want %x, %x, %x",
			want.Key.KID, got.Body, got.IV, got.Sealed, want.Body, want.IV, want.Sealed)
	}
	decoded, err := custodian.DecodeContentKey(want.Body)
	if err != nil {
		t.Errorf("decode body: %v", err)
	}
	if !reflect.DeepEqual(got.Key, decoded) {
		t.Errorf("content key %s: got %+v, want %+v", want.Key.KID, got.Key, decoded)
	}
}

func wantStats(t *testing.T, s custodian.Store, keys, sequence uint64) {
	t.Helper()
	got, err := s.Stats(t.Context())
	if err != nil {
		t.Fatalf("stats: %v", err)
	}
	if got.ContentKeys != keys || got.Sequence != sequence || got.Engine == "" {
		t.Errorf("stats: got %+v, want %d content keys and sequence %d", got, keys, sequence)
	}
	view(t, s, func(tx custodian.Tx) {
		if got := tx.Sequence(); got != sequence {
			t.Errorf("sequence: got %d, want %d", got, sequence)
		}
	})
}

func list(t *testing.T, tx custodian.Tx, c custodian.CategoryName, id string, after *custodian.NaturalKey, limit int) []custodian.NaturalKey {
	t.Helper()
	var got []custodian.NaturalKey
	err := tx.ContentKeys(c, custodian.ContentID(id), after, limit, func(k custodian.SealedKey) error {
		got = append(got, k.Key.NaturalKey)
		return nil
	})
	if err != nil {
		t.Errorf("content keys of %s: %v", c, err)
	}
	return got
}

func wantEmpty(t *testing.T, s custodian.Store) {
	t.Helper()
	view(t, s, func(tx custodian.Tx) {
		_, err := tx.Head()
		wantOnly(t, "head", err, custodian.ErrNotFound)
		_, err = tx.InitJournal()
		wantOnly(t, "journal", err, custodian.ErrNotFound)
		_, err = tx.Control(custodian.ControlMEK, "1")
		wantOnly(t, "control", err, custodian.ErrNotFound)
		_, err = tx.ContentKey(testKID(1))
		wantOnly(t, "content key", err, custodian.ErrNotFound)
		_, err = tx.HighestGeneration(SealedKey(1, nil).Key.NaturalKey)
		wantOnly(t, "highest generation", err, custodian.ErrNotFound)
		_, err = tx.ContentCategory(custodian.ContentID("film-000001"))
		wantOnly(t, "content category", err, custodian.ErrNotFound)
		_, err = tx.FingerprintOwner(custodian.Fingerprint{Version: 1})
		wantOnly(t, "fingerprint owner", err, custodian.ErrNotFound)
		if err := tx.Controls(func(r custodian.ControlRecord) error { return fmt.Errorf("found %q", r.Name) }); err != nil {
			t.Errorf("controls: %v", err)
		}
		if got := list(t, tx, "movies", "", nil, 10); len(got) != 0 {
			t.Errorf("content keys: got %v, want none", got)
		}
		if got, err := tx.KeysUnderKEK(custodian.KEKID{Category: "movies", Version: 1}, custodian.KID{}, 10); err != nil || len(got) != 0 {
			t.Errorf("keys under kek: got %v, %v, want none", got, err)
		}
		if got, err := tx.Cursor("rewrap"); err != nil || got != nil {
			t.Errorf("cursor: got %v, %v, want nil", got, err)
		}
	})
	wantStats(t, s, 0, 0)
}

// checkClosed demands that a closed store says so, and as a device fault.
func checkClosed(t *testing.T, s custodian.Store) {
	t.Helper()
	err := s.View(t.Context(), func(custodian.Tx) error { return nil })
	wantOnly(t, "view of a closed store", err, custodian.ErrStoreUnavailable)
	err = s.Update(t.Context(), func(custodian.UpdateTx) error { return nil })
	wantOnly(t, "update of a closed store", err, custodian.ErrStoreUnavailable)
	_, err = s.Stats(t.Context())
	wantOnly(t, "stats of a closed store", err, custodian.ErrStoreUnavailable)
	err = s.Backup(t.Context(), io.Discard)
	wantOnly(t, "backup of a closed store", err, custodian.ErrStoreUnavailable)
}

var (
	testHead = custodian.ControlRecord{Body: []byte("head 2"), MACVersion: 7, MAC: [16]byte{1, 2, 3}}

	testJournal = custodian.InitJournal{
		StoreID: [16]byte{1}, MEKLabel: "custodian-mek-v1", MEKID: [16]byte{2}, Profile: custodian.ProfileSealed,
		Start: start.Add(123456789), End: start.AddDate(1, 0, 0), SignLbl: "custodian-audit-v1", SignID: [16]byte{3},
	}
)

func doHeadAndJournal(t *testing.T, s custodian.Store) {
	update(t, s, func(tx custodian.UpdateTx) error {
		// Nothing is there to be removed.
		if err := tx.DeleteInitJournal(); err != nil {
			return err
		}
		if err := tx.PutInitJournal(custodian.InitJournal{}); err != nil {
			return err
		}
		return tx.PutHead(custodian.ControlRecord{Body: []byte("head 1")})
	})
	view(t, s, func(tx custodian.Tx) {
		got, err := tx.InitJournal()
		if err != nil || got != (custodian.InitJournal{}) {
			t.Errorf("empty journal: got %+v, %v", got, err)
		}
	})
	update(t, s, func(tx custodian.UpdateTx) error { return tx.DeleteInitJournal() })
	view(t, s, func(tx custodian.Tx) {
		_, err := tx.InitJournal()
		wantOnly(t, "deleted journal", err, custodian.ErrNotFound)
	})
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
		return tx.PutHead(custodian.ControlRecord{Kind: custodian.ControlMEK, Name: "1"})
	})
	wantOnly(t, "a head with a kind", err, custodian.ErrInvalid)
	update(t, s, func(tx custodian.UpdateTx) error {
		j := testJournal
		j.Start = j.Start.In(time.FixedZone("elsewhere", 3600))
		if err := tx.PutInitJournal(j); err != nil {
			return err
		}
		return tx.PutHead(testHead)
	})
}

func wantHeadAndJournal(t *testing.T, s custodian.Store) {
	view(t, s, func(tx custodian.Tx) {
		if got, err := tx.Head(); err != nil || !reflect.DeepEqual(got, testHead) {
			t.Errorf("head: got %+v, %v, want %+v", got, err, testHead)
		}
		if got, err := tx.InitJournal(); err != nil || got != testJournal {
			t.Errorf("journal: got %+v, %v, want %+v", got, err, testJournal)
		}
		_, err := tx.Control(0, "")
		wantOnly(t, "the head as a control record", err, custodian.ErrNotFound)
	})
}

func control(kind custodian.ControlKind, name, body string) custodian.ControlRecord {
	return custodian.ControlRecord{Kind: kind, Name: name, Body: []byte(body), MACVersion: 1<<32 - 1, MAC: [16]byte{15: 9}}
}

func doControls(t *testing.T, s custodian.Store) {
	update(t, s, func(tx custodian.UpdateTx) error {
		for _, r := range []custodian.ControlRecord{
			control(custodian.ControlKEK, "movies/4", "wrong"),
			control(custodian.ControlCategory, "movies", ""),
			control(custodian.ControlKEK, "movies/10", "c"),
			control(custodian.ControlMEK, "2", "b"),
			control(custodian.ControlMEK, "1", "a"),
			control(custodian.ControlMEK, "3", "gone"),
			control(custodian.ControlException, "\x00\xff\x00", "e"),
			control(custodian.ControlKEK, "movies/4", "d"),
		} {
			if err := tx.PutControl(r); err != nil {
				return err
			}
		}
		return nil
	})
	update(t, s, func(tx custodian.UpdateTx) error { return tx.DeleteControl(custodian.ControlMEK, "3") })
	for _, r := range []custodian.ControlRecord{{Kind: 0, Name: "x"}, {Kind: custodian.ControlKEK}} {
		err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.PutControl(r) })
		wantOnly(t, fmt.Sprintf("put control %d %q", r.Kind, r.Name), err, custodian.ErrInvalid)
	}
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.DeleteControl(custodian.ControlMEK, "3") })
	wantOnly(t, "delete a control record twice", err, custodian.ErrNotFound)
}

func wantControls(t *testing.T, s custodian.Store) {
	want := []custodian.ControlRecord{
		control(custodian.ControlMEK, "1", "a"),
		control(custodian.ControlMEK, "2", "b"),
		control(custodian.ControlKEK, "movies/10", "c"),
		control(custodian.ControlKEK, "movies/4", "d"),
		control(custodian.ControlCategory, "movies", ""),
		control(custodian.ControlException, "\x00\xff\x00", "e"),
	}
	view(t, s, func(tx custodian.Tx) {
		var got []custodian.ControlRecord
		err := tx.Controls(func(r custodian.ControlRecord) error {
			got = append(got, r)
			return nil
		})
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("controls: got %+v, %v, want %+v", got, err, want)
		}
		for _, w := range want {
			if got, err := tx.Control(w.Kind, w.Name); err != nil || !reflect.DeepEqual(got, w) {
				t.Errorf("control %d %q: got %+v, %v, want %+v", w.Kind, w.Name, got, err, w)
			}
		}
		_, err = tx.Control(custodian.ControlHelper, "movies/4")
		wantOnly(t, "the name in another kind", err, custodian.ErrNotFound)
		stop := errors.New("enough")
		seen := 0
		err = tx.Controls(func(custodian.ControlRecord) error {
			seen++
			return stop
		})
		if !errors.Is(err, stop) || seen != 1 {
			t.Errorf("controls with a function that fails: got %v after %d calls, want its error after 1", err, seen)
		}
	})
}

// insertedKeys have every shape that a natural key can have.
func insertedKeys() []custodian.SealedKey {
	return []custodian.SealedKey{
		SealedKey(1, nil),
		SealedKey(2, func(k *custodian.ContentKey) {
			k.ContentID = bytes.Repeat([]byte{0}, custodian.MaxContentIDSize)
			k.Category = "live"
			k.KEK = custodian.KEKID{Category: "live", Version: 1<<32 - 1}
			k.Generation = 1<<32 - 1
			k.HasPeriod, k.Period = true, 1<<32-1
			k.PeriodStart, k.PeriodEnd = start, start.Add(time.Hour)
			k.Scheme = custodian.SchemeCBCS
			k.IV = bytes.Repeat([]byte{5}, 16)
			k.Origin = custodian.OriginImported
			k.Revision = 1<<64 - 1
		}),
		SealedKey(3, func(k *custodian.ContentKey) { k.ContentID = custodian.ContentID{0xff} }),
	}
}

func doInsert(t *testing.T, s custodian.Store) { insert(t, s, insertedKeys()...) }

func wantInsert(t *testing.T, s custodian.Store) {
	for _, k := range insertedKeys() {
		wantKey(t, s, k)
	}
	wantStats(t, s, 3, 1)
}

// conflicts differ from the two stored keys in all but what they conflict in,
// and in whatever is checked later.
var conflicts = []struct {
	name   string
	change func(k *custodian.ContentKey)
	want   error
}{
	{"content item, KID and fingerprint", func(k *custodian.ContentKey) {
		k.Category, k.KID, k.Fingerprint = "live", testKID(1), SealedKey(1, nil).Key.Fingerprint
		k.ContentID = SealedKey(1, nil).Key.ContentID
	}, custodian.ErrContentCategory},
	{"everything", func(k *custodian.ContentKey) { *k = SealedKey(1, nil).Key }, custodian.ErrNaturalKey},
	{"natural key", func(k *custodian.ContentKey) { k.ContentID = SealedKey(1, nil).Key.ContentID }, custodian.ErrNaturalKey},
	{"natural key of one and KID of the other", func(k *custodian.ContentKey) {
		k.ContentID, k.KID = SealedKey(1, nil).Key.ContentID, testKID(2)
	}, custodian.ErrNaturalKey},
	{"KID and fingerprint", func(k *custodian.ContentKey) {
		k.KID, k.Fingerprint = testKID(1), SealedKey(2, nil).Key.Fingerprint
	}, custodian.ErrKIDConflict},
	{"KID", func(k *custodian.ContentKey) { k.KID = testKID(2) }, custodian.ErrKIDConflict},
	{"fingerprint", func(k *custodian.ContentKey) { k.Fingerprint = SealedKey(1, nil).Key.Fingerprint }, custodian.ErrFingerprint},
	{"fingerprint of another generation", func(k *custodian.ContentKey) {
		old := SealedKey(1, nil).Key
		k.ContentID, k.Generation, k.Fingerprint = old.ContentID, 2, old.Fingerprint
	}, custodian.ErrFingerprint},
}

func doConflicts(t *testing.T, s custodian.Store) {
	insert(t, s, SealedKey(1, nil), SealedKey(2, nil))
	for _, c := range conflicts {
		// The update goes on after the refusal and is kept: what it keeps must
		// hold nothing of the refused key.
		update(t, s, func(tx custodian.UpdateTx) error {
			wantOnly(t, c.name, tx.InsertContentKey(SealedKey(9, c.change)), c.want)
			return tx.PutCursor("conflict", []byte(c.name))
		})
	}
	// The same fingerprint under another helper key is another one.
	insert(t, s, SealedKey(3, func(k *custodian.ContentKey) {
		k.Fingerprint = SealedKey(1, nil).Key.Fingerprint
		k.Fingerprint.Version = 2
	}))
}

func wantConflicts(t *testing.T, s custodian.Store) {
	wantKey(t, s, SealedKey(1, nil))
	wantKey(t, s, SealedKey(2, nil))
	wantStats(t, s, 3, 2)
	view(t, s, func(tx custodian.Tx) {
		refused := SealedKey(9, nil)
		_, err := tx.ContentKey(refused.Key.KID)
		wantOnly(t, "refused key", err, custodian.ErrNotFound)
		_, err = tx.ContentCategory(refused.Key.ContentID)
		wantOnly(t, "content item of a refused key", err, custodian.ErrNotFound)
		_, err = tx.FingerprintOwner(refused.Key.Fingerprint)
		wantOnly(t, "fingerprint of a refused key", err, custodian.ErrNotFound)
		if got := list(t, tx, "movies", "", nil, 10); len(got) != 3 {
			t.Errorf("content keys: got %v, want three", got)
		}
		if got, err := tx.KeysUnderKEK(refused.Key.KEK, custodian.KID{}, 10); err != nil || len(got) != 3 {
			t.Errorf("keys under the kek: got %v, %v, want three", got, err)
		}
	})
}

func doMalformed(t *testing.T, s custodian.Store) {
	for name, change := range map[string]func(k *custodian.ContentKey){
		"no category":          func(k *custodian.ContentKey) { k.Category = "" },
		"a zero in category":   func(k *custodian.ContentKey) { k.Category = "movies\x00" },
		"no content ID":        func(k *custodian.ContentKey) { k.ContentID = nil },
		"long content ID":      func(k *custodian.ContentKey) { k.ContentID = make([]byte, custodian.MaxContentIDSize+1) },
		"a zero in track type": func(k *custodian.ContentKey) { k.TrackType = "H\x00D" },
		"unknown scheme":       func(k *custodian.ContentKey) { k.Scheme = "cenx" },
		"index of no period":   func(k *custodian.ContentKey) { k.Period = 1 },
		"generation zero":      func(k *custodian.ContentKey) { k.Generation = 0 },
		"zero KID":             func(k *custodian.ContentKey) { k.KID = custodian.KID{} },
		"no kek":               func(k *custodian.ContentKey) { k.KEK = custodian.KEKID{} },
	} {
		err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(SealedKey(1, change)) })
		wantOnly(t, name, err, custodian.ErrInvalid)
	}
	other := SealedKey(1, nil)
	other.Body = SealedKey(2, nil).Body
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(other) })
	wantOnly(t, "body of another key", err, custodian.ErrInvalid)
}

func replaced() custodian.SealedKey {
	return SealedKey(1, func(k *custodian.ContentKey) {
		k.KEK.Version = 2
		k.Revision = 2
	})
}

// renewed is the third key with a fingerprint of another helper key.
func renewed() custodian.SealedKey {
	return SealedKey(3, func(k *custodian.ContentKey) {
		k.Fingerprint.Version = 2
		k.Revision = 2
	})
}

func doReplace(t *testing.T, s custodian.Store) {
	insert(t, s, SealedKey(1, nil), SealedKey(2, nil), SealedKey(3, nil))
	update(t, s, func(tx custodian.UpdateTx) error { return tx.ReplaceContentKey(1, renewed()) })
	for _, c := range []struct {
		name     string
		revision uint64
		k        custodian.SealedKey
		want     error
	}{
		{"unknown KID", 1, SealedKey(9, nil), custodian.ErrNotFound},
		{"older revision", 0, replaced(), custodian.ErrChanged},
		{"newer revision", 2, replaced(), custodian.ErrChanged},
		{"another natural key", 1, SealedKey(1, func(k *custodian.ContentKey) { k.Generation = 2 }), custodian.ErrNaturalKey},
		{"another content item", 1, SealedKey(1, func(k *custodian.ContentKey) { k.ContentID = custodian.ContentID("x") }), custodian.ErrNaturalKey},
		{"another fingerprint", 1, SealedKey(1, func(k *custodian.ContentKey) { k.Fingerprint.MAC[0]++ }), custodian.ErrFingerprint},
		{"the fingerprint of another key", 1, SealedKey(1, func(k *custodian.ContentKey) { k.Fingerprint = renewed().Key.Fingerprint }), custodian.ErrFingerprint},
	} {
		err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.ReplaceContentKey(c.revision, c.k) })
		wantOnly(t, c.name, err, c.want)
	}
	update(t, s, func(tx custodian.UpdateTx) error { return tx.ReplaceContentKey(1, replaced()) })
	// With the KEK as it is.
	update(t, s, func(tx custodian.UpdateTx) error {
		return tx.ReplaceContentKey(1, SealedKey(2, func(k *custodian.ContentKey) { k.Revision = 7 }))
	})
}

func wantReplace(t *testing.T, s custodian.Store) {
	wantKey(t, s, replaced())
	wantKey(t, s, SealedKey(2, func(k *custodian.ContentKey) { k.Revision = 7 }))
	wantKey(t, s, renewed())
	wantStats(t, s, 3, 4)
	view(t, s, func(tx custodian.Tx) {
		for version, want := range map[uint32][]custodian.KID{1: {testKID(2), testKID(3)}, 2: {testKID(1)}} {
			got, err := tx.KeysUnderKEK(custodian.KEKID{Category: "movies", Version: version}, custodian.KID{}, 10)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("keys under movies/%d: got %v, %v, want %v", version, got, err, want)
			}
		}
		owner, err := tx.FingerprintOwner(renewed().Key.Fingerprint)
		if err != nil || owner != renewed().Key.KID {
			t.Errorf("owner of a renewed fingerprint: got %v, %v, want %v", owner, err, renewed().Key.KID)
		}
		_, err = tx.FingerprintOwner(SealedKey(3, nil).Key.Fingerprint)
		wantOnly(t, "the fingerprint before", err, custodian.ErrNotFound)
	})
}

// doGenerations makes neighbours that a careless search would take: a content
// ID that is the prefix of another, other tracks, schemes and periods, and
// generations whose bytes in the wrong order sort otherwise.
func doGenerations(t *testing.T, s custodian.Store) {
	n := uint32(0)
	add := func(change func(k *custodian.ContentKey)) {
		n++
		insert(t, s, SealedKey(n, func(k *custodian.ContentKey) {
			k.ContentID = custodian.ContentID("film")
			change(k)
		}))
	}
	for _, g := range []uint32{1, 2, 256, 3} {
		add(func(k *custodian.ContentKey) { k.Generation = g })
	}
	add(func(k *custodian.ContentKey) { k.HasPeriod, k.Generation = true, 5 })
	add(func(k *custodian.ContentKey) { k.HasPeriod, k.Period, k.Generation = true, 1, 1<<32-1 })
	add(func(k *custodian.ContentKey) { k.TrackType, k.Generation = "HD1", 999 })
	add(func(k *custodian.ContentKey) { k.Scheme, k.Generation = custodian.SchemeCBCS, 998 })
	add(func(k *custodian.ContentKey) { k.ContentID, k.Generation = custodian.ContentID("film\x00"), 997 })
	add(func(k *custodian.ContentKey) { k.ContentID, k.Generation = custodian.ContentID("fil"), 996 })
}

func wantGenerations(t *testing.T, s custodian.Store) {
	base := custodian.NaturalKey{Category: "movies", ContentID: custodian.ContentID("film"), TrackType: "HD", Scheme: custodian.SchemeCENC}
	for name, c := range map[string]struct {
		change func(n *custodian.NaturalKey)
		want   uint32
	}{
		"no period":        {func(*custodian.NaturalKey) {}, 256},
		"generation given": {func(n *custodian.NaturalKey) { n.Generation = 2 }, 256},
		"period 0":         {func(n *custodian.NaturalKey) { n.HasPeriod = true }, 5},
		"period 1":         {func(n *custodian.NaturalKey) { n.HasPeriod, n.Period = true, 1 }, 1<<32 - 1},
		"track type":       {func(n *custodian.NaturalKey) { n.TrackType = "HD1" }, 999},
		"scheme":           {func(n *custodian.NaturalKey) { n.Scheme = custodian.SchemeCBCS }, 998},
		"zero at the end":  {func(n *custodian.NaturalKey) { n.ContentID = custodian.ContentID("film\x00") }, 997},
		"shorter":          {func(n *custodian.NaturalKey) { n.ContentID = custodian.ContentID("fil") }, 996},
	} {
		n := base
		c.change(&n)
		view(t, s, func(tx custodian.Tx) {
			got, err := tx.HighestGeneration(n)
			if err != nil || got.Key.Generation != c.want || !got.Key.SameItem(n) {
				t.Errorf("%s: got %s, %v, want generation %d of %s", name, got.Key.NaturalKey, err, c.want, n)
			}
		})
	}
	for name, change := range map[string]func(n *custodian.NaturalKey){
		"other category":   func(n *custodian.NaturalKey) { n.Category = "movie" },
		"after all others": func(n *custodian.NaturalKey) { n.Category = "zzz" },
		"other period":     func(n *custodian.NaturalKey) { n.HasPeriod, n.Period = true, 2 },
		"longer":           func(n *custodian.NaturalKey) { n.ContentID = custodian.ContentID("film\x00\x00") },
		"other track type": func(n *custodian.NaturalKey) { n.TrackType = "H" },
	} {
		n := base
		change(&n)
		view(t, s, func(tx custodian.Tx) {
			_, err := tx.HighestGeneration(n)
			wantOnly(t, name, err, custodian.ErrNotFound)
		})
	}
	view(t, s, func(tx custodian.Tx) {
		_, err := tx.HighestGeneration(custodian.NaturalKey{})
		wantOnly(t, "no natural key", err, custodian.ErrInvalid)
	})
}

// listed is in the order of ContentKeys.
func listed() []custodian.NaturalKey {
	item := func(id string) custodian.NaturalKey {
		return custodian.NaturalKey{Category: "movies", ContentID: custodian.ContentID(id), TrackType: "HD", Scheme: custodian.SchemeCENC, Generation: 1}
	}
	period := func(n custodian.NaturalKey, p uint32) custodian.NaturalKey {
		n.HasPeriod, n.Period = true, p
		return n
	}
	audio, cbcs, second := item("b"), item("b"), item("b")
	audio.TrackType = "AUDIO"
	cbcs.Scheme = custodian.SchemeCBCS
	second.Generation = 2
	return []custodian.NaturalKey{
		item("\x00"), item("\x00\x00"), item("\x00\x01"), item("\x01"), item("aa"),
		audio, cbcs, item("b"), second, period(item("b"), 0), period(item("b"), 1), period(item("b"), 256),
		item("b\x00"), item("b\x00a"), item("b\x01"), item("ba"), item("\xff"), item("\xff\x00"), item("\xff\xff"),
	}
}

func doListing(t *testing.T, s custodian.Store) {
	keys := listed()
	// In another order than they are listed, and among others.
	for i := range keys {
		n := keys[i*7%len(keys)]
		insert(t, s, SealedKey(uint32(i), func(k *custodian.ContentKey) { k.NaturalKey = n }))
	}
	for i, c := range []custodian.CategoryName{"movie", "movies-2", "a", "z"} {
		insert(t, s, SealedKey(uint32(1000+i), func(k *custodian.ContentKey) { k.Category = c }))
	}
}

func wantListing(t *testing.T, s custodian.Store) {
	want := listed()
	view(t, s, func(tx custodian.Tx) {
		same := func(what string, got, want []custodian.NaturalKey) {
			t.Helper()
			if len(got) == 0 && len(want) == 0 {
				return
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got %v, want %v", what, got, want)
			}
		}
		same("all", list(t, tx, "movies", "", nil, 1000), want)
		same("as many as there are", list(t, tx, "movies", "", nil, len(want)), want)
		same("none", list(t, tx, "movies", "", nil, 0), nil)
		same("an unknown category", list(t, tx, "films", "", nil, 10), nil)
		same("one item", list(t, tx, "movies", "b", nil, 10), want[5:12])
		same("one item, from its middle", list(t, tx, "movies", "b", &want[6], 2), want[7:9])
		same("one item, after an earlier one", list(t, tx, "movies", "b", &want[0], 2), want[5:7])
		same("one item, after a later one", list(t, tx, "movies", "b", &want[12], 10), nil)
		same("an unknown item", list(t, tx, "movies", "bb", nil, 10), nil)
		other := want[3]
		other.Category = "z"
		same("after another category", list(t, tx, "movies", "", &other, 10), nil)

		var pages []custodian.NaturalKey
		var after *custodian.NaturalKey
		for range 100 {
			page := list(t, tx, "movies", "", after, 4)
			if len(page) == 0 {
				break
			}
			pages = append(pages, page...)
			after = &page[len(page)-1]
		}
		same("pages", pages, want)

		absent := want[4]
		absent.Generation = 9
		same("after a key that is not there", list(t, tx, "movies", "", &absent, 1), want[5:6])

		stop := errors.New("enough")
		err := tx.ContentKeys("movies", nil, nil, 10, func(custodian.SealedKey) error { return stop })
		if !errors.Is(err, stop) {
			t.Errorf("a function that fails: got %v, want its error", err)
		}
		err = tx.ContentKeys("", nil, nil, 10, func(custodian.SealedKey) error { return nil })
		wantOnly(t, "no category", err, custodian.ErrInvalid)
	})
}

// doListWhileWriting changes what it lists.
func doListWhileWriting(t *testing.T, s custodian.Store) {
	for i := range uint32(50) {
		insert(t, s, SealedKey(i, nil))
	}
	update(t, s, func(tx custodian.UpdateTx) error {
		seen := 0
		err := tx.ContentKeys("movies", nil, nil, 1000, func(k custodian.SealedKey) error {
			seen++
			k.Key.Revision++
			k.Key.KEK.Version = 2
			return tx.ReplaceContentKey(1, Sealed(k.Key))
		})
		if err == nil && seen != 50 {
			err = fmt.Errorf("listed %d keys, want 50", seen)
		}
		return err
	})
	update(t, s, func(tx custodian.UpdateTx) error {
		for i := range 20 {
			if err := tx.PutControl(control(custodian.ControlKEK, fmt.Sprint(i), "")); err != nil {
				return err
			}
		}
		seen := 0
		err := tx.Controls(func(r custodian.ControlRecord) error {
			seen++
			if seen%2 == 0 {
				return tx.DeleteControl(r.Kind, r.Name)
			}
			r.Body = []byte("kept")
			return tx.PutControl(r)
		})
		if err == nil && seen != 20 {
			err = fmt.Errorf("listed %d control records, want 20", seen)
		}
		return err
	})
}

func wantListWhileWriting(t *testing.T, s custodian.Store) {
	view(t, s, func(tx custodian.Tx) {
		kids, err := tx.KeysUnderKEK(custodian.KEKID{Category: "movies", Version: 2}, custodian.KID{}, 1000)
		if err != nil || len(kids) != 50 {
			t.Errorf("keys under movies/2: got %d, %v, want 50", len(kids), err)
		}
		kept := 0
		err = tx.Controls(func(r custodian.ControlRecord) error {
			kept++
			if string(r.Body) != "kept" {
				t.Errorf("control %q: got body %q, want %q", r.Name, r.Body, "kept")
			}
			return nil
		})
		if err != nil || kept != 10 {
			t.Errorf("controls: got %d, %v, want 10", kept, err)
		}
	})
}

func doUnderKEK(t *testing.T, s custodian.Store) {
	for i := range uint32(40) {
		insert(t, s, SealedKey(i, func(k *custodian.ContentKey) { k.KEK.Version = 1 + 255*(i%2) }))
	}
	insert(t, s, SealedKey(100, func(k *custodian.ContentKey) { k.KEK.Category = "movies-2" }))
}

func wantUnderKEK(t *testing.T, s custodian.Store) {
	id := custodian.KEKID{Category: "movies", Version: 256}
	var want []custodian.KID
	for i := uint32(1); i < 40; i += 2 {
		want = append(want, testKID(i))
	}
	slices.SortFunc(want, compareKID)
	view(t, s, func(tx custodian.Tx) {
		got, err := tx.KeysUnderKEK(id, custodian.KID{}, 1000)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("keys under %s: got %v, %v, want %v", id, got, err, want)
		}
		var pages []custodian.KID
		var after custodian.KID
		for range 100 {
			page, err := tx.KeysUnderKEK(id, after, 3)
			if err != nil {
				t.Errorf("keys under %s after %s: %v", id, after, err)
			}
			if len(page) == 0 {
				break
			}
			pages = append(pages, page...)
			after = page[len(page)-1]
		}
		if !slices.Equal(pages, want) {
			t.Errorf("pages under %s: got %v, want %v", id, pages, want)
		}
		if got, err := tx.KeysUnderKEK(id, custodian.KID{}, 0); err != nil || len(got) != 0 {
			t.Errorf("no keys asked for: got %v, %v", got, err)
		}
		if got, err := tx.KeysUnderKEK(custodian.KEKID{Category: "movies", Version: 2}, custodian.KID{}, 9); err != nil || len(got) != 0 {
			t.Errorf("keys under an unknown version: got %v, %v", got, err)
		}
		_, err = tx.KeysUnderKEK(custodian.KEKID{}, custodian.KID{}, 9)
		wantOnly(t, "no category", err, custodian.ErrInvalid)
	})
}

func doCursors(t *testing.T, s custodian.Store) {
	update(t, s, func(tx custodian.UpdateTx) error {
		for job, pos := range map[string][]byte{"rewrap": []byte("first"), "scan": {}, "gone": {1}, "never": nil} {
			if err := tx.PutCursor(job, pos); err != nil {
				return err
			}
		}
		return nil
	})
	update(t, s, func(tx custodian.UpdateTx) error {
		if err := tx.PutCursor("gone", nil); err != nil {
			return err
		}
		return tx.PutCursor("rewrap", []byte("second"))
	})
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.PutCursor("", []byte{1}) })
	wantOnly(t, "a job without a name", err, custodian.ErrInvalid)
}

func wantCursors(t *testing.T, s custodian.Store) {
	view(t, s, func(tx custodian.Tx) {
		for job, want := range map[string][]byte{"rewrap": []byte("second"), "scan": {}, "gone": nil, "never": nil} {
			got, err := tx.Cursor(job)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("cursor %q: got %#v, %v, want %#v", job, got, err, want)
			}
		}
		_, err := tx.Cursor("")
		wantOnly(t, "a job without a name", err, custodian.ErrInvalid)
	})
}

func doSequence(t *testing.T, s custodian.Store) {
	update(t, s, func(tx custodian.UpdateTx) error {
		if got := tx.Sequence(); got != 0 {
			t.Errorf("sequence of a new store: got %d, want 0", got)
		}
		for i := range uint32(3) {
			if err := tx.InsertContentKey(SealedKey(i, nil)); err != nil {
				return err
			}
			if got := tx.Sequence(); got != 1 {
				t.Errorf("sequence in the first inserting update: got %d, want 1", got)
			}
		}
		return nil
	})
	update(t, s, func(tx custodian.UpdateTx) error { return tx.PutCursor("rewrap", []byte{1}) })
	update(t, s, func(tx custodian.UpdateTx) error { return tx.PutHead(testHead) })
	update(t, s, func(tx custodian.UpdateTx) error {
		return tx.ReplaceContentKey(1, SealedKey(0, func(k *custodian.ContentKey) { k.Revision = 2 }))
	})
	_ = s.Update(t.Context(), func(tx custodian.UpdateTx) error { // fails as it is told to
		if err := tx.InsertContentKey(SealedKey(10, nil)); err != nil {
			return err
		}
		return errors.New("no")
	})
}

func wantSequence(t *testing.T, s custodian.Store) { wantStats(t, s, 3, 2) }

// fill writes one of everything.
func fill(tx custodian.UpdateTx) error {
	for _, err := range []error{
		tx.PutHead(control(0, "", "failed")),
		tx.PutInitJournal(custodian.InitJournal{MEKLabel: "failed"}),
		tx.PutControl(control(custodian.ControlMEK, "1", "failed")),
		tx.PutControl(control(custodian.ControlMEK, "2", "failed")),
		tx.DeleteControl(custodian.ControlMEK, "3"),
		tx.PutCursor("rewrap", []byte("failed")),
		tx.PutCursor("scan", nil),
		tx.ReplaceContentKey(1, replaced()),
		tx.InsertContentKey(SealedKey(2, nil)),
		tx.InsertContentKey(SealedKey(3, nil)),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

func beforeFailure(t *testing.T, s custodian.Store) {
	update(t, s, func(tx custodian.UpdateTx) error {
		for _, err := range []error{
			tx.PutHead(testHead),
			tx.PutControl(control(custodian.ControlMEK, "1", "a")),
			tx.PutControl(control(custodian.ControlMEK, "3", "c")),
			tx.PutCursor("rewrap", []byte("first")),
			tx.PutCursor("scan", []byte("kept")),
			tx.InsertContentKey(SealedKey(1, nil)),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func doFailedUpdate(t *testing.T, s custodian.Store) {
	beforeFailure(t, s)
	no := errors.New("no")
	err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
		if err := fill(tx); err != nil {
			return err
		}
		return no
	})
	if !errors.Is(err, no) {
		t.Errorf("failed update: got %v, want its own error", err)
	}
}

func doPanickingUpdate(t *testing.T, s custodian.Store) {
	beforeFailure(t, s)
	panics := func(f func(tx custodian.UpdateTx) error) (p any) {
		defer func() { p = recover() }()
		err := s.Update(t.Context(), f)
		t.Errorf("an update that panics returned %v", err)
		return nil
	}
	got := panics(func(tx custodian.UpdateTx) error {
		if err := fill(tx); err != nil {
			t.Errorf("fill: %v", err)
		}
		panic("one")
	})
	if got != "one" {
		t.Errorf("panic of an update: got %v, want its own", got)
	}
	got = panics(func(tx custodian.UpdateTx) error {
		if err := fill(tx); err != nil {
			t.Errorf("fill: %v", err)
		}
		return tx.Controls(func(custodian.ControlRecord) error { panic("two") })
	})
	if got != "two" {
		t.Errorf("panic in a listing: got %v, want its own", got)
	}
	func() {
		defer func() {
			if p := recover(); p != "three" {
				t.Errorf("panic of a view: got %v, want its own", p)
			}
		}()
		err := s.View(t.Context(), func(tx custodian.Tx) error {
			return tx.ContentKeys("movies", nil, nil, 9, func(custodian.SealedKey) error { panic("three") })
		})
		t.Errorf("a view that panics returned %v", err)
	}()
}

func wantFailedUpdate(t *testing.T, s custodian.Store) {
	wantKey(t, s, SealedKey(1, nil))
	wantStats(t, s, 1, 1)
	view(t, s, func(tx custodian.Tx) {
		if got, err := tx.Head(); err != nil || !reflect.DeepEqual(got, testHead) {
			t.Errorf("head: got %+v, %v, want %+v", got, err, testHead)
		}
		_, err := tx.InitJournal()
		wantOnly(t, "journal", err, custodian.ErrNotFound)
		if got, err := tx.Control(custodian.ControlMEK, "1"); err != nil || string(got.Body) != "a" {
			t.Errorf("control 1: got %q, %v, want a", got.Body, err)
		}
		_, err = tx.Control(custodian.ControlMEK, "2")
		wantOnly(t, "control 2", err, custodian.ErrNotFound)
		if got, err := tx.Control(custodian.ControlMEK, "3"); err != nil || string(got.Body) != "c" {
			t.Errorf("control 3: got %q, %v, want c", got.Body, err)
		}
		for job, want := range map[string]string{"rewrap": "first", "scan": "kept"} {
			if got, err := tx.Cursor(job); err != nil || string(got) != want {
				t.Errorf("cursor %s: got %q, %v, want %q", job, got, err, want)
			}
		}
		if got := list(t, tx, "movies", "", nil, 9); len(got) != 1 {
			t.Errorf("content keys: got %v, want one", got)
		}
		for version, want := range map[uint32]int{1: 1, 2: 0} {
			got, err := tx.KeysUnderKEK(custodian.KEKID{Category: "movies", Version: version}, custodian.KID{}, 9)
			if err != nil || len(got) != want {
				t.Errorf("keys under movies/%d: got %v, %v, want %d", version, got, err, want)
			}
		}
		for n := uint32(2); n < 4; n++ {
			k := SealedKey(n, nil)
			_, err := tx.ContentKey(k.Key.KID)
			wantOnly(t, "content key", err, custodian.ErrNotFound)
			_, err = tx.ContentCategory(k.Key.ContentID)
			wantOnly(t, "content item", err, custodian.ErrNotFound)
			_, err = tx.FingerprintOwner(k.Key.Fingerprint)
			wantOnly(t, "fingerprint", err, custodian.ErrNotFound)
		}
	})
}

func doReadYourWrites(t *testing.T, s custodian.Store) {
	insert(t, s, SealedKey(1, nil))
	update(t, s, func(tx custodian.UpdateTx) error {
		if err := tx.InsertContentKey(SealedKey(2, nil)); err != nil {
			return err
		}
		if err := tx.ReplaceContentKey(1, replaced()); err != nil {
			return err
		}
		got, err := tx.ContentKey(testKID(1))
		if err != nil {
			return err
		}
		compareKeys(t, got, replaced())
		wantOnly(t, "the same key again", tx.InsertContentKey(SealedKey(2, nil)), custodian.ErrNaturalKey)
		wantOnly(t, "the same revision again", tx.ReplaceContentKey(1, replaced()), custodian.ErrChanged)
		if got := list(t, tx, "movies", "", nil, 9); len(got) != 2 {
			t.Errorf("content keys within the update: got %v, want two", got)
		}
		if kids, err := tx.KeysUnderKEK(custodian.KEKID{Category: "movies", Version: 2}, custodian.KID{}, 9); err != nil || len(kids) != 1 {
			t.Errorf("keys under movies/2 within the update: got %v, %v, want one", kids, err)
		}
		return nil
	})
}

func wantReadYourWrites(t *testing.T, s custodian.Store) {
	wantKey(t, s, replaced())
	wantKey(t, s, SealedKey(2, nil))
	wantStats(t, s, 2, 2)
}

// doNoSharedMemory writes over everything that went into the store and came
// out of it.
func doNoSharedMemory(t *testing.T, s custodian.Store) {
	scribble := func(bs ...[]byte) {
		for _, b := range bs {
			for i := range b {
				b[i] = 0xee
			}
		}
	}
	var in []custodian.SealedKey
	var bodies [][]byte
	update(t, s, func(tx custodian.UpdateTx) error {
		k := insertedKeys()[1]
		r, h := control(custodian.ControlMEK, "1", "body"), custodian.ControlRecord{Body: []byte("head")}
		pos := []byte("position")
		in, bodies = append(in, k), append(bodies, r.Body, h.Body, pos)
		for _, err := range []error{
			tx.InsertContentKey(k), tx.PutControl(r), tx.PutHead(h), tx.PutCursor("rewrap", pos),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	for _, k := range in {
		scribble(k.Body, k.Sealed, k.Key.ContentID, k.Key.IV)
	}
	scribble(bodies...)
	view(t, s, func(tx custodian.Tx) {
		k, err := tx.ContentKey(testKID(2))
		if err != nil {
			t.Errorf("content key: %v", err)
		}
		r, err := tx.Control(custodian.ControlMEK, "1")
		if err != nil {
			t.Errorf("control: %v", err)
		}
		h, err := tx.Head()
		if err != nil {
			t.Errorf("head: %v", err)
		}
		pos, err := tx.Cursor("rewrap")
		if err != nil {
			t.Errorf("cursor: %v", err)
		}
		scribble(k.Body, k.Sealed, k.Key.ContentID, k.Key.IV, r.Body, h.Body, pos)
		err = tx.ContentKeys("live", nil, nil, 9, func(k custodian.SealedKey) error {
			scribble(k.Body, k.Sealed, k.Key.ContentID, k.Key.IV)
			return nil
		})
		if err != nil {
			t.Errorf("content keys: %v", err)
		}
	})
}

func wantNoSharedMemory(t *testing.T, s custodian.Store) {
	wantKey(t, s, insertedKeys()[1])
	view(t, s, func(tx custodian.Tx) {
		if r, err := tx.Control(custodian.ControlMEK, "1"); err != nil || string(r.Body) != "body" {
			t.Errorf("control: got %q, %v, want body", r.Body, err)
		}
		if h, err := tx.Head(); err != nil || string(h.Body) != "head" {
			t.Errorf("head: got %q, %v, want head", h.Body, err)
		}
		if pos, err := tx.Cursor("rewrap"); err != nil || string(pos) != "position" {
			t.Errorf("cursor: got %q, %v, want position", pos, err)
		}
	})
}

// doIsolation updates the store while a view of it is open. The update need
// not wait for the view, nor need it not: the view waits for neither.
func doIsolation(t *testing.T, s custodian.Store) {
	insert(t, s, SealedKey(1, nil))
	done := make(chan error, 1)
	view(t, s, func(tx custodian.Tx) {
		go func() {
			done <- s.Update(t.Context(), func(tx custodian.UpdateTx) error {
				if err := tx.ReplaceContentKey(1, replaced()); err != nil {
					return err
				}
				return tx.InsertContentKey(SealedKey(2, nil))
			})
		}()
		var err error
		select {
		case err = <-done:
			done <- err
		case <-time.After(100 * time.Millisecond):
		}
		got, err := tx.ContentKey(testKID(1))
		if err != nil {
			t.Errorf("content key: %v", err)
		} else {
			compareKeys(t, got, SealedKey(1, nil))
		}
		_, err = tx.ContentKey(testKID(2))
		wantOnly(t, "a key inserted after the view began", err, custodian.ErrNotFound)
		if got := list(t, tx, "movies", "", nil, 9); len(got) != 1 {
			t.Errorf("content keys: got %v, want one", got)
		}
		if got := tx.Sequence(); got != 1 {
			t.Errorf("sequence: got %d, want 1", got)
		}
	})
	if err := <-done; err != nil {
		t.Errorf("update beside a view: %v", err)
	}
}

func wantIsolation(t *testing.T, s custodian.Store) {
	wantKey(t, s, replaced())
	wantKey(t, s, SealedKey(2, nil))
	wantStats(t, s, 2, 2)
}

const (
	workers = 8
	rounds  = 12
)

// together runs f in workers at once.
func together(t *testing.T, f func(worker int) error) {
	t.Helper()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			if err := f(w); err != nil {
				t.Errorf("worker %d: %v", w, err)
			}
		})
	}
	wg.Wait()
}

var errOnPurpose = errors.New("fails on purpose")

// doConcurrentUpdates raises one counter from many sides, while others fail
// after they have written to it.
func doConcurrentUpdates(t *testing.T, s custodian.Store) {
	together(t, func(w int) error {
		for range rounds {
			err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
				pos, err := tx.Cursor("counter")
				if err != nil {
					return err
				}
				if pos == nil {
					pos = make([]byte, 8)
				}
				next := binary.BigEndian.AppendUint64(nil, binary.BigEndian.Uint64(pos)+1)
				if w == 0 {
					next = make([]byte, 8)
				}
				if err := tx.PutCursor("counter", next); err != nil {
					return err
				}
				if w == 0 {
					return errOnPurpose
				}
				return nil
			})
			if w == 0 && errors.Is(err, errOnPurpose) {
				continue
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func wantConcurrentUpdates(t *testing.T, s custodian.Store) {
	view(t, s, func(tx custodian.Tx) {
		pos, err := tx.Cursor("counter")
		if err != nil || len(pos) != 8 {
			t.Fatalf("counter: got %x, %v", pos, err)
		}
		if got, want := binary.BigEndian.Uint64(pos), uint64((workers-1)*rounds); got != want {
			t.Errorf("counter: got %d, want %d", got, want)
		}
	})
}

// doConcurrentInserts lets all workers fight for the same natural keys: each
// has one winner, and who loses finds the winner's key.
func doConcurrentInserts(t *testing.T, s custodian.Store) {
	var mu sync.Mutex
	won := map[string]int{}
	together(t, func(w int) error {
		for i := range rounds {
			k := SealedKey(uint32(1000*(w+1)+i), func(k *custodian.ContentKey) {
				k.ContentID = fmt.Appendf(nil, "contested-%d", i)
			})
			err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(k) })
			if err == nil {
				mu.Lock()
				won[string(k.Key.ContentID)]++
				mu.Unlock()
				continue
			}
			if !errors.Is(err, custodian.ErrNaturalKey) {
				return err
			}
			err = s.View(t.Context(), func(tx custodian.Tx) error {
				_, err := tx.HighestGeneration(k.Key.NaturalKey)
				return err
			})
			if err != nil {
				return fmt.Errorf("after a lost race: %w", err)
			}
		}
		return nil
	})
	for id, n := range won {
		if n != 1 {
			t.Errorf("%s: %d winners, want 1", id, n)
		}
	}
	if len(won) != rounds {
		t.Errorf("got winners for %d natural keys, want %d", len(won), rounds)
	}
}

func wantConcurrentInserts(t *testing.T, s custodian.Store) {
	wantStats(t, s, rounds, rounds)
	view(t, s, func(tx custodian.Tx) {
		if got := list(t, tx, "movies", "", nil, 1000); len(got) != rounds {
			t.Errorf("content keys: got %d, want %d", len(got), rounds)
		}
	})
}

func doContext(t *testing.T, s custodian.Store) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	ran := false
	err := s.Update(ended, func(custodian.UpdateTx) error {
		ran = true
		return nil
	})
	wantOnly(t, "update with an ended context", err, context.Canceled)
	err = s.View(ended, func(custodian.Tx) error {
		ran = true
		return nil
	})
	wantOnly(t, "view with an ended context", err, context.Canceled)
	if ran {
		t.Error("a function ran although its context had ended")
	}
	wantOnly(t, "backup with an ended context", s.Backup(ended, io.Discard), context.Canceled)
	_, err = s.Stats(ended)
	wantOnly(t, "stats with an ended context", err, context.Canceled)

	// One update holds the writer; another gives up waiting for it.
	holds, release, held := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var once sync.Once
	go func() {
		held <- s.Update(t.Context(), func(custodian.UpdateTx) error {
			once.Do(func() { close(holds) })
			<-release
			return nil
		})
	}()
	<-holds
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err = s.Update(short, func(tx custodian.UpdateTx) error { return tx.PutHead(testHead) })
	wantOnly(t, "update that waits too long", err, context.DeadlineExceeded)
	close(release)
	if err := <-held; err != nil {
		t.Errorf("update that held the writer: %v", err)
	}
}

// doBackup writes backups while the store is being written to.
func doBackup(t *testing.T, s custodian.Store) {
	for i := range uint32(20) {
		insert(t, s, SealedKey(i, nil))
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range uint32(20) {
			insert(t, s, SealedKey(100+i, nil))
		}
	})
	for range 3 {
		var b bytes.Buffer
		if err := s.Backup(t.Context(), &b); err != nil || b.Len() == 0 {
			t.Errorf("backup: got %d bytes, %v", b.Len(), err)
		}
	}
	wg.Wait()
	full := errors.New("the other side went away")
	err := s.Backup(t.Context(), failingWriter{full})
	wantOnly(t, "backup to a writer that fails", err, full)
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }
