package custodian_test

import (
	"testing"

	"github.com/keycustody/custodian/custodian"
)

func TestKeyPeriods(t *testing.T) {
	w := newWorld(t)
	w.category("movies")
	w.category("series")
	req := custodian.IssueRequest{Category: "movies", ContentID: custodian.ContentID("channel")}
	for _, index := range []uint32{0, 1, 2, 4} { // 3 is not there yet
		for _, track := range []custodian.TrackType{"AUDIO", "HD"} {
			for _, scheme := range []custodian.Scheme{custodian.SchemeCBCS, custodian.SchemeCENC} {
				req.Keys = append(req.Keys, custodian.KeySpec{TrackType: track, Scheme: scheme, Period: custodian.Period{Set: true, Index: index,
					Start: w.now().Add(1000), End: w.now().Add(2000)}})
			}
		}
	}
	byIndex := map[uint32]custodian.KID{}
	for _, k := range w.issueReq(req) {
		if k.TrackType == "AUDIO" && k.Scheme == custodian.SchemeCENC {
			byIndex[k.Period] = k.KID
		}
	}
	single := w.issue("movies", "film", "HD")[0].KID
	foreign := w.issue("series", "show", "HD")[0].KID

	for _, test := range []struct {
		name  string
		from  uint32
		limit int
		want  []uint32
	}{
		{"all", 0, 64, []uint32{0, 1, 2, 4}},
		{"from the middle", 1, 64, []uint32{1, 2, 4}},
		{"the last", 4, 64, []uint32{4}},
		{"the next", 1, 2, []uint32{1, 2}},
		{"itself", 1, 1, []uint32{1}},
	} {
		got, err := w.c.KeyPeriods(t.Context(), provider, custodian.KeyPeriodsRequest{RequestID: "r", KID: byIndex[test.from], Limit: test.limit})
		if err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		if len(got) != len(test.want) {
			t.Fatalf("%s: got %d periods, want %v", test.name, len(got), test.want)
		}
		for i, k := range got {
			if k.Period != test.want[i] || k.KID != byIndex[test.want[i]] || k.PeriodStart.IsZero() || k.PeriodEnd.IsZero() {
				t.Errorf("%s: place %d: got period %d with KID %s from %s, want %d with %s", test.name, i, k.Period, k.KID, k.PeriodStart, test.want[i], byIndex[test.want[i]])
			}
		}
	}
	if got, err := w.c.KeyPeriods(t.Context(), provider, custodian.KeyPeriodsRequest{RequestID: "", KID: single, Limit: 64}); err != nil || len(got) != 1 || got[0].KID != single {
		t.Errorf("a key without a period: got %v and %v, want itself", got, err)
	}

	for _, test := range []struct {
		name  string
		who   custodian.Caller
		kid   custodian.KID
		limit int
		want  error
	}{
		{"unknown, to who may know", provider, custodian.KID{9}, 1, custodian.ErrKeyNotFound},
		{"unknown, to who may not", narrow, custodian.KID{9}, 1, custodian.ErrDenied},
		{"another category", narrow, foreign, 1, custodian.ErrDenied},
		{"a packager", packager, single, 1, custodian.ErrDenied},
		{"nobody", nobody, single, 1, custodian.ErrDenied},
		{"none", provider, single, 0, custodian.ErrInvalid},
		{"too many", provider, single, 65, custodian.ErrInvalid},
	} {
		from := w.log.Size()
		_, err := w.c.KeyPeriods(t.Context(), test.who, custodian.KeyPeriodsRequest{RequestID: "r", KID: test.kid, Limit: test.limit})
		wantErr(t, test.name, err, test.want)
		if entries := w.entries(from); test.want != custodian.ErrInvalid && (len(entries) != 1 || entries[0].RequestID != "r" || string(entries[0].KID) != string(test.kid[:])) {
			t.Errorf("%s: the log has %+v, want one refusal", test.name, entries)
		}
	}
	for _, op := range []string{"store.ContentKey", "store.View"} {
		w.breaker.down(op)
		_, err := w.c.KeyPeriods(t.Context(), provider, custodian.KeyPeriodsRequest{RequestID: "r", KID: single, Limit: 1})
		if w.breaker.disarm() {
			wantErr(t, op+" is away", err, custodian.ErrStoreUnavailable)
		}
	}
	w.freeze("movies", custodian.CategoryFrozen)
	_, err := w.c.KeyPeriods(t.Context(), provider, custodian.KeyPeriodsRequest{RequestID: "r", KID: single, Limit: 1})
	wantErr(t, "a frozen category", err, custodian.ErrCategoryFrozen)
}

// TestKeyPeriodsToken: where a release needs a licence token, so does the
// schedule of its key, and it is no use of the token.
func TestKeyPeriodsToken(t *testing.T) {
	w := newTokenWorld(t, nil)
	ask := func(who custodian.Caller, kid custodian.KID, token string) error {
		keys, err := w.c.KeyPeriods(t.Context(), who, custodian.KeyPeriodsRequest{KID: kid, Limit: 1, LicenceToken: token})
		if err == nil && (len(keys) != 1 || keys[0].KID != kid) {
			t.Errorf("got %+v, want the one key", keys)
		}
		return err
	}
	good := w.token(nil)
	wantErr(t, "no token", ask(provider, w.hd, ""), custodian.ErrTokenMissing)
	wantErr(t, "for another track", ask(provider, w.sd, good), custodian.ErrTokenMismatch)
	wantErr(t, "expired", ask(provider, w.hd, w.token(map[string]any{"iat": w.now().Unix() - 100, "exp": w.now().Unix() - 70})), custodian.ErrTokenExpired)
	wantErr(t, "not granted", ask(nobody, w.hd, good), custodian.ErrDenied)
	for range 5 {
		wantErr(t, "a good token", ask(provider, w.hd, good), nil)
	}
	for range 3 {
		wantErr(t, "its uses", w.show(provider, w.hd, good), nil)
	}
	wantErr(t, "beyond its uses", w.show(provider, w.hd, good), custodian.ErrTokenReplayed)
	from := w.logSize()
	w.revoke(custodian.RevokeRequest{SessionID: "session-1"})
	wantErr(t, "a revoked session", ask(provider, w.hd, w.token(nil)), custodian.ErrTokenRevoked)
	if e := w.entries(from); e[len(e)-1].Reason != "TOKEN_REVOKED" || len(e[len(e)-1].Refs) != 1 {
		t.Errorf("the log has %+v, want the refusal with the session's hash", e[len(e)-1])
	}
}
