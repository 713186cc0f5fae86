package custodian_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/store"
)

// The buckets of the store's file that an attacker would write to.
const (
	bucketMeta    = "meta" // the head lies under "head"
	bucketControl = "control"
	bucketContent = "content"
	bucketNatural = "natural"
)

// tamper writes to the file behind the store's back. The world is closed.
func (w *world) tamper(f func(tx *bolt.Tx) error) {
	w.t.Helper()
	w.close()
	db, err := bolt.Open(w.storePath(), 0o600, &bolt.Options{Timeout: time.Second, NoSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		w.t.Fatal(err)
	}
}

// rewrite changes records through the store, which keeps them opaque.
func (w *world) rewrite(f func(tx custodian.UpdateTx) error) {
	w.t.Helper()
	w.close()
	st, err := store.Open(w.t.Context(), w.storePath(), store.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := errors.Join(st.Update(w.t.Context(), f), st.Close()); err != nil {
		w.t.Fatal(err)
	}
}

// controls are the control records and the head, which is the last.
func (w *world) controls() []custodian.ControlRecord {
	w.t.Helper()
	var records []custodian.ControlRecord
	err := w.st.View(w.t.Context(), func(tx custodian.Tx) error {
		if err := tx.Controls(func(r custodian.ControlRecord) error {
			records = append(records, r)
			return nil
		}); err != nil {
			return err
		}
		head, err := tx.Head()
		records = append(records, head)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return records
}

func (w *world) control(kind custodian.ControlKind, name string) custodian.ControlRecord {
	w.t.Helper()
	for _, r := range w.controls() {
		if r.Kind == kind && r.Name == name {
			return r
		}
	}
	w.t.Fatalf("no control record %d %q", kind, name)
	return custodian.ControlRecord{}
}

// put writes a control record, or the head, as it is given.
func put(tx custodian.UpdateTx, r custodian.ControlRecord) error {
	if r.Kind == 0 {
		return tx.PutHead(r)
	}
	return tx.PutControl(r)
}

// attacked is a world with records of every kind, two of most, and what puts
// its store back.
func attacked(t *testing.T) (w *world, putBack func()) {
	t.Helper()
	w = newWorld(t)
	w.category("movies")
	w.category("series")
	w.issue("movies", "film-1", "SD", "HD")
	w.issue("series", "show-1", "SD")
	w.freeze("series", custodian.CategoryFrozen)
	w.freeze("series", custodian.CategoryOpen)
	if _, err := w.c.FreezeCaller(t.Context(), officer, custodian.FreezeCallerRequest{Identity: patient.ID, Cause: "stolen"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.c.Reencrypt(t.Context(), operator, custodian.ReencryptRequest{Category: "movies"}); err != nil { // a job that nobody runs
		t.Fatal(err)
	}
	if _, err := w.c.Revoke(t.Context(), operator, custodian.RevokeRequest{SessionID: "session-1", Cause: "shared"}); err != nil {
		t.Fatal(err)
	}
	return w, w.saveStore()
}

// refused opens the world, which must not open, with the given error.
func (w *world) refused(what string, want ...error) {
	w.t.Helper()
	err := w.open()
	if err == nil {
		w.t.Errorf("%s: it opens", what)
		return
	}
	for _, e := range want {
		if !errors.Is(err, e) {
			w.t.Errorf("%s: got %v, want %v", what, err, e)
		}
	}
}

func TestControlRecordFields(t *testing.T) {
	w, putBack := attacked(t)
	w.reopen()
	records := w.controls()
	for _, r := range records {
		bodies, err := custodian.AlterControl(r)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range bodies {
			altered := r
			altered.Body = a.Body
			w.rewrite(func(tx custodian.UpdateTx) error { return put(tx, altered) })
			w.refused(fmt.Sprintf("%d %s: field %s", r.Kind, r.Name, a.Field), refusalOf(r, a.Field))
			putBack()
		}
		for _, change := range []struct {
			field string
			f     func(*custodian.ControlRecord)
		}{
			{"MAC", func(r *custodian.ControlRecord) { r.MAC[15] ^= 1 }},
			{"MACVersion", func(r *custodian.ControlRecord) { r.MACVersion++ }},
			{"no body", func(r *custodian.ControlRecord) { r.Body = nil }},
			{"a byte too many", func(r *custodian.ControlRecord) { r.Body = append(bytes.Clone(r.Body), 0) }},
		} {
			altered := r
			change.f(&altered)
			w.rewrite(func(tx custodian.UpdateTx) error { return put(tx, altered) })
			w.refused(fmt.Sprintf("%d %s: %s", r.Kind, r.Name, change.field), custodian.ErrRecordCorrupt)
			putBack()
		}
	}
	w.whole()
}

// refusalOf is what a start says of a changed field. What is needed to load
// the MAC's own key speaks before the MAC can: the token refuses it.
func refusalOf(r custodian.ControlRecord, field string) error {
	if r.Name == "record/1" && field == ".Wrapped.Outer[0].Provider" {
		return custodian.ErrKMSUnavailable
	}
	if r.Name == "record/1" && field == ".State" {
		return custodian.ErrKeyState
	}
	if r.Kind == custodian.ControlMEK {
		switch field {
		case ".Label", ".ID":
			return custodian.ErrNoObject
		case ".Canary", ".Canary longer", ".Canary shorter":
			return custodian.ErrWrongMEK
		case ".State":
			return custodian.ErrKeyState
		}
	}
	return custodian.ErrRecordCorrupt
}

// Every byte of every control record as it lies in the file.
func TestControlRecordBytes(t *testing.T) {
	w, putBack := attacked(t)
	w.reopen()
	stride := 11
	if testing.Short() {
		stride = 37
	}
	flips := 0
	for _, r := range w.controls() {
		bucket, key := bucketControl, append([]byte{byte(r.Kind)}, r.Name...)
		if r.Kind == 0 {
			bucket, key = bucketMeta, []byte("head")
		}
		for at, size := 0, 1; at < size; at += stride {
			w.tamper(func(tx *bolt.Tx) error {
				v := bytes.Clone(tx.Bucket([]byte(bucket)).Get(key))
				size = len(v)
				v[at] ^= 1 << (at % 8)
				return tx.Bucket([]byte(bucket)).Put(key, v)
			})
			w.refused(fmt.Sprintf("%s: a bit of byte %d", r.Name, at))
			putBack()
			flips++
		}
	}
	if flips < 40 {
		t.Errorf("%d bytes were tried; the records were not read", flips)
	}
	w.whole()
}

func TestControlSet(t *testing.T) {
	w, _ := attacked(t)
	w.reopen()
	film := w.control(custodian.ControlCategory, "movies")
	show := w.control(custodian.ControlCategory, "series")
	filmKEK := w.control(custodian.ControlKEK, "movies/1")
	showKEK := w.control(custodian.ControlKEK, "series/1")
	head := w.control(0, "head")
	records := w.controls()

	// Everything below is genuine, and of an earlier time.
	w.freeze("movies", custodian.CategoryFrozen)
	w.close()
	frozen := w.saveStore()

	for _, test := range []struct {
		what string
		want error
		f    func(tx custodian.UpdateTx) error
	}{
		{"a freeze is taken back", custodian.ErrControlDigest, func(tx custodian.UpdateTx) error { return put(tx, film) }},
		{"the head is an older one", custodian.ErrControlDigest, func(tx custodian.UpdateTx) error { return put(tx, head) }},
		{"a freeze is taken back with its head", custodian.ErrStoreRollback, func(tx custodian.UpdateTx) error {
			return errors.Join(put(tx, film), put(tx, head))
		}},
		{"a category is dropped", custodian.ErrControlDigest, func(tx custodian.UpdateTx) error {
			return tx.DeleteControl(custodian.ControlCategory, "series")
		}},
		{"a category and its KEK are dropped", custodian.ErrControlDigest, func(tx custodian.UpdateTx) error {
			return errors.Join(tx.DeleteControl(custodian.ControlCategory, "series"), tx.DeleteControl(custodian.ControlKEK, "series/1"))
		}},
		{"a KEK is dropped", custodian.ErrControlDigest, func(tx custodian.UpdateTx) error { return tx.DeleteControl(custodian.ControlKEK, "movies/1") }},
		{"the signer is dropped", custodian.ErrControlDigest, func(tx custodian.UpdateTx) error { return tx.DeleteControl(custodian.ControlSigner, "audit/1") }},
		{"a helper is dropped", custodian.ErrControlDigest, func(tx custodian.UpdateTx) error {
			return tx.DeleteControl(custodian.ControlHelper, "pseudonym/1")
		}},
		{"the record helper is dropped", custodian.ErrRecordCorrupt, func(tx custodian.UpdateTx) error {
			return tx.DeleteControl(custodian.ControlHelper, "record/1")
		}},
		{"the MEK is dropped", custodian.ErrRecordCorrupt, func(tx custodian.UpdateTx) error { return tx.DeleteControl(custodian.ControlMEK, "mek/1") }},
		{"the head is dropped", custodian.ErrUninitialised, nil},
		{"a record under another name", custodian.ErrRecordCorrupt, func(tx custodian.UpdateTx) error {
			r := show
			r.Name = "shows"
			return put(tx, r)
		}},
		{"two categories swap their bodies", custodian.ErrRecordCorrupt, func(tx custodian.UpdateTx) error {
			a, b := film, show
			a.Body, b.Body = b.Body, a.Body
			return errors.Join(put(tx, a), put(tx, b))
		}},
		{"two categories swap their MACs", custodian.ErrRecordMAC, func(tx custodian.UpdateTx) error {
			a, b := swapMACs(film, show)
			return errors.Join(put(tx, a), put(tx, b))
		}},
		{"two KEKs swap their MACs", custodian.ErrRecordMAC, func(tx custodian.UpdateTx) error {
			a, b := swapMACs(filmKEK, showKEK)
			return errors.Join(put(tx, a), put(tx, b))
		}},
		{"the control set as it was before", custodian.ErrStoreRollback, func(tx custodian.UpdateTx) error {
			for _, r := range records {
				if err := put(tx, r); err != nil {
					return err
				}
			}
			return nil
		}},
	} {
		if test.f != nil {
			w.rewrite(test.f)
		} else {
			w.tamper(func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucketMeta)).Delete([]byte("head")) })
		}
		w.refused(test.what, test.want)
		frozen()
	}
	w.reopen()
	if cats, _ := w.c.Categories(t.Context(), auditor); len(cats) != 2 || cats[0].Mode != custodian.CategoryFrozen {
		t.Errorf("after all was put back: got %v, want movies frozen and series", cats)
	}
}

// swapMACs are two records with their MACs swapped.
func swapMACs(a, b custodian.ControlRecord) (custodian.ControlRecord, custodian.ControlRecord) {
	a.MAC, b.MAC = b.MAC, a.MAC
	return a, b
}

// A sealedRecord is the record of a content key as it lies in the file.
type sealedRecord struct {
	body, iv, sealed []byte
}

func readSealed(v []byte) sealedRecord {
	b := v[2:] // format and kind
	n, size := binary.Uvarint(b)
	r := sealedRecord{body: bytes.Clone(b[size : size+int(n)])}
	b = b[size+int(n):]
	r.iv = bytes.Clone(b[:12])
	n, size = binary.Uvarint(b[12:])
	r.sealed = bytes.Clone(b[12+size : 12+size+int(n)])
	return r
}

func (r sealedRecord) bytes() []byte {
	b := binary.AppendUvarint([]byte{1, 1}, uint64(len(r.body)))
	b = append(append(b, r.body...), r.iv...)
	return append(binary.AppendUvarint(b, uint64(len(r.sealed))), r.sealed...)
}

// alterCEK changes the record of a content key in the file.
func (w *world) alterCEK(kid custodian.KID, f func(r *sealedRecord)) {
	w.t.Helper()
	w.tamper(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(bucketContent))
		v := bytes.Clone(b.Get(kid[:]))
		r := readSealed(v)
		if !bytes.Equal(r.bytes(), v) {
			return errors.New("the test does not know how a content key lies in the file")
		}
		f(&r)
		return b.Put(kid[:], r.bytes())
	})
}

func TestContentKeyFields(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	keys := w.issueReq(custodian.IssueRequest{Category: "movies", ContentID: []byte("film-1"), Keys: []custodian.KeySpec{{TrackType: "SD", Scheme: custodian.SchemeCBCS,
		Period: custodian.Period{Set: true, Index: 7, Start: w.now(), End: w.now().Add(time.Hour)}}}})
	kid := keys[0].KID
	putBack := w.saveStore()
	var body []byte
	w.alterCEK(kid, func(r *sealedRecord) { body = r.body })
	alterations, err := custodian.AlterContentKey(body)
	if err != nil {
		t.Fatal(err)
	}
	changes := map[string]func(r *sealedRecord){
		"Category to one that exists": func(r *sealedRecord) {
			k, _ := custodian.DecodeContentKey(r.body)
			k.Category = "series"
			r.body = custodian.EncodeContentKey(k)
		},
		"KEK to another that exists": func(r *sealedRecord) {
			k, _ := custodian.DecodeContentKey(r.body)
			k.KEK.Category = "series"
			r.body = custodian.EncodeContentKey(k)
		},
		"cut short": func(r *sealedRecord) { r.sealed = r.sealed[:31] },
		"no tag":    func(r *sealedRecord) { r.sealed = r.sealed[:16] },
		"longer":    func(r *sealedRecord) { r.sealed = append(r.sealed, 0) },
	}
	for _, a := range alterations {
		changes["field "+a.Field] = func(r *sealedRecord) { r.body = a.Body }
	}
	for i := range 12 {
		changes[fmt.Sprintf("IV byte %d", i)] = func(r *sealedRecord) { r.iv[i] ^= 0x80 }
	}
	for i := range 32 {
		changes[fmt.Sprintf("sealed byte %d", i)] = func(r *sealedRecord) { r.sealed[i] ^= 1 }
	}
	for what, change := range changes {
		putBack()
		w.alterCEK(kid, change)
		w.reopen()
		wantErr(t, what, w.release(provider, kid), custodian.ErrRecordCorrupt)
		if err := w.release(narrow, kid); err == nil {
			t.Errorf("%s: it is released to a provider of movies", what)
		}
		w.noneInClear()
	}
	putBack()
	w.whole()
}

func TestContentKeysSwapped(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	keys := w.issue("movies", "film-1", "SD", "HD")
	one, two := keys[0].KID, keys[1].KID
	putBack := w.saveStore()
	records := map[custodian.KID]sealedRecord{}
	for _, kid := range []custodian.KID{one, two} {
		w.alterCEK(kid, func(r *sealedRecord) { records[kid] = *r })
	}
	for _, test := range []struct {
		what string
		f    func(to *sealedRecord, from sealedRecord)
	}{
		{"records", func(to *sealedRecord, from sealedRecord) { *to = from }},
		{"sealed parts", func(to *sealedRecord, from sealedRecord) { to.iv, to.sealed = from.iv, from.sealed }},
		{"sealed parts without IV", func(to *sealedRecord, from sealedRecord) { to.sealed = from.sealed }},
	} {
		w.alterCEK(one, func(r *sealedRecord) { test.f(r, records[two]) })
		w.alterCEK(two, func(r *sealedRecord) { test.f(r, records[one]) })
		w.reopen()
		for _, kid := range []custodian.KID{one, two} {
			wantErr(t, test.what+" swapped", w.release(provider, kid), custodian.ErrRecordCorrupt)
		}
		_, err := w.c.Issue(t.Context(), packager, ask("movies", "film-1", "SD", "HD"))
		wantErr(t, test.what+" swapped, asked for again", err, custodian.ErrRecordCorrupt)
		w.noneInClear()
		putBack()
	}
	w.whole()
}

// A key of another custody that shares the token does not open in this one.
func TestContentKeyOfAnotherCustody(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.issue("movies", "film-1", "SD")
	kid := w.contentKeys()[0].Key.KID
	other := newWorld(t)
	other.category("movies")
	other.issueReq(custodian.IssueRequest{Category: "movies", ContentID: []byte("film-1"),
		Keys: []custodian.KeySpec{{TrackType: "SD", Scheme: custodian.SchemeCENC, KID: kid}}})
	var foreign sealedRecord
	other.alterCEK(kid, func(r *sealedRecord) { foreign = *r })
	w.alterCEK(kid, func(r *sealedRecord) { *r = foreign })
	w.reopen()
	wantErr(t, "release", w.release(provider, kid), custodian.ErrRecordCorrupt)
}

func TestNaturalIndex(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	keys := w.issue("movies", "film-1", "SD", "HD")
	putBack := w.saveStore()
	for what, value := range map[string][]byte{
		"names another key":           keys[1].KID[:],
		"names a key that is unknown": bytes.Repeat([]byte{7}, custodian.KIDSize),
		"names no KID":                []byte("?"),
	} {
		w.tamper(func(tx *bolt.Tx) error {
			b := tx.Bucket([]byte(bucketNatural))
			return b.ForEach(func(k, v []byte) error {
				if bytes.Equal(v, keys[0].KID[:]) {
					return b.Put(bytes.Clone(k), value)
				}
				return nil
			})
		})
		w.reopen()
		_, err := w.c.Issue(t.Context(), packager, ask("movies", "film-1", "SD"))
		wantErr(t, "issue where the index "+what, err, custodian.ErrRecordCorrupt)
		_, _, err = w.c.ListContentKeys(t.Context(), auditor, custodian.ListRequest{Category: "movies"})
		wantErr(t, "list where the index "+what, err, custodian.ErrRecordCorrupt)
		wantErr(t, "the other key where the index "+what, w.release(provider, keys[1].KID), nil)
		putBack()
	}
	w.whole()
}

func TestStoreRollback(t *testing.T) {
	for _, test := range []struct {
		what  string
		since func(w *world)
	}{
		{"content keys were added", func(w *world) { w.issue("movies", "film-2", "SD") }},
		{"a category was frozen", func(w *world) { w.freeze("movies", custodian.CategoryFrozen) }},
		{"a category was made", func(w *world) { w.category("series") }},
		{"both changed", func(w *world) { w.category("series"); w.issue("series", "show-1", "SD") }},
	} {
		w := newWorld(t)
		w.category("movies")
		w.issue("movies", "film-1", "SD") // reserves a block, so that the next issue changes no control record
		old := w.backup()
		test.since(w)
		w.close()
		later := readFile(t, w.storePath())
		writeFile(t, w.storePath(), old)
		w.refused("an older store since which "+test.what, custodian.ErrStoreRollback, custodian.ErrRecordCorrupt)
		writeFile(t, w.storePath(), later)
		w.reopen()
	}
}

func TestLogRollback(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.close()
	path := filepath.Join(w.auditDir(), "audit.log")
	old := readFile(t, path)

	// The one change that a crash may keep from the log is written down late.
	w.reopen()
	w.category("series")
	w.close()
	later := readFile(t, path)
	writeFile(t, path, old)
	w.reopen()
	var recovered bool
	for _, e := range w.entries(0) {
		recovered = recovered || strings.Contains(e.Detail, "written by the next start")
	}
	if !recovered {
		t.Error("the log was behind by one change, and nothing says that it was brought up to date")
	}
	w.close()

	writeFile(t, path, later)
	w.reopen()
	w.category("sports")
	w.close()
	writeFile(t, path, old)
	w.refused("a log that is two changes behind", custodian.ErrLogRollback, custodian.ErrRecordCorrupt)
}

func TestLogOfAnotherCustody(t *testing.T) {
	for _, test := range []struct {
		what          string
		changes, more int // control changes of this custody and of the other
		want          error
	}{
		{"as long", 1, 1, custodian.ErrStoreRollback},
		{"longer", 1, 4, custodian.ErrStoreRollback},
		{"shorter by the one change that a crash may keep from it", 2, 1, custodian.ErrLogRollback},
		{"shorter", 4, 1, custodian.ErrLogRollback},
	} {
		w, other := newWorld(t), newWorld(t)
		for i := range test.changes {
			w.category(custodian.CategoryName(fmt.Sprintf("category-%d", i)))
		}
		for i := range test.more {
			other.category(custodian.CategoryName(fmt.Sprintf("category-%d", i)))
		}
		w.close()
		other.close()
		writeFile(t, filepath.Join(w.auditDir(), "audit.log"), readFile(t, filepath.Join(other.auditDir(), "audit.log")))
		w.refused("the log of another custody, "+test.what, test.want)
	}
}

func TestStoreOfAnotherCustody(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	w.category("movies")
	other.category("movies")
	w.close()
	other.close()
	writeFile(t, w.storePath(), readFile(t, other.storePath()))
	w.refused("another custody's store", custodian.ErrNoObject)

	// Two custodies share a token under two prefixes.
	second := bareWorld(t)
	second.hsm, second.cfg.HSM, second.cfg.LabelPrefix = w.hsm, w.cfg.HSM, "second"
	second.openParts()
	if err := custodian.Init(t.Context(), second.cfg, custodian.InitSpec{}); err != nil {
		t.Fatal(err)
	}
	second.reopen()
	second.category("movies")
	second.close()
	writeFile(t, w.storePath(), readFile(t, second.storePath()))
	w.refused("another custody's store in the same token", custodian.ErrStoreRollback)
}

func TestTokenObjects(t *testing.T) {
	w := newWorld(t)
	mek := w.mek()
	t.Run("unknown", func(t *testing.T) {
		w.hsm.AddObject(custodian.TokenObject{Class: "secret key", Label: "somebody", ID: []byte{9}})
		w.reopen()
		s, err := w.c.Status(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		if len(s.UnknownObjects) != 1 || s.UnknownObjects[0].Label != "somebody" {
			t.Errorf("unknown objects: got %v, want the one of somebody", s.UnknownObjects)
		}
	})
	t.Run("two of one ID", func(t *testing.T) {
		w.hsm.AddObject(custodian.TokenObject{Class: "secret key", Label: "another", ID: mek.ID})
		w.refused("an object with the MEK's ID under another label", custodian.ErrWrongMEK)
	})
}

func TestTokenLosesMEK(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.issue("movies", "film-1", "SD")
	mek := w.mek()
	w.hsm.ReplaceMEK(mek.Label, [16]byte(mek.ID))
	w.refused("the token holds another MEK", custodian.ErrWrongMEK)
	w.hsm.RemoveMEK(mek.Label, [16]byte(mek.ID))
	w.refused("the token holds no MEK", custodian.ErrNoObject)
	w.openParts()
	if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{}); err == nil {
		t.Error("init makes a new MEK for a store whose MEK is lost")
	}
}

// A head that is taken away, and a journal in its place that names the MEK in
// use, do not make init destroy that MEK.
func TestInitKeepsMEKInUse(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.issue("movies", "film-1", "SD")
	mek := w.mek()
	journal := custodian.InitJournal{StoreID: [16]byte{1}, MEKLabel: mek.Label, MEKID: [16]byte(mek.ID), Profile: custodian.ProfileSealed,
		Start: w.now(), End: w.now().Add(custodian.MEKPeriod), SignLbl: "mek-audit-v1", SignID: [16]byte{2}}
	putBack := w.saveStore()
	for _, test := range []struct {
		what   string
		tamper func()
		logged bool // the audit log is there
	}{
		{"the head is gone", func() {}, true},
		{"the head and the log are gone", func() {}, false},
		{"all control records and the head are gone", func() {
			w.tamper(func(tx *bolt.Tx) error {
				if err := tx.DeleteBucket([]byte(bucketControl)); err != nil {
					return err
				}
				_, err := tx.CreateBucket([]byte(bucketControl))
				return err
			})
		}, true},
	} {
		w.rewrite(func(tx custodian.UpdateTx) error { return tx.PutInitJournal(journal) })
		w.tamper(func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucketMeta)).Delete([]byte("head")) })
		test.tamper()
		w.refused(test.what, custodian.ErrUninitialised)
		w.openParts()
		cfg := w.cfg
		if !test.logged {
			cfg.Logged = custodian.Logged{}
		}
		if err := custodian.Init(t.Context(), cfg, custodian.InitSpec{}); err == nil {
			t.Errorf("%s: init begins anew", test.what)
		}
		putBack()
		w.reopen()
	}
	w.whole()
	w.consistent()
}

// mek is the token object of MEK v1.
func (w *world) mek() custodian.TokenObject {
	w.t.Helper()
	objects, err := w.hsm.Objects(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, o := range objects {
		if o.Label == "mek-v1" {
			return o
		}
	}
	w.t.Fatal("the token holds no MEK")
	return custodian.TokenObject{}
}
