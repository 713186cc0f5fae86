package custodian_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// A secondKMS is a KMS beside the local one: it keeps the blob as it is, and
// answers what the test sets.
type secondKMS struct {
	name   string
	spoil  bool // Wrap keeps another blob than it was given
	unwrap error
	calls  int
}

func (k *secondKMS) Name() string { return k.name }

func (k *secondKMS) Wrap(_ context.Context, blob, _ []byte) (custodian.OuterWrap, error) {
	kept := bytes.Clone(blob)
	if k.spoil {
		kept[0] ^= 1
	}
	return custodian.OuterWrap{Provider: k.name, KeyRef: "key", Blob: kept}, nil
}

func (k *secondKMS) Unwrap(_ context.Context, w custodian.OuterWrap, _ []byte) ([]byte, error) {
	k.calls++
	return bytes.Clone(w.Blob), k.unwrap
}

func (k *secondKMS) Status() custodian.ProviderStatus { return custodian.ProviderStatus{Name: k.name} }
func (k *secondKMS) Close() error                     { return nil }

// Every layer of a new key is opened again before the key counts.
func TestWrapIsVerified(t *testing.T) {
	w := newWorld(t)
	second := &secondKMS{name: "second", spoil: true}
	w.cfg.Providers = append(w.cfg.Providers, second)
	w.reopen()
	create := func() error {
		_, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "movies", Providers: []string{"local", "second"}})
		return err
	}
	wantErr(t, "a KMS that spoils the blob", create(), custodian.ErrKMSUnavailable)
	second.spoil, second.unwrap = false, custodian.ErrProviderBlob
	wantErr(t, "a KMS that does not open what it made", create(), custodian.ErrProviderBlob)
	if cats, err := w.c.Categories(t.Context(), auditor); err != nil || len(cats) != 0 {
		t.Errorf("got categories %v and %v, want none", cats, err)
	}
	second.unwrap = nil
	wantErr(t, "a KMS in order", create(), nil)
	w.issue("movies", "film-1", "SD")
	w.whole()
	w.consistent()
}

// Any one of a key's providers opens it. What all of them say decides what
// the caller hears: an outage may end, a refused blob will not.
func TestTwoProviders(t *testing.T) {
	w := newWorld(t)
	second := &secondKMS{name: "second"}
	w.cfg.Providers = append(w.cfg.Providers, second)
	w.reopen()
	if _, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "movies", Providers: []string{"second", "local"}}); err != nil {
		t.Fatal(err)
	}
	kid := w.issue("movies", "film-1", "SD")[0].KID
	for _, test := range []struct {
		second    error
		localAway bool
		want      error
	}{
		{nil, false, nil},
		{nil, true, nil},
		{custodian.ErrProviderUnavailable, false, nil},
		{custodian.ErrProviderThrottled, false, nil},
		{custodian.ErrProviderBlob, false, nil},
		{custodian.ErrProviderUnavailable, true, custodian.ErrKMSUnavailable},
		{custodian.ErrProviderDenied, true, custodian.ErrKMSUnavailable},
		{custodian.ErrProviderDisabled, true, custodian.ErrKMSUnavailable},
		{custodian.ErrProviderBlob, true, custodian.ErrKMSUnavailable},
	} {
		w.reopen()
		second.unwrap = test.second
		if test.localAway {
			w.breaker.down("kms.Unwrap")
		}
		err := w.release(provider, kid)
		w.breaker.disarm()
		wantErr(t, "second says "+reason(test.second), err, test.want)
		if errors.Is(err, custodian.ErrRecordCorrupt) {
			t.Errorf("second says %v: got %v while another KMS is away", test.second, err)
		}
	}

	// Without the other provider, a refused blob is a damaged record.
	w.cfg.DefaultProviders = []string{"local"}
	second.unwrap = nil
	w.reopen()
	if _, err := w.c.CreateCategory(t.Context(), officer, custodian.CreateCategoryRequest{Name: "series", Providers: []string{"second"}}); err != nil {
		t.Fatal(err)
	}
	kid = w.issue("series", "show-1", "SD")[0].KID
	w.reopen()
	second.unwrap = custodian.ErrProviderBlob
	wantErr(t, "the only KMS refuses the blob", w.release(provider, kid), custodian.ErrRecordCorrupt)
	second.unwrap = nil
	w.whole()

	w.cfg.Providers = w.cfg.Providers[:1]
	w.reopen()
	wantErr(t, "the only KMS is not configured", w.release(provider, kid), custodian.ErrKMSUnavailable)
}

func reason(err error) string {
	if err == nil {
		return "nothing"
	}
	return err.Error()
}

// Readiness asks token and KMS, the KMS once a minute at most.
func TestReady(t *testing.T) {
	w := newWorld(t)
	wantErr(t, "all in order", w.c.Ready(t.Context()), nil)
	calls := w.breaker.count("kms.Unwrap")
	for range 5 {
		wantErr(t, "asked again", w.c.Ready(t.Context()), nil)
	}
	if got := w.breaker.count("kms.Unwrap") - calls; got != 0 {
		t.Errorf("within a minute the KMS was asked %d times again", got)
	}
	w.breaker.down("kms.Unwrap")
	wantErr(t, "the KMS went away just now", w.c.Ready(t.Context()), nil)
	w.advance(time.Minute)
	wantErr(t, "the KMS is away", w.c.Ready(t.Context()), custodian.ErrKMSUnavailable)
	w.breaker.disarm()
	w.advance(time.Minute - 1)
	wantErr(t, "the KMS is back, and not asked yet", w.c.Ready(t.Context()), custodian.ErrKMSUnavailable)
	w.advance(1)
	wantErr(t, "the KMS is back", w.c.Ready(t.Context()), nil)
	w.hsm.Fail("Health", custodian.ErrHSMUnavailable, 1)
	wantErr(t, "the token is away", w.c.Ready(t.Context()), custodian.ErrHSMUnavailable)
}
