package custodian_test

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/secret"
)

// bring makes an import of one key for each track, whose bytes are all b.
func (w *world) bring(cat custodian.CategoryName, content string, keys ...custodian.ImportKey) custodian.ImportRequest {
	return custodian.ImportRequest{Category: cat, ContentID: []byte(content), Keys: keys}
}

// foreign is a key made elsewhere: 16 bytes of b, with the KID that begins
// with kid.
func (w *world) foreign(track custodian.TrackType, kid, b byte) custodian.ImportKey {
	w.t.Helper()
	slot, err := w.c.Arena().Get()
	if err != nil {
		w.t.Fatal(err)
	}
	copy(slot, bytes.Repeat([]byte{b}, custodian.CEKSize))
	return custodian.ImportKey{KeySpec: custodian.KeySpec{TrackType: track, Scheme: custodian.SchemeCENC, KID: custodian.KID{kid}}, Key: secret.New(w.c.Arena(), slot, custodian.CEKSize)}
}

// take imports and destroys the keys.
func (w *world) take(who custodian.Caller, req custodian.ImportRequest) ([]custodian.ImportedKey, error) {
	w.t.Helper()
	keys, err := w.c.Import(w.t.Context(), who, req)
	for i := range req.Keys {
		req.Keys[i].Key.Destroy()
	}
	return keys, err
}

// actions are the entries from an index on, one line each.
func (w *world) actions(from uint64) []string {
	var lines []string
	for _, e := range w.entries(from) {
		outcome := cmp.Or(e.Reason, e.Outcome.String())
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", e.Action, outcome, e.TrackType, e.Detail)))
	}
	return lines
}

// An imported key is like one that was made here: a packager and a provider
// get it, and it survives a restart. The same import again changes nothing.
func TestImport(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	req := func() custodian.ImportRequest {
		hd := w.foreign("HD", 2, 0xb2)
		hd.Scheme, hd.IV = custodian.SchemeCBCS, bytes.Repeat([]byte{7}, 16)
		hd.Period = custodian.Period{Set: true, Index: 3, Start: w.now().UTC()}
		return w.bring("movies", "film-1", w.foreign("SD", 1, 0xa1), hd)
	}
	from := w.log.Stats().Entries
	keys, err := w.take(officer, req())
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range keys {
		if !k.Created || k.Origin != custodian.OriginImported || k.KID != (custodian.KID{byte(i + 1)}) || k.Receipt.Index == 0 {
			t.Errorf("key %d: got %+v", i, k)
		}
	}
	if got, want := w.actions(from), []string{"keys.import begun  2 keys", "kek.reserve", "keys.import allowed SD", "keys.import allowed HD"}; len(got) != 4 || got[0] != want[0] || !strings.HasPrefix(got[1], want[1]) || !slices.Equal(got[2:], want[2:]) {
		t.Errorf("audit: got %q, want %q", got, want)
	}
	again, err := w.take(officer, req())
	if err != nil || again[0].Created || again[1].Created || again[1].KID != keys[1].KID {
		t.Errorf("the same import again: got %+v, %v", again, err)
	}
	w.answered[custodian.KID{1}], w.answered[custodian.KID{2}] = bytes.Repeat([]byte{0xa1}, 16), bytes.Repeat([]byte{0xb2}, 16)
	if issued := w.issue("movies", "film-1", "SD"); issued[0].KID != keys[0].KID || issued[0].Created {
		t.Errorf("a packager gets %s, created %v, want the imported %s", issued[0].KID, issued[0].Created, keys[0].KID)
	}
	w.whole() // the provider gets the bytes that were brought
	r := w.retrieve(provider, custodian.KID{2})
	r.Key.Destroy()
	if r.Info.Origin != custodian.OriginImported || !bytes.Equal(r.Info.IV, bytes.Repeat([]byte{7}, 16)) || r.Info.Period != 3 || !r.Info.PeriodStart.Equal(w.now()) {
		t.Errorf("record: got %+v", r.Info)
	}
}

// What is in use otherwise is refused, and then nothing of the import is kept.
func TestImportConflicts(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	if _, err := w.take(officer, w.bring("movies", "film-1", w.foreign("SD", 1, 0xa1))); err != nil {
		t.Fatal(err)
	}
	made := w.issue("movies", "film-2", "SD")[0]
	w.whole()
	withIV := func(k custodian.ImportKey) custodian.ImportKey {
		k.Scheme, k.IV = custodian.SchemeCBCS, make([]byte, 16)
		return k
	}
	withKID := func(k custodian.ImportKey, kid custodian.KID) custodian.ImportKey { k.KID = kid; return k }
	if _, err := w.take(officer, w.bring("movies", "film-1", withIV(w.foreign("SD", 3, 0xa3)))); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		req  custodian.ImportRequest
		want error
		kid  custodian.KID
	}{
		{"the natural key with another KID", w.bring("movies", "film-1", w.foreign("SD", 9, 0xa1)), custodian.ErrKeyConflict, custodian.KID{9}},
		{"the natural key with another key", w.bring("movies", "film-1", w.foreign("SD", 1, 0x99)), custodian.ErrKeyConflict, custodian.KID{1}},
		{"the natural key of a key that was made here", w.bring("movies", "film-2", w.foreign("SD", 9, 0x99)), custodian.ErrKeyConflict, custodian.KID{9}},
		{"the natural key with another IV", w.bring("movies", "film-1", func() custodian.ImportKey {
			k := withIV(w.foreign("SD", 3, 0xa3))
			k.IV = bytes.Repeat([]byte{1}, 16)
			return k
		}()), custodian.ErrKeyConflict, custodian.KID{3}},
		{"a KID of other content", w.bring("movies", "film-9", w.foreign("SD", 1, 0x99)), custodian.ErrKIDConflict, custodian.KID{1}},
		{"a KID that was drawn here", w.bring("movies", "film-9", withKID(w.foreign("SD", 9, 0x99), made.KID)), custodian.ErrKIDConflict, made.KID},
		{"key bytes of other content", w.bring("movies", "film-9", w.foreign("SD", 9, 0xa1)), custodian.ErrKeyConflict, custodian.KID{9}},
		{"key bytes of another category", w.bring("series", "pilot", w.foreign("SD", 9, 0xa1)), custodian.ErrKeyConflict, custodian.KID{9}},
		{"content of another category", w.bring("series", "film-1", w.foreign("HD", 9, 0x99)), custodian.ErrContentCategory, custodian.KID{9}},
		{"the same key bytes twice", w.bring("movies", "film-9", w.foreign("SD", 8, 0x98), w.foreign("HD", 9, 0x98)), custodian.ErrKeyConflict, custodian.KID{9}},
		{"good keys beside a bad one", w.bring("movies", "film-9", w.foreign("SD", 8, 0x98), w.foreign("HD", 9, 0xa1)), custodian.ErrKeyConflict, custodian.KID{9}},
	} {
		t.Run(test.name, func(t *testing.T) {
			from := w.log.Stats().Entries
			_, err := w.take(officer, test.req)
			wantErr(t, "import", err, test.want)
			entries := w.entries(from)
			e := entries[len(entries)-1]
			if e.Action != "keys.import" || e.Outcome != audit.Failed || e.Reason != string(custodian.ReasonOf(test.want)) || !bytes.Equal(e.KID, test.kid[:]) {
				t.Errorf("audit: got %+v, want the KID %s", e, test.kid)
			}
			for _, kid := range []custodian.KID{{8}, {9}} {
				wantErr(t, "a key of the refused import", w.release(provider, kid), custodian.ErrKeyNotFound)
			}
		})
	}
	w.whole()
}

// TestImportRefused: who may not, and what is no import.
func TestImportRefused(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("frozen")
	w.freeze("frozen", custodian.CategoryFrozen)
	one := func(cat custodian.CategoryName) custodian.ImportRequest {
		return w.bring(cat, "film-1", w.foreign("SD", 1, 0xa1))
	}
	with := func(change func(*custodian.ImportKey)) custodian.ImportRequest {
		req := one("movies")
		change(&req.Keys[0])
		return req
	}
	for _, test := range []struct {
		name string
		who  custodian.Caller
		req  custodian.ImportRequest
		want error
	}{
		{"packager", packager, one("movies"), custodian.ErrDenied},
		{"provider", provider, one("movies"), custodian.ErrDenied},
		{"operator", operator, one("movies"), custodian.ErrDenied},
		{"auditor", auditor, one("movies"), custodian.ErrDenied},
		{"nobody", nobody, one("movies"), custodian.ErrDenied},
		{"unknown category", officer, one("none"), custodian.ErrCategoryNotFound},
		{"frozen category", officer, one("frozen"), custodian.ErrCategoryFrozen},
		{"no keys", officer, w.bring("movies", "film-1"), custodian.ErrInvalid},
		{"no KID", officer, with(func(k *custodian.ImportKey) { k.KID = custodian.KID{} }), custodian.ErrInvalid},
		{"no key", officer, with(func(k *custodian.ImportKey) { k.Key.Destroy() }), custodian.ErrInvalid},
		{"zero key", officer, with(func(k *custodian.ImportKey) { k.Key.Use(func(b []byte) { clear(b) }) }), custodian.ErrInvalid},
		{"an IV for cenc", officer, with(func(k *custodian.ImportKey) { k.IV = make([]byte, 16) }), custodian.ErrInvalid},
		{"a short IV", officer, with(func(k *custodian.ImportKey) { k.Scheme, k.IV = custodian.SchemeCBCS, make([]byte, 8) }), custodian.ErrInvalid},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := w.take(test.who, test.req)
			wantErr(t, "import", err, test.want)
		})
	}
	// The log cannot be written: the answer is no, and the next try finds the key.
	w.breaker.down("audit.Sync")
	_, err := w.take(officer, one("movies"))
	wantErr(t, "import without an audit log", err, custodian.ErrAuditBlocked)
	w.breaker.disarm()
	w.whole()
	if _, err := w.take(officer, one("movies")); err != nil {
		t.Error(err)
	}
	w.whole()
}

// Export gives the newest keys of one content item to an officer, each written
// down with its recipient; else nothing.
func TestExport(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.issue("movies", "film-1", "SD", "HD", "AUDIO")
	w.issue("movies", "film-2", "SD")
	req := custodian.ExportRequest{Category: "movies", ContentID: []byte("film-1"), Recipient: "alpha, certificate ab12"}
	from := w.log.Stats().Entries
	keys, err := w.c.Export(t.Context(), officer, req)
	if err != nil {
		t.Fatal(err)
	}
	if len(keys) != 3 {
		t.Errorf("got %d keys, want 3", len(keys))
	}
	for _, k := range keys {
		k.Key.Use(func(b []byte) {
			if !bytes.Equal(b, w.answered[k.KID]) {
				t.Errorf("content key %s: other bytes than the packager got", k.KID)
			}
		})
		k.Key.Destroy()
		if k.Receipt.Index < from {
			t.Errorf("content key %s: receipt %d is older than the export", k.KID, k.Receipt.Index)
		}
	}
	want := []string{"keys.export begun  3 keys, to alpha, certificate ab12", "keys.export allowed AUDIO to alpha, certificate ab12", "keys.export allowed HD to alpha, certificate ab12", "keys.export allowed SD to alpha, certificate ab12"}
	if got := w.actions(from); !slices.Equal(got, want) {
		t.Errorf("audit: got %q, want %q", got, want)
	}
	for _, test := range []struct {
		name   string
		who    custodian.Caller
		change func(*custodian.ExportRequest)
		want   error
	}{
		{"packager", packager, func(*custodian.ExportRequest) {}, custodian.ErrDenied},
		{"provider", provider, func(*custodian.ExportRequest) {}, custodian.ErrDenied},
		{"operator", operator, func(*custodian.ExportRequest) {}, custodian.ErrDenied},
		{"no such content", officer, func(r *custodian.ExportRequest) { r.ContentID = []byte("none") }, custodian.ErrKeyNotFound},
		{"no such category", officer, func(r *custodian.ExportRequest) { r.Category = "none" }, custodian.ErrCategoryNotFound},
		{"to nobody", officer, func(r *custodian.ExportRequest) { r.Recipient = "" }, custodian.ErrInvalid},
		{"audit log away", officer, func(*custodian.ExportRequest) { w.breaker.down("audit.Sync") }, custodian.ErrAuditBlocked},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := req
			test.change(&r)
			keys, err := w.c.Export(t.Context(), test.who, r)
			wantErr(t, "export", err, test.want)
			if keys != nil {
				t.Error("keys came with the error")
			}
			w.noneInClear()
		})
	}
	w.breaker.disarm()
	w.reopen()
	w.freeze("movies", custodian.CategoryFrozen)
	_, err = w.c.Export(t.Context(), officer, req)
	wantErr(t, "export of a frozen category", err, custodian.ErrCategoryFrozen)
	w.noneInClear()
}
