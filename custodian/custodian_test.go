package custodian_test

import (
	"testing"

	"github.com/keycustody/custodian/custodian"
)

func TestIssueThenRelease(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	issued := w.issue("movies", "film-1", "SD", "HD", "AUDIO")
	for range 2 {
		for _, k := range issued {
			r := w.retrieve(provider, k.KID)
			if r.Err != nil {
				t.Fatal(r.Err)
			}
			if want := (custodian.KEKID{Category: "movies", Version: 1}); r.Info.KEK != want || r.Info.TrackType != k.TrackType {
				t.Errorf("metadata: got %v, want that of %v", r.Info, k.ContentKey)
			}
			if r.Receipt.LeafHash == [32]byte{} {
				t.Errorf("content key %s: released without a receipt", k.KID)
			}
			r.Key.Destroy()
		}
		again := w.issue("movies", "film-1", "SD", "HD", "AUDIO")
		for i := range again {
			if again[i].KID != issued[i].KID || again[i].Created {
				t.Errorf("asked again: got KID %s created %v, want %s", again[i].KID, again[i].Created, issued[i].KID)
			}
		}
		w.whole()
	}
}

func TestUnknownLooksLikeNotGranted(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	mine := w.issue("movies", "film-1", "SD")[0]
	other := w.issue("series", "show-1", "SD")[0]
	unknown := custodian.KID{1, 2, 3}
	wantErr(t, "granted", w.release(narrow, mine.KID), nil)
	wantErr(t, "of another category", w.release(narrow, other.KID), custodian.ErrDenied)
	wantErr(t, "unknown, to who may not know", w.release(narrow, unknown), custodian.ErrDenied)
	wantErr(t, "unknown, to who may know", w.release(provider, unknown), custodian.ErrKeyNotFound)
	wantErr(t, "to who has no grant", w.release(nobody, mine.KID), custodian.ErrDenied)
	wantErr(t, "unknown, to who has no grant", w.release(nobody, unknown), custodian.ErrDenied)
	wantErr(t, "packager asks the callback", w.release(packager, mine.KID), custodian.ErrDenied)
	for _, test := range []struct {
		what    string
		kid     custodian.KID
		content string
		want    error
	}{
		{"unknown, naming content of a granted category", unknown, "film-1", custodian.ErrKeyNotFound},
		{"unknown, naming content of another category", unknown, "show-1", custodian.ErrDenied},
		{"unknown, naming content that does not exist", unknown, "film-2", custodian.ErrDenied},
		{"known, naming its content", mine.KID, "film-1", nil},
		{"known, naming other content", mine.KID, "film-2", custodian.ErrDenied},
		{"of another category, naming its content", other.KID, "show-1", custodian.ErrDenied},
		{"of another category, naming granted content", other.KID, "film-1", custodian.ErrKeyNotFound},
	} {
		res, err := w.c.Retrieve(t.Context(), narrow, custodian.RetrieveRequest{KIDs: []custodian.KID{test.kid}, ContentID: custodian.ContentID(test.content)})
		if err != nil {
			t.Fatal(err)
		}
		wantErr(t, test.what, res[0].Err, test.want)
		res[0].Key.Destroy()
	}
	s, err := w.c.Status(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.Incidents, uint64(3); got != want {
		t.Errorf("unknown KIDs to who may know: got %d incidents, want %d", got, want)
	}
}
