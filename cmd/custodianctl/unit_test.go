package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
	"github.com/keycustody/custodian/internal/rpc"
)

func TestExitCodes(t *testing.T) {
	for _, row := range []struct {
		err    error
		exit   int
		reason string
	}{
		{&client.Error{Code: codes.InvalidArgument, Reason: "INVALID"}, exitUsage, "INVALID"},
		{&client.Error{Code: codes.Unauthenticated, Reason: "IDENTITY"}, exitRefused, "IDENTITY"},
		{&client.Error{Code: codes.PermissionDenied, Reason: "DENIED"}, exitRefused, "DENIED"},
		{&client.Error{Code: codes.NotFound, Reason: "KEY_NOT_FOUND"}, exitNotFound, "KEY_NOT_FOUND"},
		{&client.Error{Code: codes.AlreadyExists, Reason: "KID_CONFLICT"}, exitState, "KID_CONFLICT"},
		{&client.Error{Code: codes.FailedPrecondition, Reason: "KEY_STATE"}, exitState, "KEY_STATE"},
		{&client.Error{Code: codes.Unavailable, Reason: "HSM_UNAVAILABLE"}, exitUnavailable, "HSM_UNAVAILABLE"},
		{&client.Error{Code: codes.Unavailable}, exitUnavailable, reasonNoAnswer},
		{&client.Error{Code: codes.ResourceExhausted, Reason: "RATE"}, exitUnavailable, "RATE"},
		{&client.Error{Code: codes.DeadlineExceeded, Reason: "DEADLINE"}, exitUnavailable, "DEADLINE"},
		{&client.Error{Code: codes.DataLoss, Reason: "RECORD_CORRUPT"}, exitIntegrity, "RECORD_CORRUPT"},
		{&client.Error{Code: codes.Internal, Reason: "INTERNAL"}, exitOther, "INTERNAL"},
		{&client.Error{Code: codes.Canceled, Reason: "CANCELLED"}, exitOther, "CANCELLED"},
		{&audit.DamageError{Problem: errors.New("bad")}, exitIntegrity, reasonDamaged},
		{fmt.Errorf("verify: %w", checkpoint.ErrSignature), exitIntegrity, reasonDamaged},
		{fmt.Errorf("prove: %w", audit.ErrNoEntry), exitNotFound, reasonNotThere},
		{fs.ErrNotExist, exitNotFound, reasonNotThere},
		{fs.ErrExist, exitState, reasonExists},
		{fs.ErrPermission, exitOther, reasonLocal},
	} {
		f := classify(fmt.Errorf("some call: %w", row.err))
		if got := exitOf(f.code); got != row.exit || f.reason != row.reason {
			t.Errorf("%v: exit code %d, reason %s, want %d, %s", row.err, got, f.reason, row.exit, row.reason)
		}
	}
}

// A refusal that leaves its user without a next step is unkind. Two kinds need
// none of their own: mend the request, and try again.
func TestNextSteps(t *testing.T) {
	own := map[string]bool{reasonConfig: true, reasonDamaged: true, reasonExists: true, reasonNoAnswer: true}
	none := map[string]bool{"INVALID": true, "CANCELLED": true, "KEY_DESTROYED": true,
		"RATE": true, "KID_BUDGET": true, "DEADLINE": true, "STARTING": true, "SEALED": true}
	known := map[string]bool{}
	for _, reason := range rpc.Reasons() {
		known[string(reason)] = true
		if nextSteps[string(reason)] == "" && !none[string(reason)] {
			t.Errorf("reason %s: no next step", reason)
		}
	}
	for reason := range nextSteps {
		if !known[reason] && !own[reason] {
			t.Errorf("next step for %s, which the daemon never says", reason)
		}
	}
}

func TestReportTellsWhenToTryAgain(t *testing.T) {
	err := fmt.Errorf("get keys: %w", &client.Error{Code: codes.ResourceExhausted, Reason: "RATE", Message: "too many calls", Retry: 1500 * time.Millisecond})
	var text, asJSON bytes.Buffer
	(&app{err: &text}).report(err, false)
	if got, want := text.String(), "custodianctl: get keys: RATE: too many calls\nnext: try again in 1.5s\n"; got != want {
		t.Errorf("report: %q, want %q", got, want)
	}
	if code := (&app{err: &asJSON}).report(err, true); code != exitUnavailable || !strings.Contains(asJSON.String(), `"retry_after_ms": 1500`) || !strings.Contains(asJSON.String(), `"code": "RESOURCE_EXHAUSTED"`) {
		t.Errorf("report: exit code %d, %s", code, asJSON.String())
	}
}

// Every command has a sentence about it, and runs --help.
func TestHelp(t *testing.T) {
	var visit func(c *cobra.Command, path []string)
	visit = func(c *cobra.Command, path []string) {
		if c.Short == "" {
			t.Errorf("%v: no short description", path)
		}
		var out, stderr bytes.Buffer
		if code := run(t.Context(), append(path, "--help"), &out, &stderr); code != exitOK || stderr.Len() > 0 {
			t.Errorf("%v --help: exit code %d: %s", path, code, stderr.String())
		}
		for _, sub := range c.Commands() {
			visit(sub, append(path[:len(path):len(path)], sub.Name()))
		}
	}
	visit((&app{}).root(), nil)
}

// What a daemon, or somebody who named a content item, sends to a terminal must
// not move its cursor.
func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"film-1":      "film-1",
		"Amélie 2":    "Amélie 2",
		"":            `""`,
		"a\tb":        `"a\tb"`,
		"\x1b[2Jgone": `"\x1b[2Jgone"`,
		"\xff":        `"\xff"`,
		"a\u202eb":    `"a\u202eb"`,
	} {
		if got := plain(in); got != want {
			t.Errorf("plain(%q) = %s, want %s", in, got, want)
		}
	}
	if got, want := contentText([]byte{0xff, 0}), "hex:ff00"; got != want {
		t.Errorf("contentText = %s, want %s", got, want)
	}
	if got, want := short(strings.Repeat("x", 50), 4), "xxx…"; got != want {
		t.Errorf("short = %s, want %s", got, want)
	}
}

func TestWrap(t *testing.T) {
	for _, row := range []struct {
		in   string
		want []string
	}{
		{"", []string{""}},
		{"one two", []string{"one two"}},
		{"one two three", []string{"one two", "three"}},
		{"abcdefghijkl m", []string{"abcdefgh", "ijkl m"}},
		{"ab cdefghijkl", []string{"ab", "cdefghij", "kl"}},
	} {
		if got := wrap(row.in, 8); strings.Join(got, "|") != strings.Join(row.want, "|") {
			t.Errorf("wrap(%q) = %q, want %q", row.in, got, row.want)
		}
	}
}

// A key that is not to be shown is wiped where it came in, and one that is shown
// is wiped after it.
func TestKeysAreWiped(t *testing.T) {
	fresh := func() *v1.ContentKey {
		return &v1.ContentKey{Kid: make([]byte, 16), KeyMaterial: &v1.ContentKey_Key{Key: []byte("0123456789abcdef")}}
	}
	wiped := func(k *v1.ContentKey) bool { return bytes.Equal(k.GetKey(), make([]byte, 16)) }

	hidden := fresh()
	if v := viewKey(hidden, false); v.Key != nil || !wiped(hidden) {
		t.Error("a hidden key is still there")
	}
	for _, asJSON := range []bool{false, true} {
		shown := fresh()
		want := hex.EncodeToString(shown.GetKey())
		var out bytes.Buffer
		a := &app{out: &out, json: asJSON}
		if err := a.printKeys([]keyView{viewKey(shown, true)}, ""); err != nil {
			t.Fatal(err)
		}
		if strings.Count(out.String(), want) != 1 {
			t.Errorf("json %v: a key that is to be shown is not", asJSON)
		}
		if !wiped(shown) {
			t.Errorf("json %v: a key that was shown is still there", asJSON)
		}
	}
}

// A store is as long as its first page says, and only such a page is believed.
func TestStoreSize(t *testing.T) {
	page := func() []byte {
		b := make([]byte, metaEnd)
		binary.NativeEndian.PutUint32(b[metaStart:], boltMagic)
		binary.NativeEndian.PutUint32(b[metaStart+4:], boltVersion)
		binary.NativeEndian.PutUint32(b[metaPageSize:], 4096)
		binary.NativeEndian.PutUint64(b[metaPages:], 8)
		sum := fnv.New64a()
		sum.Write(b[metaStart:metaSum])
		binary.NativeEndian.PutUint64(b[metaSum:], sum.Sum64())
		return b
	}
	if got, err := storeSize(page()); err != nil || got != 8*4096 {
		t.Errorf("storeSize = %d, %v, want %d", got, err, 8*4096)
	}
	for i := metaStart; i < metaEnd; i++ {
		b := page()
		b[i] ^= 1
		if got, err := storeSize(b); err == nil {
			t.Errorf("byte %d changed: size %d, want an error", i, got)
		}
	}
	if _, err := storeSize(page()[:metaEnd-1]); err == nil {
		t.Error("a page that is cut off is believed")
	}
}

// All that there is to say of a KMS fits a terminal.
func TestStatusOfKMS(t *testing.T) {
	when := timestamppb.New(time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC))
	long := "kms aws-frankfurt: log in to aws: ExpiredTokenException, \"The security token included in the request is expired\": kms refuses our login: kms unavailable"
	s := &v1.Status{StoreId: "00", Rewraps: []*v1.Rewrap{{Category: "movies", Providers: []string{"vault", "aws-frankfurt"}, Done: 320, Total: 1000, LastError: long}},
		Providers: []*v1.ProviderStatus{{Name: "aws-frankfurt", Kind: "aws", OuterLayer: true, KeyRef: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
			LastContactTime: when, LastError: long, Calls: 12345, Failures: 17, AwaySinceTime: when, GraceLeft: durationpb.New(3 * time.Hour), LoginRefused: long,
			NextRenewalTime: when, LoginEndTime: when, IncidentTime: when, Incidents: 2, KeyVersions: 1003, SoleKeyVersions: 3,
			CallsByReason: []*v1.ProviderCalls{{Reason: "load", Result: "ok", Count: 5}, {Reason: "load", Result: "login", Count: 1}, {Reason: "probe", Result: "held", Count: 2}}}}}
	var out bytes.Buffer
	if err := (&app{out: &out}).printStatus(s); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		if n := len([]rune(line)); n > 81 { // with its newline
			t.Errorf("a line of %d columns: %s", n-1, line)
		}
	}
	words := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{"holds 1003 key versions, 3 of them alone", "OUT OF REACH since 2026-11-22T12:00:00Z", "12345 calls, 17 failed", "LOGIN IS REFUSED: ",
		"grace left for loaded keys: 3h0m0s, AWAY since", "login: renewed 2026-11-22T12:00:00Z, ends 2026-11-22T12:00:00Z", "INCIDENT declared 2026-11-22T12:00:00Z",
		"calls: to load 5 ok 1 login, to probe 2 held", "outer wraps of category movies to vault, aws-frankfurt: 320 of 1000 keys", "does not go on: "} {
		if !strings.Contains(words, want) {
			t.Errorf("the status does not say %q:\n%s", want, out.String())
		}
	}
}

// What ceremony watch shows of work: a bar, how far it is, how fast, and what is
// left.
func TestProgressText(t *testing.T) {
	for _, test := range []struct {
		p    progressView
		want string
	}{
		{progressView{Name: "kek/movies/5", Step: "REWRAP"}, "kek/movies/5 rewrap"},
		{progressView{Name: "kek/movies/5", Step: "REWRAP", Total: 1_000_000}, "kek/movies/5 rewrap [....................] 0 of 1000000"},
		{progressView{Name: "content", Step: "REKEY", Done: 250, Total: 1000, Rate: 12.4, Remaining: "1m0s"}, "content rekey [#####...............] 250 of 1000, 12 a second, 1m0s left"},
		{progressView{Name: "mek/2", Step: "VERIFY", Done: 999, Total: 1000}, "mek/2 verify [###################.] 999 of 1000"},
		{progressView{Name: "mek/2", Step: "VERIFY", Done: 1000, Total: 1000, LastError: "kms away"}, "mek/2 verify [####################] 1000 of 1000; it is tried again after: kms away"},
		{progressView{Name: "mek/2", Step: "VERIFY", Done: 1001, Total: 1000}, "mek/2 verify [####################] 1001 of 1000"},
	} {
		if got := test.p.text(); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}
