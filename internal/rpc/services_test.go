package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
)

// TestWalk is the main job over the wire: a category, fresh keys, the callback.
func TestWalk(t *testing.T) {
	k := newKit(t, options{})
	created, err := k.dial(t, officer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies", Live: true})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := created.GetName(), "movies"; got != want {
		t.Errorf("category: got %q, want %q", got, want)
	}
	if got, want := created.GetMode(), v1.CategoryMode_CATEGORY_MODE_OPEN; got != want {
		t.Errorf("mode: got %v, want %v", got, want)
	}

	req := &v1.IssueContentKeysRequest{RequestId: "first", Category: "movies", ContentId: []byte("tears-of-steel"), Keys: []*v1.ContentKeySpec{
		{TrackType: "HD", Scheme: "cbcs"},
		{TrackType: "AUDIO", Scheme: "cenc", Period: &v1.Period{Index: 7}, Kid: bytes.Repeat([]byte{9}, 16)},
	}}
	issued, err := k.dial(t, packager).IssueContentKeys(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	again, err := k.dial(t, packager).IssueContentKeys(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := issued.GetRequestId(), "first"; got != want {
		t.Errorf("request ID: got %q, want %q", got, want)
	}
	kids := [][]byte{}
	for i, key := range issued.GetKeys() {
		if !key.GetCreated() || again.GetKeys()[i].GetCreated() {
			t.Errorf("key %d created: got %v, then %v; want true, then false", i, key.GetCreated(), again.GetKeys()[i].GetCreated())
		}
		checkKey(t, key.GetKey(), req.GetKeys()[i])
		kids = append(kids, key.GetKey().GetKid())
	}

	got, err := k.dial(t, provider).GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: kids, ContentId: []byte("tears-of-steel")})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(got.GetResults()), len(kids); got != want {
		t.Fatalf("results: got %d, want %d", got, want)
	}
	if len(got.GetRequestId()) != 36 {
		t.Errorf("request ID: got %q, want a UUID", got.GetRequestId())
	}
	for i, r := range got.GetResults() {
		if !bytes.Equal(r.GetKid(), kids[i]) {
			t.Errorf("result %d: got KID %x, want %x", i, r.GetKid(), kids[i])
		}
		checkKey(t, r.GetKey(), req.GetKeys()[i])
		if !bytes.Equal(r.GetKey().GetKey(), issued.GetKeys()[i].GetKey().GetKey()) || !bytes.Equal(r.GetKey().GetKey(), again.GetKeys()[i].GetKey().GetKey()) {
			t.Errorf("result %d: the key is not the one that was issued", i)
		}
	}
	if got := k.core.Arena().InUse(); got != 0 {
		t.Errorf("keys in clear once all is answered: got %d, want 0", got)
	}
}

// checkKey compares a delivered key with what was asked for, but for the bytes.
func checkKey(t *testing.T, key *v1.ContentKey, want *v1.ContentKeySpec) {
	t.Helper()
	if got := len(key.GetKey()); got != 16 || bytes.Equal(key.GetKey(), make([]byte, 16)) {
		t.Errorf("key: got %d bytes, want 16 that are not all zero", got)
	}
	if got := len(key.GetKid()); got != 16 {
		t.Errorf("KID: got %d bytes, want 16", got)
	}
	if len(want.GetKid()) > 0 && !bytes.Equal(key.GetKid(), want.GetKid()) {
		t.Errorf("KID: got %x, want %x", key.GetKid(), want.GetKid())
	}
	wantIV := 0
	if want.GetScheme() == "cbcs" {
		wantIV = 16
	}
	if got := len(key.GetIv()); got != wantIV {
		t.Errorf("IV of %s: got %d bytes, want %d", want.GetScheme(), got, wantIV)
	}
	if got, want := len(key.GetReceipt().GetLeafHash()), 32; got != want {
		t.Errorf("receipt: got a leaf hash of %d bytes, want %d", got, want)
	}
	wantRest := &v1.ContentKey{Kid: key.GetKid(), KeyMaterial: key.GetKeyMaterial(), Category: "movies", ContentId: []byte("tears-of-steel"),
		TrackType: want.GetTrackType(), Scheme: want.GetScheme(), Period: want.GetPeriod(), Generation: 1, Iv: key.GetIv(),
		CreateTime: key.GetCreateTime(), Receipt: key.GetReceipt()}
	if !proto.Equal(key, wantRest) {
		t.Errorf("got content key of %s/%s/%v, want %s/%s/%v", key.GetTrackType(), key.GetScheme(), key.GetPeriod(), want.GetTrackType(), want.GetScheme(), want.GetPeriod())
	}
	if key.GetCreateTime().AsTime().Year() < 2025 {
		t.Errorf("create time: got %v", key.GetCreateTime().AsTime())
	}
}

func TestPartialResults(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	keys := k.issue(t, "clip", "HD")
	missing := bytes.Repeat([]byte{7}, 16)
	wide := k.dial(t, everybody)

	resp, err := wide.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{missing, keys[0].GetKid()}})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := resp.GetResults()[0].GetError().GetReason(), "KEY_NOT_FOUND"; got != want {
		t.Errorf("first result: got %q, want %q", got, want)
	}
	if got, want := codes.Code(resp.GetResults()[0].GetError().GetCode()), codes.NotFound; got != want {
		t.Errorf("first result: got code %v, want %v", got, want)
	}
	if !bytes.Equal(resp.GetResults()[1].GetKey().GetKey(), keys[0].GetKey()) {
		t.Error("second result: the key is not the one that was issued")
	}
	_, err = wide.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{missing}})
	if got := wantRefused(t, err, "KEY_NOT_FOUND").Code; got != codes.NotFound {
		t.Errorf("code: got %v, want %v", got, codes.NotFound)
	}
	if got, want := k.counter(t, "custodian_data_integrity_alerts_total"), 2.0; got != want {
		t.Errorf("data integrity alerts: got %v, want %v", got, want)
	}
	if got, want := k.counter(t, "custodian_keys_released_total"), 1.0; got != want {
		t.Errorf("keys released: got %v, want %v", got, want)
	}
}

// TestUnknownLooksLikeDenied: who may not know hears the same of a key that is
// not granted and of one that does not exist.
func TestUnknownLooksLikeDenied(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	kid := k.issue(t, "clip", "HD")[0].GetKid()
	for _, who := range []string{stranger, packager} {
		cl := k.dial(t, who)
		var heard []*client.Error
		for _, asked := range [][]byte{kid, bytes.Repeat([]byte{7}, 16)} {
			_, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{RequestId: "same", Kids: [][]byte{asked}})
			heard = append(heard, wantRefused(t, err, "DENIED"))
		}
		if !proto.Equal(heard[0].GRPCStatus().Proto(), heard[1].GRPCStatus().Proto()) {
			t.Errorf("%s: got two answers:\n%v\n%v", who, heard[0].GRPCStatus(), heard[1].GRPCStatus())
		}
	}
}

func TestCustody(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	k.createCategory(t, "archive")
	keys := k.issue(t, "clip", "SD", "HD", "AUDIO")
	audits := k.dial(t, auditor)

	categories, err := audits.ListCategories(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(categories) != 2 || categories[0].GetName() != "archive" || categories[1].GetName() != "movies" {
		t.Errorf("categories: got %v, want archive and movies", categories)
	}
	versions, err := audits.ListKeyVersions(t.Context(), "movies")
	if err != nil {
		t.Fatal(err)
	}
	if len(versions) != 1 || versions[0].GetVersion() != 1 || versions[0].GetState() != v1.KeyState_KEY_STATE_ACTIVE ||
		versions[0].GetMekVersion() != 1 || len(versions[0].GetOuterWraps()) != 1 || versions[0].GetOuterWraps()[0].GetProvider() != "local" {
		t.Errorf("key versions: got %v, want version 1 ACTIVE under MEK 1 by local", versions)
	}
	info, err := audits.DescribeContentKey(t.Context(), keys[1].GetKid())
	if err != nil {
		t.Fatal(err)
	}
	want := &v1.ContentKeyInfo{Kid: keys[1].GetKid(), Category: "movies", ContentId: []byte("clip"), TrackType: "HD", Scheme: "cbcs", Generation: 1,
		Iv: keys[1].GetIv(), State: v1.KeyState_KEY_STATE_ACTIVE, Origin: v1.KeyOrigin_KEY_ORIGIN_GENERATED, KeyVersion: 1, BirthKeyVersion: 1,
		CreateTime: keys[1].GetCreateTime(), Revision: info.GetRevision()}
	if !proto.Equal(info, want) {
		t.Errorf("metadata: got %v, want %v", info, want)
	}

	listed := map[string]bool{}
	req := &v1.ListContentKeysRequest{Category: "movies", PageSize: 2}
	pages := 0
	for {
		page, err := audits.ListContentKeys(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		pages++
		for _, c := range page.GetContentKeys() {
			listed[string(c.GetKid())] = true
		}
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	if pages != 2 || len(listed) != 3 {
		t.Errorf("list: got %d keys on %d pages, want 3 on 2", len(listed), pages)
	}

	status, err := k.dial(t, operator).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := status.GetState(), v1.ServingState_SERVING_STATE_SERVING; got != want {
		t.Errorf("state: got %v, want %v", got, want)
	}
	if status.GetVersion() != "test" || status.GetStore().GetContentKeys() != 3 || status.GetCategories() != 2 || len(status.GetMeks()) != 1 ||
		status.GetAudit().GetEntries() == 0 || len(status.GetProviders()) != 1 || len(status.GetStoreId()) != 32 {
		t.Errorf("status: got %v, want 3 content keys in 2 categories under 1 MEK", status)
	}
}

func TestFreeze(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	kid := k.issue(t, "clip", "HD")[0].GetKid()
	boss, callback := k.dial(t, officer), k.dial(t, provider)
	get := &v1.GetContentKeysRequest{Kids: [][]byte{kid}}
	frozen, err := boss.SetCategoryMode(t.Context(), &v1.SetCategoryModeRequest{Category: "movies", Mode: v1.CategoryMode_CATEGORY_MODE_FROZEN, Cause: "drill"})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := frozen.GetMode(), v1.CategoryMode_CATEGORY_MODE_FROZEN; got != want {
		t.Errorf("mode: got %v, want %v", got, want)
	}
	_, err = callback.GetContentKeys(t.Context(), get)
	wantRefused(t, err, "CATEGORY_FROZEN")
	if _, err := boss.SetCategoryMode(t.Context(), &v1.SetCategoryModeRequest{Category: "movies", Mode: v1.CategoryMode_CATEGORY_MODE_OPEN, Cause: "over"}); err != nil {
		t.Fatal(err)
	}
	if _, err := callback.GetContentKeys(t.Context(), get); err != nil {
		t.Errorf("after the freeze: got %v, want the key", err)
	}
}

func TestBackup(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	k.issue(t, "clip", "HD")
	who, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var sealed bytes.Buffer
	ops := k.dial(t, operator)
	if err := ops.Backup(t.Context(), &v1.BackupRequest{Recipient: who.Recipient().String()}, &sealed); err != nil {
		t.Fatal(err)
	}
	plain, err := age.Decrypt(&sealed, who)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, plain)
	if err != nil {
		t.Fatal(err)
	}
	if n < 4096 {
		t.Errorf("backup: got %d bytes, want a store", n)
	}
	wantRefused(t, ops.Backup(t.Context(), &v1.BackupRequest{}, io.Discard), "INVALID")
	wantRefused(t, ops.Backup(t.Context(), &v1.BackupRequest{Recipient: "age1nonsense"}, io.Discard), "INVALID")
	wantRefused(t, k.dial(t, auditor).Backup(t.Context(), &v1.BackupRequest{Recipient: who.Recipient().String()}, io.Discard), "DENIED")
	full := &failingWriter{}
	err = ops.Backup(t.Context(), &v1.BackupRequest{Recipient: who.Recipient().String()}, full)
	if _, ok := errors.AsType[*client.Error](err); ok || !errors.Is(err, errDiskFull) {
		t.Errorf("backup to a full disk: got %v, want %v and no *client.Error", err, errDiskFull)
	}
}

var errDiskFull = fmt.Errorf("no space left on device")

type failingWriter struct{}

func (*failingWriter) Write([]byte) (int, error) { return 0, errDiskFull }

// TestConcurrentCallsGetTheirOwnKeys would see a key that was wiped, or given to
// another call, before it was encoded.
func TestConcurrentCallsGetTheirOwnKeys(t *testing.T) {
	k := newKit(t, options{config: func(c *rpcConfig) { c.RetrieveDeadline = time.Minute }})
	k.createCategory(t, "movies")
	var tracks []string
	for i := range 16 {
		tracks = append(tracks, fmt.Sprintf("T%d", i))
	}
	keys := k.issue(t, "clip", tracks...)
	var wg sync.WaitGroup
	for caller := range 16 {
		cl := k.dial(t, provider)
		wg.Go(func() {
			for round := range 20 {
				var kids [][]byte
				for i := range 1 + caller%8 {
					kids = append(kids, keys[(caller+round+i)%len(keys)].GetKid())
				}
				resp, err := cl.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: kids})
				if err != nil {
					t.Errorf("caller %d: %v", caller, err)
					return
				}
				for i, r := range resp.GetResults() {
					if !bytes.Equal(r.GetKey().GetKey(), keys[(caller+round+i)%len(keys)].GetKey()) {
						t.Errorf("caller %d round %d: result %d is not the key that was issued", caller, round, i)
					}
				}
			}
		})
	}
	wg.Wait()
	if got := k.core.Arena().InUse(); got != 0 {
		t.Errorf("keys in clear once all is answered: got %d, want 0", got)
	}
}

// TestRewrap: a job begins, is listed, and runs to its end; who may not is
// refused.
func TestRewrap(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	boss, ops := k.dial(t, officer), k.dial(t, operator)
	job, err := boss.SetProviders(t.Context(), &v1.SetProvidersRequest{Category: "movies", Providers: []string{"local"}, Cause: "drill"})
	if err != nil {
		t.Fatal(err)
	}
	if job.GetCategory() != "movies" || job.GetTotal() != 1 || job.GetRequestedBy() == "" || job.GetBeginTime() == nil || !slices.Equal(job.GetProviders(), []string{"local"}) {
		t.Errorf("the job: got %v", job)
	}
	if job, err = ops.Reencrypt(t.Context(), &v1.ReencryptRequest{HelperKeys: true, Cause: "drill"}); err != nil {
		t.Fatal(err)
	}
	if job.GetCategory() != "" || job.GetTotal() != 3 || !slices.Equal(job.GetReencrypt(), []string{"local"}) {
		t.Errorf("the job of the helper keys: got %v", job)
	}
	jobs, err := ops.ListRewraps(t.Context())
	if err != nil || len(jobs) != 2 || jobs[0].GetCategory() != "" || jobs[1].GetCategory() != "movies" {
		t.Errorf("jobs: got %v, %v, want that of the helper keys and that of movies", jobs, err)
	}
	status, err := ops.Status(t.Context())
	if err != nil || len(status.GetRewraps()) != 2 {
		t.Errorf("jobs in the status: got %v, %v, want two", status.GetRewraps(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { k.core.RunRewraps(ctx) })
	defer running.Wait()
	defer cancel()
	for limit := time.Now().Add(10 * time.Second); len(jobs) > 0 && time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		if jobs, err = ops.ListRewraps(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(jobs) > 0 {
		t.Errorf("the jobs do not end: %v", jobs)
	}
	_, err = ops.SetProviders(t.Context(), &v1.SetProvidersRequest{Category: "movies", Providers: []string{"local"}})
	wantRefused(t, err, "DENIED")
	_, err = boss.SetProviders(t.Context(), &v1.SetProvidersRequest{Category: "movies"})
	wantRefused(t, err, "INVALID")
	_, err = k.dial(t, packager).ListRewraps(t.Context())
	wantRefused(t, err, "DENIED")
	_, err = k.dial(t, packager).Reencrypt(t.Context(), &v1.ReencryptRequest{Category: "movies"})
	wantRefused(t, err, "DENIED")
}
