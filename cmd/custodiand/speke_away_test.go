package main

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"slices"
	"testing"
	"time"
)

// TestSPEKETokenAway: the token fails in the middle of an encoder's request, and
// is back before the encoder gives up: it gets its keys, once and for all.
func TestSPEKETokenAway(t *testing.T) {
	c, f := provisionWithFaults(t)
	transport, port := serveEncoders(t, c)
	defer transport.CloseIdleConnections()
	spekeKeys(t, transport, port, 2) // while all is well
	const away = 2 * time.Second
	f.Fail("C_GenerateRandom", ckrDeviceError, 1<<30)
	began := time.Now()
	back := time.AfterFunc(away, f.Reset)
	defer back.Stop()
	keys := spekeKeys(t, transport, port, 5)
	if took := time.Since(began); took < away {
		t.Errorf("it took %s: the token was not away", took)
	}
	if again := spekeKeys(t, transport, port, 5); !slices.EqualFunc(again, keys, bytes.Equal) {
		t.Error("asked for again, the keys are others")
	}
}

// TestLongSPEKETokenAway: the token is away for two minutes. The encoder hears
// 503 after 55 s, with when to come back; and has its keys when it does.
func TestLongSPEKETokenAway(t *testing.T) {
	if os.Getenv("CUSTODIAN_LONG") == "" {
		t.Skip("two minutes: make long runs it")
	}
	c, f := provisionWithFaults(t)
	transport, port := serveEncoders(t, c)
	defer transport.CloseIdleConnections()
	f.Fail("C_GenerateRandom", ckrDeviceError, 1<<30)
	began := time.Now()
	back := time.AfterFunc(2*time.Minute, f.Reset)
	defer back.Stop()
	refusals := 0
	for time.Since(began) < 2*time.Minute {
		asked := time.Now()
		res := askSPEKE(t, transport, port, 3)
		text, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode == http.StatusOK {
			break
		}
		if took := time.Since(asked); res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") == "" || took < 50*time.Second || took > time.Minute {
			t.Fatalf("after %s: got %s, %v, %s; want 503 after 55 s", took, res.Status, res.Header, text)
		}
		refusals++
	}
	if refusals != 2 {
		t.Errorf("%d refusals in two minutes, want 2", refusals)
	}
	spekeKeys(t, transport, port, 3)
	if took := time.Since(began); took < 2*time.Minute {
		t.Errorf("the keys came after %s: the token was not away", took)
	}
}
