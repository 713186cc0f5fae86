package rpc_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
	fronts "github.com/keycustody/custodian/internal/packager"
	"github.com/keycustody/custodian/internal/rpc"
)

// takers are a recipient for exports from movies, with its private key.
func takers(t *testing.T) (*rsa.PrivateKey, *fronts.Exports) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	to, err := fronts.NewRecipient(der, "")
	if err != nil {
		t.Fatal(err)
	}
	return key, fronts.NewExports([]fronts.ExportRecipient{{Name: "taker", Recipient: to, Categories: []custodian.CategoryName{"movies"}}})
}

// foreign is a key made elsewhere, of 16 bytes b.
func foreign(track string, kid, b byte) *v1.ImportedContentKey {
	return &v1.ImportedContentKey{Spec: &v1.ContentKeySpec{TrackType: track, Scheme: "cenc", Kid: bytes.Repeat([]byte{kid}, 16)}, Key: bytes.Repeat([]byte{b}, 16)}
}

// An officer's imported keys reach the provider, and go out again in a document
// that the recipient, and nobody else, can open.
func TestTransfer(t *testing.T) {
	private, exports := takers(t)
	k := newKit(t, options{config: func(c *rpc.Config) { c.Exports = exports }})
	k.createCategory(t, "movies")
	boss := k.dial(t, officer)
	hd := foreign("HD", 2, 0xb2)
	hd.Spec.Scheme, hd.Iv = "cbcs", bytes.Repeat([]byte{7}, 16)
	hd.Spec.Period = &v1.Period{Index: 5, StartTime: timestamppb.New(time.Unix(1000, 0)), EndTime: timestamppb.New(time.Unix(1060, 0))}
	req := &v1.ImportContentKeysRequest{Category: "movies", ContentId: []byte("film & co"), Keys: []*v1.ImportedContentKey{foreign("SD", 1, 0xa1), hd}}
	for _, created := range []bool{true, false} {
		resp, err := boss.ImportContentKeys(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range resp.GetResults() {
			if r.GetCreated() != created || !bytes.Equal(r.GetKid(), req.Keys[i].Spec.Kid) || r.GetReceipt().GetIndex() == 0 {
				t.Errorf("result %d: got %v, want created %v", i, r, created)
			}
		}
	}
	got, err := k.dial(t, provider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{req.Keys[0].Spec.Kid, hd.Spec.Kid}})
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range got.GetResults() {
		if !bytes.Equal(r.GetKey().GetKey(), req.Keys[i].Key) || !bytes.Equal(r.GetKey().GetIv(), req.Keys[i].Iv) {
			t.Errorf("the provider gets another key or IV than was imported, for key %d", i)
		}
	}

	resp, err := boss.ExportContentKeys(t.Context(), &v1.ExportContentKeysRequest{Category: "movies", ContentId: req.ContentId, Recipient: "taker"})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range req.Keys {
		if bytes.Contains(resp.GetCpix(), key.Key) {
			t.Error("a key left in clear")
		}
	}
	doc, err := fronts.ParseCPIX(resp.GetCpix())
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Open(private); err != nil {
		t.Fatal(err)
	}
	if doc.ContentID != "film & co" || len(doc.Keys) != 2 || len(resp.GetKids()) != 2 || len(resp.GetReceipts()) != 2 {
		t.Errorf("got %q with %d keys; %d KIDs", doc.ContentID, len(doc.Keys), len(resp.GetKids()))
	}
	for _, key := range doc.Keys {
		i := slices.IndexFunc(req.Keys, func(k *v1.ImportedContentKey) bool { return bytes.Equal(k.Spec.Kid, key.KID[:]) })
		if i < 0 {
			t.Fatalf("KID %s was never imported", key.KID)
		}
		want := req.Keys[i]
		value, err := key.Value()
		track, period, purposeErr := doc.Purpose(key.KID)
		if err != nil || purposeErr != nil {
			t.Fatal(err, purposeErr)
		}
		if !bytes.Equal(value, want.Key) || key.Scheme != want.Spec.Scheme || !bytes.Equal(key.IV, want.Iv) || track != want.Spec.TrackType ||
			period.Set != (want.Spec.Period != nil) || period.Index != want.Spec.GetPeriod().GetIndex() || period.Set && period.End.Sub(period.Start) != time.Minute {
			t.Errorf("key %s: track %s, period %v, scheme %s, or its value or IV, is not what was imported", key.KID, track, period, key.Scheme)
		}
	}
	wantNoKeys(t, k)
}

func wantNoKeys(t *testing.T, k *kit) {
	t.Helper()
	if n := k.core.Arena().InUse(); n != 0 {
		t.Errorf("%d keys are still in clear", n)
	}
}

func TestTransferRefusals(t *testing.T) {
	_, exports := takers(t)
	k := newKit(t, options{config: func(c *rpc.Config) { c.Exports = exports }})
	k.createCategory(t, "movies")
	k.createCategory(t, "frozen")
	k.issue(t, "film-1", "SD")
	boss := k.dial(t, officer)
	imp := func(who string, keys ...*v1.ImportedContentKey) error {
		_, err := k.dial(t, who).ImportContentKeys(t.Context(), &v1.ImportContentKeysRequest{Category: "movies", ContentId: []byte("film-2"), Keys: keys})
		return err
	}
	export := func(who, category, content, to string) error {
		_, err := k.dial(t, who).ExportContentKeys(t.Context(), &v1.ExportContentKeysRequest{Category: category, ContentId: []byte(content), Recipient: to})
		return err
	}
	if err := imp(officer, foreign("SD", 1, 0xa1)); err != nil {
		t.Fatal(err)
	}
	short := foreign("HD", 9, 0x99)
	short.Key = short.Key[:15]
	noKID := foreign("HD", 9, 0x99)
	noKID.Spec.Kid = nil
	for _, test := range []struct {
		name   string
		err    error
		reason custodian.Reason
	}{
		{"a packager imports", imp(packager, foreign("HD", 9, 0x99)), "DENIED"},
		{"an operator imports", imp(operator, foreign("HD", 9, 0x99)), "DENIED"},
		{"a short key", imp(officer, short), "INVALID"},
		{"no KID", imp(officer, noKID), "INVALID"},
		{"no spec", imp(officer, &v1.ImportedContentKey{Key: make([]byte, 16)}), "INVALID"},
		{"no keys", imp(officer), "INVALID"},
		{"the same key for other tracks", imp(officer, foreign("HD", 9, 0xa1)), "KEY_CONFLICT"},
		{"another key for the same tracks", imp(officer, foreign("SD", 9, 0x99)), "KEY_CONFLICT"},
		{"a good key beside a KID that is in use", imp(officer, foreign("UHD1", 8, 0x98), foreign("HD", 1, 0x99)), "KID_CONFLICT"},
		{"a provider exports", export(provider, "movies", "film-1", "taker"), "DENIED"},
		{"an operator exports", export(operator, "movies", "film-1", "taker"), "DENIED"},
		{"a packager exports to nobody", export(packager, "movies", "film-1", "nobody"), "DENIED"},
		{"to nobody", export(officer, "movies", "film-1", "nobody"), "INVALID"},
		{"to somebody for other categories", export(officer, "frozen", "film-1", "taker"), "INVALID"},
		{"unknown content", export(officer, "movies", "none", "taker"), "KEY_NOT_FOUND"},
	} {
		t.Run(test.name, func(t *testing.T) { wantRefused(t, test.err, test.reason) })
	}
	for _, kid := range []byte{8, 9} {
		_, err := k.dial(t, everybody).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{bytes.Repeat([]byte{kid}, 16)}})
		wantRefused(t, err, "KEY_NOT_FOUND")
	}
	t.Run("content that XML cannot name", func(t *testing.T) {
		_, err := boss.ImportContentKeys(t.Context(), &v1.ImportContentKeysRequest{Category: "movies", ContentId: []byte{0, 255}, Keys: []*v1.ImportedContentKey{foreign("SD", 7, 0x97)}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = boss.ExportContentKeys(t.Context(), &v1.ExportContentKeysRequest{Category: "movies", ContentId: []byte{0, 255}, Recipient: "taker"})
		wantRefused(t, err, "INVALID")
	})
	wantNoKeys(t, k)
}

// What gRPC received of imported keys is wiped once it is decoded.
func TestImportLeavesMemory(t *testing.T) {
	req := &v1.ImportContentKeysRequest{Category: "movies"}
	for i := range byte(20) {
		req.Keys = append(req.Keys, foreign(fmt.Sprint("T", i), i+1, 0xc0+i))
	}
	wire, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	got := &v1.ImportContentKeysRequest{}
	if err := rpc.ReceiveForTest(wire, got); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, req) {
		t.Error("the decoded message is another one")
	}
	for _, key := range req.Keys {
		if bytes.Contains(wire, key.Key) {
			t.Fatal("a key is left in the buffer that it came in")
		}
	}
}
