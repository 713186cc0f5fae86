package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/sealing"
)

// sealedKit is a kit where keys of provider, everybody and packager are sealed
// to the keys that are returned, and keys of the category frozen leave only
// sealed.
func sealedKit(t *testing.T) (*kit, map[string][]client.RecipientKey) {
	t.Helper()
	keys := map[string][]client.RecipientKey{}
	var s custodian.Sealing
	for who, kems := range map[string][]string{provider: {sealing.X25519, sealing.MLKEM768X25519}, packager: {sealing.MLKEM768X25519}} {
		to := custodian.Recipient{Identity: identity(who)}
		for _, kem := range kems {
			k, err := client.GenerateRecipientKey(kem)
			if err != nil {
				t.Fatal(err)
			}
			public, err := sealing.ParsePublicKey(k.Public())
			if err != nil {
				t.Fatal(err)
			}
			keys[who], to.Keys = append(keys[who], k), append(to.Keys, public)
		}
		s.Recipients = append(s.Recipients, to)
	}
	s.Require = []custodian.CategoryName{"frozen"}
	k := newKit(t, options{custody: func(c *custodian.Config) {
		p, err := c.Policy.WithSealing(s)
		if err != nil {
			t.Fatal(err)
		}
		c.Policy = p
	}})
	k.createCategory(t, "movies")
	k.createCategory(t, "frozen")
	return k, keys
}

// with is dial for a client that has recipient keys.
func (k *kit) with(t *testing.T, who string, keys ...client.RecipientKey) *client.Client {
	t.Helper()
	c, err := k.config(who)
	if err != nil {
		t.Fatal(err)
	}
	c.RecipientKeys = keys
	cl, err := client.Dial(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

// TestSealed: what the caller's client opens is the key that was issued, and
// the answer itself does not have it.
func TestSealed(t *testing.T) {
	k, keys := sealedKit(t)
	issue := &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("clip"), Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cbcs"}, {TrackType: "SD", Scheme: "cenc", Period: &v1.Period{Index: 3}}}}
	issued, err := k.with(t, packager, keys[packager]...).IssueContentKeys(t.Context(), issue)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := k.dial(t, packager).IssueContentKeys(t.Context(), issue)
	if err != nil {
		t.Fatal(err)
	}
	get := &v1.GetContentKeysRequest{}
	for i, key := range issued.GetKeys() {
		get.Kids = append(get.Kids, key.GetKey().GetKid())
		checkHidden(t, raw, raw.GetKeys()[i].GetKey(), key.GetKey().GetKey(), keys[packager][0].ID())
	}
	for _, use := range []struct {
		name, ask string
		want      client.RecipientKey
	}{{"the first", "", keys[provider][0]}, {"the one that is asked for", keys[provider][1].ID(), keys[provider][1]}} {
		get.RecipientKeyId = use.ask
		opened, err := k.with(t, provider, use.want).GetContentKeys(t.Context(), get)
		if err != nil {
			t.Fatalf("%s: %v", use.name, err)
		}
		hidden, err := k.dial(t, provider).GetContentKeys(t.Context(), get)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range opened.GetResults() {
			want := issued.GetKeys()[i].GetKey().GetKey()
			if !bytes.Equal(r.GetKey().GetKey(), want) {
				t.Errorf("%s: result %d: the key is not the one that was issued", use.name, i)
			}
			checkHidden(t, hidden, hidden.GetResults()[i].GetKey(), want, use.want.ID())
		}
	}
	if got := k.core.Arena().InUse(); got != 0 {
		t.Errorf("keys in clear once all is answered: got %d, want 0", got)
	}
	sealedTo := 0
	if err := audit.Read(k.dir+"/audit", 0, func(e *audit.Entry) error {
		if e.Action == "release" && e.Detail == "sealed to "+keys[provider][1].ID() {
			sealedTo++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if want := 4; sealedTo != want {
		t.Errorf("entries that say which recipient key: got %d, want %d", sealedTo, want)
	}
}

// checkHidden says whether an answer has the key sealed to id, and not in clear.
func checkHidden(t *testing.T, answer proto.Message, key *v1.ContentKey, clear []byte, id string) {
	t.Helper()
	wire, err := proto.Marshal(answer)
	if err != nil {
		t.Fatal(err)
	}
	if len(clear) != 16 || bytes.Contains(wire, clear) {
		t.Error("the answer has the key in clear")
	}
	if got := key.GetSealedKey().GetRecipientKeyId(); got != id {
		t.Errorf("sealed to: got %q, want %q", got, id)
	}
}

// TestSealedIsBound: a proxy cannot make one answer into another.
func TestSealedIsBound(t *testing.T) {
	k, keys := sealedKit(t)
	issue := func(track string) *v1.ContentKey {
		resp, err := k.dial(t, packager).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{RequestId: "req-1", Category: "movies", ContentId: []byte("clip"),
			Keys: []*v1.ContentKeySpec{{TrackType: track, Scheme: "cbcs"}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetKeys()[0].GetKey()
	}
	hd, sd := issue("HD"), issue("SD")
	own := keys[packager][0]
	for name, change := range map[string]func(*v1.ContentKey){
		"another key":        func(c *v1.ContentKey) { c.GetSealedKey().Sealed = sd.GetSealedKey().GetSealed() },
		"another KID":        func(c *v1.ContentKey) { c.Kid = sd.GetKid() },
		"another generation": func(c *v1.ContentKey) { c.Generation = 2 },
		"another IV":         func(c *v1.ContentKey) { c.Iv = sd.GetIv() },
		"another track type": func(c *v1.ContentKey) { c.TrackType = "UHD1" },
		"another caller":     func(c *v1.ContentKey) { c.GetSealedKey().Caller = identity(provider) },
		"in clear":           func(c *v1.ContentKey) { c.KeyMaterial = &v1.ContentKey_Key{Key: make([]byte, 16)} },
	} {
		c := proto.CloneOf(hd)
		change(c)
		if err := own.Open(c, "req-1"); !errors.Is(err, client.ErrSealed) {
			t.Errorf("%s: got %v, want %v", name, err, client.ErrSealed)
		}
	}
	if err := own.Open(proto.CloneOf(hd), "req-2"); !errors.Is(err, client.ErrSealed) {
		t.Errorf("the answer to another request: got %v, want %v", err, client.ErrSealed)
	}
	if err := own.Open(hd, "req-1"); err != nil {
		t.Errorf("unchanged: got %v, want the key", err)
	}
	// A client that has recipient keys takes no key that is not sealed to them.
	if _, err := k.with(t, packager, keys[provider]...).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("clip"),
		Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cbcs"}}}); !errors.Is(err, client.ErrSealed) {
		t.Errorf("sealed to another key: got %v, want %v", err, client.ErrSealed)
	}
	if _, err := k.with(t, everybody, keys[provider]...).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{hd.GetKid()}}); !errors.Is(err, client.ErrSealed) {
		t.Errorf("answered in clear: got %v, want %v", err, client.ErrSealed)
	}
}

// TestRequireSealed: no key of such a category leaves in clear.
func TestRequireSealed(t *testing.T) {
	k, keys := sealedKit(t)
	resp, err := k.with(t, packager, keys[packager]...).IssueContentKeys(t.Context(), &v1.IssueContentKeysRequest{Category: "frozen", ContentId: []byte("secret"),
		Keys: []*v1.ContentKeySpec{{TrackType: "HD", Scheme: "cenc"}}})
	if err != nil {
		t.Fatal(err)
	}
	get := &v1.GetContentKeysRequest{Kids: [][]byte{resp.GetKeys()[0].GetKey().GetKid()}}
	if _, err := k.with(t, provider, keys[provider]...).GetContentKeys(t.Context(), get); err != nil {
		t.Errorf("with a recipient key: got %v, want the key", err)
	}
	// everybody may have every key, but has no recipient key.
	_, err = k.dial(t, everybody).GetContentKeys(t.Context(), get)
	wantRefused(t, err, "SEALING_REQUIRED")
	get.RecipientKeyId = keys[provider][0].ID()
	_, err = k.dial(t, everybody).GetContentKeys(t.Context(), get)
	if e := wantRefused(t, err, "INVALID"); e.Field != "recipient_key_id" {
		t.Errorf("the recipient key of another: got field %q, want recipient_key_id", e.Field)
	}
	// A front door that cannot carry sealed keys gets none.
	who := custodian.Caller{ID: identity(packager), Roles: []custodian.Role{custodian.RolePackager}}
	issued, err := k.core.Issue(context.Background(), who, custodian.IssueRequest{Category: "frozen", ContentID: custodian.ContentID("secret"), Keys: []custodian.KeySpec{{TrackType: "HD", Scheme: "cenc"}}})
	if !errors.Is(err, custodian.ErrSealingRequired) || len(issued) != 0 {
		t.Errorf("a front door that carries no sealed keys: got %d keys and %v, want %v", len(issued), err, custodian.ErrSealingRequired)
	}
}

func TestSealingFaults(t *testing.T) {
	k, err := client.GenerateRecipientKey(sealing.X25519)
	if err != nil {
		t.Fatal(err)
	}
	public, err := sealing.ParsePublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	_, err = new(custodian.Policy).WithSealing(custodian.Sealing{Require: []custodian.CategoryName{"No Such"}, Recipients: []custodian.Recipient{
		{Identity: "a", Keys: []sealing.PublicKey{public}}, {Identity: "b", Keys: []sealing.PublicKey{public}}, {Identity: "a"}, {}}})
	if err == nil {
		t.Fatal("got no error")
	}
	for _, want := range []string{"sealing.require_sealed[0]", "sealing.recipients[1].keys[0]: the same key as sealing.recipients[0].keys[0]",
		"sealing.recipients[2].identity: a is there twice", "sealing.recipients[2].keys: empty", "sealing.recipients[3].identity: empty"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
}
