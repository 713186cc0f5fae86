package custodian

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// The decoders are not exported, so these tests are inside the package.

var update = flag.Bool("update", false, "write the golden files anew")

// A form is one kind of record: decode and encode it, whatever it is.
type form struct {
	name  string
	again func(b []byte) (v any, encoded []byte, err error)
	empty any
	full  any // no field has its zero value
}

func formOf[T any](name string, decode func([]byte) (T, error), encode func(T) []byte, full T) form {
	var empty T
	return form{name: name, empty: empty, full: full, again: func(b []byte) (any, []byte, error) {
		v, err := decode(b)
		if err != nil {
			return v, nil, err
		}
		return v, encode(v), nil
	}}
}

func bytesOf(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

var (
	sampleTime    = time.Date(2026, 11, 22, 12, 0, 0, 123456789, time.UTC)
	sampleWrapped = Wrapped{MEKVersion: 300, Canary: bytesOf(28, 3), Outer: []OuterWrap{
		{Provider: "vault-a", KeyRef: "transit/keys/custodian", Blob: bytesOf(200, 4)},
		{Provider: "local", Blob: bytesOf(40, 5)},
	}}
)

var (
	sampleOfficers  = []Officer{{"anna", "QQ=="}, {"ben", "Qg=="}, {"rita", "Qw=="}}
	sampleApprovals = []Approval{{"anna", "QQ==", sampleTime, bytesOf(64, 6)}, {"ben", "Qg==", sampleTime.Add(1), bytesOf(71, 7)}}
)

var forms = map[byte]form{
	formContentKey: formOf("content key", DecodeContentKey, EncodeContentKey, ContentKey{
		NaturalKey: NaturalKey{Category: "movies", ContentID: []byte("film\x00\xff"), TrackType: "UHD1", Scheme: SchemeCBCS, HasPeriod: true, Period: math.MaxUint32, Generation: 2},
		KID:        KID{1, 2, 3}, IV: bytesOf(16, 9), PeriodStart: sampleTime, PeriodEnd: sampleTime.Add(time.Hour), Origin: OriginImported,
		KEK: KEKID{"movies", 4}, BirthKEK: 3, CreateTime: sampleTime, PackagedTime: sampleTime.Add(2), Revision: math.MaxUint64, Fingerprint: Fingerprint{128, [16]byte{7}}}),
	formMEK: formOf("mek", decodeMEK, encodeMEK, MEK{Version: 1, Label: "mek-v1", ID: [16]byte{1}, Profile: ProfileSealed, State: StateActive,
		CreateTime: sampleTime, EndTime: sampleTime.Add(MEKPeriod), Canary: bytesOf(48, 2), TokenSerial: "0123", Revision: 1}),
	formKEK: formOf("kek", decodeKEK, encodeKEK, KEK{ID: KEKID{"movies", 4}, State: StateDeactivated, CreateTime: sampleTime, DeactivateTime: sampleTime.Add(1),
		Wrapped: sampleWrapped, Reserved: 1 << 31, Revision: 9}),
	formHelper: formOf("helper", decodeHelper, encodeHelper, Helper{Purpose: HelperRecord, Version: 1, State: StateActive, CreateTime: sampleTime, Wrapped: sampleWrapped, Revision: 1}),
	formSigner: formOf("signer", decodeSigner, encodeSigner, Signer{Purpose: "audit", Version: 1, Label: "mek-audit-v1", ID: [16]byte{6}, PublicKey: bytesOf(91, 1),
		State: StateActive, CreateTime: sampleTime, Revision: 1}),
	formCategory: formOf("category", decodeCategory, encodeCategory, Category{Name: "movies", Mode: CategoryFrozen, ActiveKEK: 4, Providers: []string{"vault-a", "local"},
		CreateTime: sampleTime, ReissueWindow: 72 * time.Hour, Live: true, Revision: 5}),
	formException: formOf("exception", decodeException, encodeException, Exception{KID: KID{1}, State: StateCompromised, Decided: true, Time: sampleTime, Cause: "leak", Revision: 2}),
	formRewrap: formOf("rewrap", decodeRewrap, encodeRewrap, RewrapJob{Category: "movies", Providers: []string{"vault-a", "aws"}, Reencrypt: []string{"aws"},
		Purpose: HelperRecord, Version: 300, BeginTime: sampleTime, By: "spiffe://test/officer", Revision: 2}),
	formHead: formOf("head", decodeHead, encodeHead, Head{StoreID: [16]byte{1}, Revision: 7, Digest: [32]byte{2}, Previous: [32]byte{3}, Pending: [32]byte{4}, HighestNow: sampleTime}),
	formRotation: formOf("rotation", decodeRotation, encodeRotation, Rotation{Kind: RotateKEK, Category: "movies", To: 5, Predecessor: 4, From: []uint32{3, 4},
		Step: StepHold, Cause: "new batch", Compromised: []uint32{4}, Serve: true, RequestID: "r-1", StartTime: sampleTime, StepTime: sampleTime.Add(1),
		HoldUntil: sampleTime.Add(time.Hour), Total: 1000, Verified: 1001, Revision: 3}),
	formAuthority: formOf("authority", decodeAuthority, encodeAuthority, Authority{Officers: sampleOfficers[:2], Quorum: []QuorumRule{{KindOfficers, 2}, {KindPolicy, 300}},
		Recovery: sampleOfficers[2:], RecoveryQuorum: 2, Grants: []PlanGrant{{Identity: "spiffe://a/b", Role: "packager", Categories: []string{"*"}, Reissue: true, SPKI: "ab"}},
		Conditions: [32]byte{4}, Sealed: true, Revision: 3}),
	formFrozenCaller: formOf("frozen caller", decodeFrozenCaller, encodeFrozenCaller, FrozenCaller{Identity: "spiffe://a/b", By: "spiffe://a/anna", Cause: "stolen", Time: sampleTime, Revision: 1}),
	formCategoryPolicy: formOf("category policy", decodeCategoryPolicy, encodeCategoryPolicy, CategoryPolicy{Category: "movies", RekeyUntil: sampleTime, Standing: true,
		DailyCap: 300, MinInterval: time.Hour, Revision: 2}),
	formRekey: formOf("re-key", decodeRekey, encodeRekey, Rekey{Category: "movies", ContentID: []byte("film\x00"), Generation: 3, Withdrawn: 2, Ceremony: "0123456789abcdef",
		By: "fedcba9876543210", Time: sampleTime, Revision: 3}),
	formRevocation: formOf("revocation", decodeRevocation, encodeRevocation, Revocation{Session: audit.Ref{Kind: refSession, KeyVersion: 300, MAC: [16]byte{8}}, Issuer: "https://playback.test",
		Until: sampleTime, Cause: "shared", By: "spiffe://a/oli", Time: sampleTime.Add(1), Revision: 4}),
	formCeremony: formOf("ceremony", decodeCeremony, encodeCeremony, Ceremony{ID: "0123456789abcdef", Plan: "{}", State: CeremonyDone, Base: 7, Nonce: [32]byte{1},
		LogKey: [32]byte{2}, Basis: [32]byte{3}, Proposer: "spiffe://a/anna", ProposeTime: sampleTime, FirstEntry: 1 << 40, Needed: 2, Approvals: sampleApprovals,
		Cancels: sampleApprovals[:1], QuorumTime: sampleTime.Add(1), Executor: "spiffe://a/ben", ExecTime: sampleTime.Add(2), EndTime: sampleTime.Add(3),
		Before: []byte("{1}"), After: []byte("{2}"), Revision: 5}),
}

// encodeAny encodes a value of form f.
func encodeAny(t testing.TB, v any) []byte {
	switch v := v.(type) {
	case ContentKey:
		return EncodeContentKey(v)
	case MEK:
		return encodeMEK(v)
	case KEK:
		return encodeKEK(v)
	case Helper:
		return encodeHelper(v)
	case Signer:
		return encodeSigner(v)
	case Category:
		return encodeCategory(v)
	case Exception:
		return encodeException(v)
	case Head:
		return encodeHead(v)
	case Rotation:
		return encodeRotation(v)
	case RewrapJob:
		return encodeRewrap(v)
	case Authority:
		return encodeAuthority(v)
	case Ceremony:
		return encodeCeremony(v)
	case CategoryPolicy:
		return encodeCategoryPolicy(v)
	case Rekey:
		return encodeRekey(v)
	case Revocation:
		return encodeRevocation(v)
	case FrozenCaller:
		return encodeFrozenCaller(v)
	}
	t.Fatalf("no encoder for %T", v)
	return nil
}

func TestEncodingRoundTrip(t *testing.T) {
	for first, f := range forms {
		if name := zeroField(reflect.ValueOf(f.full), f.name); name != "" {
			t.Errorf("%s: the full sample leaves %s zero", f.name, name)
		}
		for _, v := range []any{f.empty, f.full} {
			b := encodeAny(t, v)
			got, again, err := f.again(b)
			if err != nil || !reflect.DeepEqual(got, v) || !bytes.Equal(again, b) {
				t.Errorf("%s: got %+v and %v, want %+v", f.name, got, err, v)
			}
			version := byte(formVersion)
			if k, ok := v.(ContentKey); ok && !k.PackagedTime.IsZero() {
				version = formPackaged
			}
			if a, ok := v.(Authority); ok && a.Conditions != [32]byte{} {
				version = formConditions
			}
			if b[0] != first || b[1] != version {
				t.Errorf("%s: begins with %x", f.name, b[:2])
			}
			for n := range b {
				if _, _, err := f.again(b[:n]); !errors.Is(err, ErrRecordCorrupt) {
					t.Errorf("%s: %d of %d bytes: got %v, want ErrRecordCorrupt", f.name, n, len(b), err)
				}
			}
			if b[2] == 0 { // an empty length in more bytes than it needs
				long := append([]byte{b[0], b[1], 0x80, 0}, b[3:]...)
				if _, _, err := f.again(long); !errors.Is(err, ErrRecordCorrupt) {
					t.Errorf("%s: a number in a longer form: got %v, want ErrRecordCorrupt", f.name, err)
				}
			}
			if _, _, err := f.again(append(b, 0)); !errors.Is(err, ErrRecordCorrupt) {
				t.Errorf("%s: a byte too many: got %v, want ErrRecordCorrupt", f.name, err)
			}
			for other, g := range forms {
				if _, _, err := g.again(b); other != first && !errors.Is(err, ErrRecordCorrupt) {
					t.Errorf("a %s is read as a %s", f.name, g.name)
				}
			}
		}
	}
}

// zeroField names a field of v that has its zero value.
func zeroField(v reflect.Value, path string) string {
	if _, isTime := v.Interface().(time.Time); v.Kind() != reflect.Struct || isTime {
		if v.IsZero() {
			return path
		}
		return ""
	}
	for i := range v.NumField() {
		if name := zeroField(v.Field(i), path+"."+v.Type().Field(i).Name); name != "" {
			return name
		}
	}
	return ""
}

// What is on disk, and under MACs and tags, stays as it is. A change here
// needs a new form version and a migration.
func TestEncodingGolden(t *testing.T) {
	var got strings.Builder
	for _, first := range slices.Sorted(maps.Keys(forms)) {
		f := forms[first]
		fmt.Fprintf(&got, "%s, empty: %x\n%s, full: %x\n", f.name, encodeAny(t, f.empty), f.name, encodeAny(t, f.full))
	}
	unpackaged := forms[formContentKey].full.(ContentKey)
	unpackaged.PackagedTime = time.Time{}
	fmt.Fprintf(&got, "content key, not packaged: %x\n", EncodeContentKey(unpackaged))
	unconditional := forms[formAuthority].full.(Authority)
	unconditional.Conditions = [32]byte{}
	fmt.Fprintf(&got, "authority, without conditions: %x\n", encodeAuthority(unconditional))
	store := [16]byte{0xaa}
	fmt.Fprintf(&got, "mac input: %x\n", macInput(store, ControlRecord{Kind: ControlKEK, Name: "movies/4", Body: []byte("body"), MACVersion: 300}))
	fmt.Fprintf(&got, "associated data: %x\n", associatedData(store, []byte("body")))
	fmt.Fprintf(&got, "kek identity: %x\n", kekIdentity(store, KEKID{"movies", 4}))
	fmt.Fprintf(&got, "helper identity: %x\n", helperIdentity(store, HelperRecord, 1))
	const path = "testdata/encodings.golden"
	if *update {
		if err := os.WriteFile(path, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("the encodings have changed; got\n%s\nwant\n%s", got.String(), want)
	}
}

// Identities and MAC inputs of different things differ.
func TestEncodingDistinct(t *testing.T) {
	a, b := [16]byte{1}, [16]byte{2}
	rec := func(kind ControlKind, name, body string, version uint32) ControlRecord {
		return ControlRecord{Kind: kind, Name: name, Body: []byte(body), MACVersion: version}
	}
	inputs := map[string][]byte{
		"kek":                  kekIdentity(a, KEKID{"movies", 1}),
		"kek of another store": kekIdentity(b, KEKID{"movies", 1}),
		"kek version":          kekIdentity(a, KEKID{"movies", 2}),
		"kek category":         kekIdentity(a, KEKID{"movie", 1}),
		"helper":               helperIdentity(a, HelperRecord, 1),
		"helper purpose":       helperIdentity(a, HelperFingerprint, 1),
		"mac":                  macInput(a, rec(2, "movies/1", "x", 1)),
		"mac store":            macInput(b, rec(2, "movies/1", "x", 1)),
		"mac kind":             macInput(a, rec(3, "movies/1", "x", 1)),
		"mac name":             macInput(a, rec(2, "movies/11", "x", 1)),
		"mac boundary":         macInput(a, rec(2, "movies/1\x01", "x", 1)),
		"mac version":          macInput(a, rec(2, "movies/1", "x", 2)),
		"mac body":             macInput(a, rec(2, "movies/1", "\x01x", 1)),
		"aad":                  associatedData(a, []byte("x")),
		"aad store":            associatedData(b, []byte("x")),
	}
	seen := map[string]string{}
	for name, in := range inputs {
		if other, twice := seen[string(in)]; twice {
			t.Errorf("%s and %s are the same bytes", name, other)
		}
		seen[string(in)] = name
	}
}

// FuzzDecode: what decodes at all is the one encoding of its value.
func FuzzDecode(f *testing.F) {
	for _, form := range forms {
		f.Add(encodeAny(f, form.empty))
		f.Add(encodeAny(f, form.full))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		form, ok := forms[b[0]]
		if !ok {
			return
		}
		v, again, err := form.again(bytes.Clone(b))
		if err != nil {
			if !errors.Is(err, ErrRecordCorrupt) {
				t.Errorf("%s: got %v, want ErrRecordCorrupt", form.name, err)
			}
			return
		}
		if !bytes.Equal(again, b) {
			t.Errorf("%s: %s decodes to %+v, whose encoding is %s", form.name, hex.EncodeToString(b), v, hex.EncodeToString(again))
		}
	})
}

// An authority as it was written before there were conditions is read, and one
// whose conditions are zero has that form and no other.
func TestAuthorityWithoutConditions(t *testing.T) {
	a := forms[formAuthority].full.(Authority)
	a.Conditions = [32]byte{}
	b := encodeAuthority(a)
	if got, err := decodeAuthority(b); err != nil || b[1] != formVersion || !reflect.DeepEqual(got, a) {
		t.Errorf("version %d: got %+v and %v, want %+v", b[1], got, err, a)
	}
	b[1] = formConditions
	if _, err := decodeAuthority(append(b, make([]byte, 32)...)); !errors.Is(err, ErrRecordCorrupt) {
		t.Errorf("zero conditions: got %v, want ErrRecordCorrupt", err)
	}
}
