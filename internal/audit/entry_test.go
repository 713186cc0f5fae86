package audit_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

var update = flag.Bool("update", false, "write the golden files anew")

// full returns an entry with every field set.
func full() audit.Entry {
	return audit.Entry{
		Index: 1 << 40, Salt: [16]byte{0xa0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
		Time: when, Action: "release", Outcome: audit.Denied, Reason: "DENIED",
		Caller: "spiffe://studio.example/drm/one", Role: "drm-provider", RequestID: "req-1",
		Category: "movies", ContentID: []byte{0, 1, 0xff}, TrackType: "UHD1", Scheme: "cbcs",
		HasPeriod: true, Period: 0, Generation: 2, KID: bytes.Repeat([]byte{7}, 16), KeyVersion: "movies/4",
		ControlRevision: 300, ControlDigest: bytes.Repeat([]byte{9}, 32), StoreSequence: 1<<64 - 1,
		Count: 12, Detail: "größer als 1",
		Refs: []audit.Ref{{Kind: "session", KeyVersion: 1, MAC: [16]byte{1}}, {Kind: "session", KeyVersion: 2, MAC: [16]byte{2}}},
	}
}

func TestEntryGolden(t *testing.T) {
	e := full()
	got, err := e.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join("testdata", "entry_v1.hex")
	if *update {
		if err := os.WriteFile(name, []byte(hex.EncodeToString(got)+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("encoding = %x, want %x", got, want)
	}
	back, err := audit.UnmarshalEntry(want)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, e) {
		t.Errorf("entry = %+v, want %+v", back, e)
	}
}

func TestEntryRules(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*audit.Entry)
		want  string
	}{
		{"no action", func(e *audit.Entry) { e.Action = "" }, "action is empty"},
		{"no outcome", func(e *audit.Entry) { e.Outcome = 0 }, "outcome is 0"},
		{"other outcome", func(e *audit.Entry) { e.Outcome = 5 }, "outcome is 5"},
		{"begun twice", func(e *audit.Entry) { e.Outcome, e.HasAttempt = audit.Begun, true }, "outcome begun with attempt 0"},
		{"attempt of nothing", func(e *audit.Entry) { e.Attempt, e.HasAttempt = 7, false }, "with attempt 7"},
		{"far time", func(e *audit.Entry) { e.Time = time.Date(10000, 1, 2, 0, 0, 0, 0, time.UTC) }, "year 10000"},
		{"long caller", func(e *audit.Entry) { e.Caller = strings.Repeat("x", 4097) }, "caller has 4097 bytes"},
		{"long detail", func(e *audit.Entry) { e.Detail = strings.Repeat("x", 4097) }, "detail has 4097 bytes"},
		{"not UTF-8", func(e *audit.Entry) { e.Role = "\xff" }, "role is not UTF-8"},
		{"zero byte", func(e *audit.Entry) { e.RequestID = "a\x00b" }, "request ID contains a zero byte"},
		{"long content ID", func(e *audit.Entry) { e.ContentID = make([]byte, 501) }, "content ID has 501 bytes"},
		{"short KID", func(e *audit.Entry) { e.KID = make([]byte, 15) }, "KID has 15 bytes"},
		{"short digest", func(e *audit.Entry) { e.ControlDigest = make([]byte, 31) }, "control digest has 31 bytes"},
		{"period without", func(e *audit.Entry) { e.HasPeriod, e.Period = false, 1 }, "period is 1"},
		{"many references", func(e *audit.Entry) { e.Refs = make([]audit.Ref, 17) }, "17 references"},
		{"long kind", func(e *audit.Entry) { e.Refs[0].Kind = strings.Repeat("x", 65) }, "kind of reference has 65"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := full()
			tt.spoil(&e)
			_, err := e.MarshalBinary()
			if !errors.Is(err, audit.ErrInvalidEntry) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v, want ErrInvalidEntry with %q", err, tt.want)
			}
		})
	}
}

// entryWith returns an entry whose fields are given as encoded.
func entryWith(fields ...string) []byte {
	b := append([]byte{1}, make([]byte, 24)...)
	return append(b, strings.Join(fields, "")...)
}

func TestEntryCanonical(t *testing.T) {
	const (
		at      = "\x01\x0c\x00\x00\x00\x00\x69\xa7\xbb\x17\x00\x00\x00\x08"
		action  = "\x02\x01a"
		outcome = "\x03\x01\x01"
	)
	for _, tt := range []struct {
		name string
		b    []byte
		want string // in the error; empty where it is well
	}{
		{"least", entryWith(at, action, outcome), ""},
		{"empty", nil, "too few"},
		{"version 2", append([]byte{2}, entryWith(at, action, outcome)[1:]...), "version is 2"},
		{"no time", entryWith(action, outcome), "has no time"},
		{"no action", entryWith(at, outcome), "action is empty"},
		{"no outcome", entryWith(at, action), "outcome is 0"},
		{"outcome 5", entryWith(at, action, "\x03\x01\x05"), "outcome is 5"},
		{"attempt 0", entryWith(at, action, outcome, "\x16\x00"), ""},
		{"long attempt", entryWith(at, action, outcome, "\x16\x02\x00\x01"), "begins with a zero"},
		{"long outcome", entryWith(at, action, "\x03\x02\x00\x01"), "not 1"},
		{"short time", entryWith("\x01\x01\x00", action, outcome), "not 12"},
		{"many nanoseconds", entryWith("\x01\x0c\x00\x00\x00\x00\x69\xa7\xbb\x17\xff\x00\x00\x08", action, outcome), "nanoseconds"},
		{"order", entryWith(at, outcome, action), "field 2: follows field 3"},
		{"twice", entryWith(at, action, action, outcome), "follows field 2"},
		{"tag 0", entryWith("\x00\x01a", at, action, outcome), "follows field 0"},
		{"long length", entryWith(at, "\x02\x81\x00a", outcome), "malformed length"},
		{"beyond the end", entryWith(at, action, outcome, "\x04\x05abc"), "longer than the entry"},
		{"no length", entryWith(at, action, outcome, "\x04"), "malformed length"},
		{"empty field", entryWith(at, action, outcome, "\x04\x00"), "field 4: is empty"},
		{"period 0", entryWith(at, action, outcome, "\x0c\x00"), ""},
		{"period 0 in a byte", entryWith(at, action, outcome, "\x0c\x01\x00"), "begins with a zero"},
		{"long period", entryWith(at, action, outcome, "\x0c\x05\x01\x00\x00\x00\x00"), "the limit is 4"},
		{"generation 0", entryWith(at, action, outcome, "\x0d\x00"), "is empty"},
		{"short KID", entryWith(at, action, outcome, "\x0e\x01\x00"), "KID has 1 bytes"},
		{"short reference", entryWith(at, action, outcome, "\x15\x01\x00"), "needs 20"},
		{"critical unknown", entryWith(at, action, outcome, "\x17\x01a"), "may not be passed over"},
		{"last critical", entryWith(at, action, outcome, "\x7f\x01a"), "may not be passed over"},
		{"later", entryWith(at, action, outcome, "\x80\x01a", "\x81\x00"), ""},
		{"later twice", entryWith(at, action, outcome, "\x80\x01a", "\x80\x00"), "follows field 128"},
		{"very long", append(entryWith(at, action, outcome, "\x80\xff\xff\x03"), make([]byte, 1<<16)...), "the limit is 65536"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := audit.UnmarshalEntry(tt.b)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Fatalf("error = %v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := e.MarshalBinary(); err != nil || !bytes.Equal(got, tt.b) {
				t.Errorf("encoded again = %x, %v, want %x", got, err, tt.b)
			}
		})
	}
}

// Where a field does not say what it is, it is absent.
func TestEntryAbsent(t *testing.T) {
	e := audit.Entry{Time: when, Action: "start", Outcome: audit.Allowed}
	b, err := e.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(b), 25+14+7+3; got != want {
		t.Errorf("%d bytes, want %d", got, want)
	}
	back, err := audit.UnmarshalEntry(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, e) {
		t.Errorf("entry = %+v, want %+v", back, e)
	}
}
