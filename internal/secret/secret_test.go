package secret_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/keycustody/custodian/internal/secret"
)

func TestArenaWipesAndReuses(t *testing.T) {
	a, err := secret.NewArena(48, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	first, err := a.Get()
	if err != nil {
		t.Fatal(err)
	}
	copy(first, "0123456789abcdef")
	if _, err := a.Get(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Get(); !errors.Is(err, secret.ErrFull) {
		t.Fatalf("third slot of two: got %v, want ErrFull", err)
	}
	if got := a.InUse(); got != 2 {
		t.Errorf("in use: got %d, want 2", got)
	}
	a.Put(first[:16])
	again, err := a.Get()
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range again {
		if c != 0 {
			t.Fatalf("byte %d of a reused slot: got %d, want 0", i, c)
		}
	}
}

func TestPutWipesForeignBytes(t *testing.T) {
	a, err := secret.NewArena(16, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b := []byte("not of the arena")
	a.Put(b)
	if string(b) != strings.Repeat("\x00", len(b)) {
		t.Errorf("foreign bytes: got %q, want zeros", b)
	}
	if got := a.InUse(); got != 0 {
		t.Errorf("in use: got %d, want 0", got)
	}
}

func TestSecretShowsNothing(t *testing.T) {
	a, err := secret.NewArena(16, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	slot, err := a.Get()
	if err != nil {
		t.Fatal(err)
	}
	copy(slot, "plain-key-bytes!")
	s := secret.New(a, slot, 16)
	holder := struct {
		Name string
		key  secret.Secret
		Key  secret.Secret
	}{"n", s, s}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+"\n"+verb+"\n", s, holder)
	}
	j, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	slog.New(slog.NewTextHandler(&out, nil)).Info("key", "key", s, "holder", holder)
	for _, leak := range []string{"plain-key", fmt.Sprintf("%x", "plain-key"), "112 108 97"} {
		if strings.Contains(out.String(), leak) {
			t.Errorf("output shows %q", leak)
		}
	}
	s.Use(func(b []byte) {
		if string(b) != "plain-key-bytes!" {
			t.Errorf("use: got other bytes")
		}
	})
	s.Destroy()
	s.Destroy()
	if got := a.InUse(); got != 0 {
		t.Errorf("in use after destroy: got %d, want 0", got)
	}
}

// The kernel's view of the arena: locked and left out of core dumps.
func TestArenaIsLocked(t *testing.T) {
	before := vmLocked(t)
	a, err := secret.NewArena(4096, 16)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := vmLocked(t)-before, 64; got < want {
		t.Errorf("%d kB locked, want %d", got, want)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if got := vmLocked(t) - before; got > 0 {
		t.Errorf("%d kB still locked after close", got)
	}
}

// vmLocked is the locked memory of this process in kB.
func vmLocked(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "VmLck:" {
			n, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no VmLck in /proc/self/status")
	return 0
}
