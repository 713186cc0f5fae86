package custodiantest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

// TestProvider runs the conformance suite that every custodian.Provider
// passes. Each call of open returns a provider of the same name with a KMS
// key of its own. What an outer layer must refuse is asked of those only that
// say in their status that they have one.
func TestProvider(t *testing.T, open func(t *testing.T) custodian.Provider) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, p, other custodian.Provider)
	}{
		{"RoundTrip", testWrapRoundTrip},
		{"Refuses", testProviderRefuses},
		{"EveryByteCounts", testEveryByte},
		{"EmptyArguments", testEmptyArguments},
		{"EndedContext", testProviderEndedContext},
		{"Concurrent", testProviderConcurrent},
		{"Rewrap", testRewrap},
		{"Status", testProviderStatus},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, other := open(t), open(t)
			defer closeProvider(t, p)
			defer closeProvider(t, other)
			test.run(t, p, other)
		})
	}
}

func closeProvider(t *testing.T, p custodian.Provider) {
	if err := p.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// What is wrapped in the tests has the size of an AES-256 key under KWP.
var (
	innerBlob   = bytes.Repeat([]byte{0x5a}, 40)
	wrapContext = []byte("kek movies/1")
)

func wrap(t testing.TB, p custodian.Provider, blob, context []byte) custodian.OuterWrap {
	t.Helper()
	w, err := p.Wrap(t.Context(), blob, context)
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	return w
}

func wantOpens(t testing.TB, what string, p custodian.Provider, w custodian.OuterWrap, context, want []byte) {
	t.Helper()
	got, err := p.Unwrap(t.Context(), w, context)
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got other bytes than were wrapped", what)
	}
}

func testWrapRoundTrip(t *testing.T, p, _ custodian.Provider) {
	for _, size := range []int{1, 40, 4000} {
		blob := bytes.Repeat([]byte{0x5a}, size)
		given := bytes.Clone(blob)
		first, second := wrap(t, p, given, wrapContext), wrap(t, p, given, wrapContext)
		clear(given) // the caller's bytes are the caller's again
		if got, want := first.Provider, p.Name(); got != want {
			t.Errorf("provider of a wrap: got %q, want %q", got, want)
		}
		if got, want := first.KeyRef, p.Status().KeyRef; got != want {
			t.Errorf("key reference of a wrap: got %q, want %q", got, want)
		}
		if p.Status().OuterLayer && size > 1 && bytes.Contains(first.Blob, blob) {
			t.Errorf("wrap %d bytes: they show in the blob", size)
		}
		wantOpens(t, fmt.Sprintf("open %d bytes", size), p, first, wrapContext, blob)
		wantOpens(t, fmt.Sprintf("open %d bytes wrapped again", size), p, second, wrapContext, blob)
		got, err := p.Unwrap(t.Context(), first, wrapContext)
		if err != nil {
			t.Fatalf("open again: %v", err)
		}
		clear(got) // what is returned is no part of the wrap
		wantOpens(t, "open after the caller has cleared what it got", p, first, wrapContext, blob)
	}
}

func testProviderRefuses(t *testing.T, p, other custodian.Provider) {
	w := wrap(t, p, innerBlob, wrapContext)
	foreign := w
	foreign.Provider = "somebody-else"
	_, err := p.Unwrap(t.Context(), foreign, wrapContext)
	wantError(t, "open a blob that another provider wrapped", err, custodian.ErrProviderBlob)
	if !p.Status().OuterLayer {
		return // it cannot tell the rest, and says so
	}
	garbage := w
	garbage.Blob = []byte("no ciphertext")
	for _, test := range []struct {
		name    string
		w       custodian.OuterWrap
		context []byte
	}{
		{"another record's context", w, []byte("kek movies/2")},
		{"a longer context", w, append(bytes.Clone(wrapContext), 0)},
		{"a shorter context", w, wrapContext[:len(wrapContext)-1]},
		{"a blob of another key", wrap(t, other, innerBlob, wrapContext), wrapContext},
		{"a blob that is none", garbage, wrapContext},
	} {
		_, err := p.Unwrap(t.Context(), test.w, test.context)
		wantError(t, "open with "+test.name, err, custodian.ErrProviderBlob)
	}
	wantOpens(t, "open after the refusals", p, w, wrapContext, innerBlob)
}

// testEveryByte changes each byte of a blob in turn. A blob may have a byte
// that carries nothing (the version zero of a key, slack bits of base64), but
// no change makes it open to other bytes.
func testEveryByte(t *testing.T, p, _ custodian.Provider) {
	if !p.Status().OuterLayer {
		t.Skip("the provider has no outer layer, and says so")
	}
	w := wrap(t, p, innerBlob, wrapContext)
	refused := 0
	for i := range w.Blob {
		changed := w
		changed.Blob = flip(w.Blob, i)
		got, err := p.Unwrap(t.Context(), changed, wrapContext)
		switch {
		case errors.Is(err, custodian.ErrProviderBlob), errors.Is(err, custodian.ErrProviderDisabled):
			refused++
		case err != nil:
			t.Errorf("open with byte %d changed: got %v, want %v", i, err, custodian.ErrProviderBlob)
		case !bytes.Equal(got, innerBlob):
			t.Errorf("open with byte %d changed: it opens to other bytes", i)
		}
	}
	if refused < len(w.Blob)-4 {
		t.Errorf("changed bytes that are refused: got %d of %d", refused, len(w.Blob))
	}
}

func testEmptyArguments(t *testing.T, p, _ custodian.Provider) {
	w := wrap(t, p, innerBlob, wrapContext)
	empty := w
	empty.Blob = nil
	_, err := p.Wrap(t.Context(), nil, wrapContext)
	wantError(t, "wrap nothing", err, custodian.ErrProviderBlob)
	_, err = p.Wrap(t.Context(), innerBlob, nil)
	wantError(t, "wrap without a context", err, custodian.ErrProviderBlob)
	_, err = p.Unwrap(t.Context(), empty, wrapContext)
	wantError(t, "open nothing", err, custodian.ErrProviderBlob)
	_, err = p.Unwrap(t.Context(), w, nil)
	wantError(t, "open without a context", err, custodian.ErrProviderBlob)
}

func testProviderEndedContext(t *testing.T, p, _ custodian.Provider) {
	w := wrap(t, p, innerBlob, wrapContext)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := p.Wrap(ended, innerBlob, wrapContext)
	wantError(t, "wrap", err, custodian.ErrProviderUnavailable)
	wantError(t, "wrap", err, context.Canceled)
	_, err = p.Unwrap(ended, w, wrapContext)
	wantError(t, "open", err, custodian.ErrProviderUnavailable)
	wantError(t, "open", err, context.Canceled)
	if !p.Status().Reachable {
		t.Error("status: a caller that gave up makes the provider unreachable")
	}
	wantOpens(t, "open after that", p, w, wrapContext, innerBlob)
}

func testProviderConcurrent(t *testing.T, p, _ custodian.Provider) {
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			context, blob := fmt.Appendf(nil, "kek movies/%d", i), bytes.Repeat([]byte{byte(i + 1)}, 40)
			w, err := p.Wrap(t.Context(), blob, context)
			if err != nil {
				t.Errorf("wrap %d: %v", i, err)
				return
			}
			wantOpens(t, fmt.Sprintf("open %d", i), p, w, context, blob)
		})
	}
	all.Wait()
}

func testRewrap(t *testing.T, p, other custodian.Provider) {
	r, ok := p.(custodian.Rewrapper)
	if !ok {
		t.Skip("the provider is no Rewrapper")
	}
	w := wrap(t, p, innerBlob, wrapContext)
	moved, err := r.Rewrap(t.Context(), w, wrapContext)
	if err != nil {
		t.Fatalf("rewrap: %v", err)
	}
	if got, want := moved.Provider, p.Name(); got != want {
		t.Errorf("provider of the new wrap: got %q, want %q", got, want)
	}
	wantOpens(t, "open the new wrap", p, moved, wrapContext, innerBlob)
	wantOpens(t, "open the old wrap", p, w, wrapContext, innerBlob)
	_, err = p.Unwrap(t.Context(), moved, []byte("kek movies/2"))
	wantError(t, "open the new wrap with another context", err, custodian.ErrProviderBlob)
	_, err = r.Rewrap(t.Context(), w, []byte("kek movies/2"))
	wantError(t, "rewrap with another context", err, custodian.ErrProviderBlob)
	_, err = r.Rewrap(t.Context(), wrap(t, other, innerBlob, wrapContext), wrapContext)
	wantError(t, "rewrap a blob of another key", err, custodian.ErrProviderBlob)
}

func testProviderStatus(t *testing.T, p, _ custodian.Provider) {
	before := p.Status()
	if before.Name != p.Name() || before.Kind == "" || before.Calls != 0 || before.Failures != 0 {
		t.Errorf("status before the first call: got %+v, want name, kind and no calls", before)
	}
	w := wrap(t, p, innerBlob, wrapContext)
	wantOpens(t, "open", p, w, wrapContext, innerBlob)
	after := p.Status()
	if !after.Reachable || after.LastError != "" || after.Failures != 0 || after.Calls != 2 {
		t.Errorf("status after two good calls: got %+v", after)
	}
	if after.OuterLayer && after.LastContact.IsZero() {
		t.Error("last contact after two good calls: got none")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := p.Unwrap(ended, w, wrapContext)
	failed := p.Status()
	if failed.Calls != 3 || failed.Failures != 1 || err == nil || failed.LastError != err.Error() {
		t.Errorf("status after a bad call: got %+v, want the error %v", failed, err)
	}
}
