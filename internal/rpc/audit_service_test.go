package rpc_test

import (
	"bytes"
	"crypto"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// auditKey is the key that an auditor hands out.
func auditKey(t testing.TB, c *client.Client) crypto.PublicKey {
	t.Helper()
	got, err := c.GetCheckpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key, err := client.ParseAuditKey(checkpoint.FormatKey(got.GetSigningKey().GetPublicKey()))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// A packager and a provider can check their receipts with the key alone; with
// an auditor's proof they see that it is their entry.
func TestReceipts(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	keys := k.issue(t, "film-1", "SD", "HD")
	ctx := t.Context()
	auditor := k.dial(t, auditor)
	key := auditKey(t, auditor)
	released, err := k.dial(t, provider).GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{keys[0].GetKid()}})
	if err != nil {
		t.Fatal(err)
	}
	receipts := []*v1.Receipt{keys[0].GetReceipt(), keys[1].GetReceipt(), released.GetResults()[0].GetKey().GetReceipt()}
	for i, r := range receipts {
		first, err := client.VerifyReceipt(r, key)
		if err != nil {
			t.Fatalf("receipt %d: %v", i, err)
		}
		proof, err := auditor.GetInclusionProof(ctx, &v1.GetInclusionProofRequest{Index: r.GetIndex()})
		if err != nil {
			t.Fatal(err)
		}
		if c, err := client.VerifyInclusion(r, proof, key); err != nil || c.Size < first.Size {
			t.Errorf("receipt %d: %+v, %v", i, c, err)
		}
		e, err := audit.UnmarshalEntry(proof.GetEntry())
		if err != nil || e.Category != "movies" || e.Outcome != audit.Allowed {
			t.Errorf("receipt %d: entry = %+v, %v", i, e, err)
		}
		consistent, err := auditor.GetConsistencyProof(ctx, &v1.GetConsistencyProofRequest{OldSize: first.Size})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.VerifyConsistency(first, consistent, key); err != nil {
			t.Errorf("receipt %d: %v", i, err)
		}
		forked := first
		forked.Root[0]++
		if _, err := client.VerifyConsistency(forked, consistent, key); !errors.Is(err, client.ErrReceipt) {
			t.Errorf("receipt %d of another history: error = %v, want ErrReceipt", i, err)
		}
		for what, change := range map[string]func(r *v1.Receipt){
			"index":      func(r *v1.Receipt) { r.Index++ },
			"leaf":       func(r *v1.Receipt) { r.LeafHash[3] ^= 1 },
			"checkpoint": func(r *v1.Receipt) { r.Checkpoint = nil },
			"signature":  func(r *v1.Receipt) { r.Checkpoint[len(r.Checkpoint)-9] ^= 1 },
		} {
			bad := proto.Clone(r).(*v1.Receipt)
			change(bad)
			if _, err := client.VerifyInclusion(bad, proof, key); !errors.Is(err, client.ErrReceipt) {
				t.Errorf("receipt %d with another %s: error = %v, want ErrReceipt", i, what, err)
			}
		}
	}
	// Somebody else's key does not do.
	other := newKit(t, options{})
	if _, err := client.VerifyReceipt(receipts[0], auditKey(t, other.dial(t, "auditor/ada"))); !errors.Is(err, client.ErrReceipt) {
		t.Errorf("another key: error = %v, want ErrReceipt", err)
	}
}

// An auditor finds entries by what they are about, page by page.
func TestListEntries(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	keys := k.issue(t, "film-1", "SD", "HD")
	ctx := t.Context()
	for range 3 {
		if _, err := k.dial(t, provider).GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{keys[0].GetKid()}}); err != nil {
			t.Fatal(err)
		}
	}
	c := k.dial(t, auditor)
	list := func(req *v1.ListEntriesRequest) (entries []audit.Entry) {
		t.Helper()
		for {
			resp, err := c.ListAuditEntries(ctx, req)
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range resp.GetEntries() {
				e, err := audit.UnmarshalEntry(b)
				if err != nil {
					t.Fatal(err)
				}
				entries = append(entries, e)
			}
			if req.FromIndex = resp.GetNextIndex(); req.FromIndex == 0 {
				return entries
			}
		}
	}
	for _, tt := range []struct {
		name string
		req  *v1.ListEntriesRequest
		want int
	}{
		{"who was given this key", &v1.ListEntriesRequest{Kid: keys[0].GetKid(), Action: "release", Outcome: v1.AuditOutcome_AUDIT_OUTCOME_ALLOWED, PageSize: 2}, 3},
		{"which keys did this caller get", &v1.ListEntriesRequest{Caller: identity(packager), Action: "issue", PageSize: 1}, 2},
		{"all under a version", &v1.ListEntriesRequest{KeyVersion: "movies/1", Action: "release"}, 3},
		{"by content", &v1.ListEntriesRequest{ContentId: []byte("film-1"), Category: "movies"}, 5},
		{"later", &v1.ListEntriesRequest{SinceTime: timestamppb.New(time.Now().Add(24 * 365 * 100 * time.Hour))}, 0},
		{"denied", &v1.ListEntriesRequest{Outcome: v1.AuditOutcome_AUDIT_OUTCOME_DENIED}, 0},
	} {
		got := list(tt.req)
		if len(got) != tt.want {
			t.Errorf("%s: %d entries, want %d", tt.name, len(got), tt.want)
		}
		for i := 1; i < len(got); i++ {
			if got[i].Index <= got[i-1].Index {
				t.Errorf("%s: entry %d follows entry %d", tt.name, got[i].Index, got[i-1].Index)
			}
		}
	}
	if all := list(&v1.ListEntriesRequest{PageSize: 3}); len(all) < 7 || all[len(all)-1].Index != uint64(len(all)-1) {
		t.Errorf("%d entries, the last one is %+v", len(all), all[len(all)-1])
	}
	for what, req := range map[string]*v1.ListEntriesRequest{
		"page size": {PageSize: 1001}, "outcome": {Outcome: 9}, "kid": {Kid: bytes.Repeat([]byte{1}, 15)}, "time": {SinceTime: &timestamppb.Timestamp{Nanos: -1}},
	} {
		if _, err := c.ListAuditEntries(ctx, req); codeOf(err) != codes.InvalidArgument {
			t.Errorf("%s: error = %v, want INVALID_ARGUMENT", what, err)
		}
	}
	if _, err := c.GetInclusionProof(ctx, &v1.GetInclusionProofRequest{Index: 1 << 40}); codeOf(err) != codes.InvalidArgument {
		t.Errorf("an entry that is not there: error = %v, want INVALID_ARGUMENT", err)
	}
}

// What a caller says of the viewer is found by it, and is not in the entry.
func TestViewerContext(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	key := k.issue(t, "film-1", "SD")[0]
	ctx := t.Context()
	if _, err := k.dial(t, provider).GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{key.GetKid()},
		ViewerContext: &v1.ViewerContext{SessionId: "session-1", UserId: "user-1"}}); err != nil {
		t.Fatal(err)
	}
	c := k.dial(t, auditor)
	for want, req := range map[int]*v1.ListEntriesRequest{
		1: {SessionId: "session-1", Action: "release"},
		2: {UserId: "user-1"}, // with the entry of this search
		0: {SessionId: "user-1", Action: "release"},
	} {
		got, err := c.ListAuditEntries(ctx, req)
		if err != nil || len(got.GetEntries()) != want {
			t.Fatalf("%v: %d entries, %v, want %d", req, len(got.GetEntries()), err, want)
		}
		for _, b := range got.GetEntries() {
			if bytes.Contains(b, []byte("session-1")) || bytes.Contains(b, []byte("user-1")) {
				t.Errorf("the entry %q has an ID in clear", b)
			}
		}
	}
	if _, err := c.ListAuditEntries(ctx, &v1.ListEntriesRequest{SessionId: "a", UserId: "b"}); codeOf(err) != codes.InvalidArgument {
		t.Errorf("session and user: %v, want INVALID_ARGUMENT", err)
	}
}

// A follower gets what there is, and then what is written, in order, and with a
// filter only what that picks; when the daemon stops it hears so at once.
func TestFollowEntries(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	k.issue(t, "film-1", "SD")
	c := k.dial(t, auditor)
	type follower struct {
		got   chan audit.Entry
		ended chan error
	}
	follow := func(q *v1.ListEntriesRequest) follower {
		f := follower{make(chan audit.Entry, 1000), make(chan error, 1)}
		go func() {
			f.ended <- c.FollowAuditEntries(t.Context(), &v1.FollowEntriesRequest{Query: q}, func(b []byte) error {
				e, err := audit.UnmarshalEntry(b)
				f.got <- e
				return err
			})
		}()
		return f
	}
	next := func(f follower) audit.Entry {
		t.Helper()
		select {
		case e := <-f.got:
			return e
		case err := <-f.ended:
			t.Fatalf("the stream ended: %v", err)
		case <-time.After(10 * time.Second):
			t.Fatal("nothing came for ten seconds")
		}
		return audit.Entry{}
	}
	all, issues := follow(nil), follow(&v1.ListEntriesRequest{Action: "issue"})
	if e := next(issues); string(e.ContentID) != "film-1" {
		t.Errorf("the first issue is %+v", e)
	}
	k.issue(t, "film-2", "SD", "HD")
	for _, track := range []string{"SD", "HD"} {
		if e := next(issues); string(e.ContentID) != "film-2" || e.TrackType != track {
			t.Errorf("the next issue is %+v", e)
		}
	}
	for want := uint64(0); ; want++ {
		e := next(all)
		if e.Index != want {
			t.Fatalf("entry %d came, want %d", e.Index, want)
		}
		if string(e.ContentID) == "film-2" && e.TrackType == "HD" {
			break
		}
	}
	if err := k.dial(t, operator).FollowAuditEntries(t.Context(), &v1.FollowEntriesRequest{}, func([]byte) error { return nil }); codeOf(err) != codes.PermissionDenied {
		t.Errorf("an operator: %v, want PERMISSION_DENIED", err)
	}
	if err := c.FollowAuditEntries(t.Context(), &v1.FollowEntriesRequest{Query: &v1.ListEntriesRequest{Kid: []byte{1}}}, nil); codeOf(err) != codes.InvalidArgument {
		t.Errorf("half a KID: %v, want INVALID_ARGUMENT", err)
	}
	began := time.Now()
	k.stop()
	for _, f := range []follower{all, issues} {
		select {
		case err := <-f.ended:
			if codeOf(err) != codes.Unavailable {
				t.Errorf("when the daemon stops: %v, want UNAVAILABLE", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("a follower does not hear that the daemon stops")
		}
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %s; followers hold the daemon up", took)
	}
}

// Only auditors read the audit log.
func TestAuditIsForAuditors(t *testing.T) {
	k := newKit(t, options{})
	ctx := t.Context()
	for _, who := range []string{packager, provider, officer, operator, stranger} {
		c := k.dial(t, who)
		_, checkpointErr := c.GetCheckpoint(ctx)
		_, proofErr := c.GetInclusionProof(ctx, &v1.GetInclusionProofRequest{})
		_, consistencyErr := c.GetConsistencyProof(ctx, &v1.GetConsistencyProofRequest{OldSize: 1})
		_, listErr := c.ListAuditEntries(ctx, &v1.ListEntriesRequest{})
		for i, err := range []error{checkpointErr, proofErr, consistencyErr, listErr} {
			if codeOf(err) != codes.PermissionDenied {
				t.Errorf("%s, call %d: error = %v, want PERMISSION_DENIED", who, i, err)
			}
		}
	}
}

func codeOf(err error) codes.Code {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return codes.OK
}

// An answer about entries that were pruned says so, and one about later ones
// does not.
func TestListPruned(t *testing.T) {
	k := newKit(t, options{audit: func(o *audit.Options) { o.SegmentSize = 4 << 10 }})
	k.createCategory(t, "movies")
	kid := k.issue(t, "film-1", "SD")[0].GetKid()
	ctx := t.Context()
	p, a := k.dial(t, provider), k.dial(t, auditor)
	release := func(n int) {
		t.Helper()
		for range n {
			if _, err := p.GetContentKeys(ctx, &v1.GetContentKeysRequest{Kids: [][]byte{kid}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	ask := func(from uint64) uint64 {
		t.Helper()
		resp, err := a.ListAuditEntries(ctx, &v1.ListEntriesRequest{FromIndex: from, Action: "release"})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetPrunedBeforeIndex()
	}
	release(20)
	if got := ask(0); got != 0 {
		t.Errorf("nothing is pruned: got entries before %d", got)
	}
	pruned, err := audit.Prune(ctx, filepath.Join(k.dir, "audit"), audit.PruneOptions{Keep: custodian.KeepInLog})
	if err != nil || len(pruned) == 0 {
		t.Fatalf("pruned %v, %v", pruned, err)
	}
	release(1) // the log notices
	last := pruned[len(pruned)-1]
	want := last.First + last.Entries
	if got := ask(0); got != want {
		t.Errorf("from the beginning: got entries before %d, want %d", got, want)
	}
	if got := ask(want); got != 0 {
		t.Errorf("from behind them: got entries before %d, want none", got)
	}
}
