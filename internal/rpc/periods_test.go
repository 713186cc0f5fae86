package rpc_test

import (
	"bytes"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// A provider that plays one period finds the next one's key before it begins.
func TestListKeyPeriods(t *testing.T) {
	k := newKit(t, options{})
	k.createCategory(t, "movies")
	req := &v1.IssueContentKeysRequest{Category: "movies", ContentId: []byte("channel")}
	for i := range 70 {
		req.Keys = append(req.Keys, &v1.ContentKeySpec{TrackType: "HD", Scheme: "cbcs", Period: &v1.Period{Index: uint32(i),
			StartTime: &timestamppb.Timestamp{Seconds: int64(60 * i)}, EndTime: &timestamppb.Timestamp{Seconds: int64(60*i + 60)}}})
	}
	issued, err := k.dial(t, packager).IssueContentKeys(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	kid := func(i int) []byte { return issued.Keys[i].Key.Kid }
	p := k.dial(t, provider)
	for _, test := range []struct {
		from  int
		limit uint32
		want  int // periods
	}{{0, 0, 64}, {0, 64, 64}, {68, 0, 2}, {7, 2, 2}, {69, 64, 1}} {
		t.Run(fmt.Sprintf("%d from %d", test.limit, test.from), func(t *testing.T) {
			got, err := p.ListKeyPeriods(t.Context(), &v1.ListKeyPeriodsRequest{Kid: kid(test.from), Limit: test.limit})
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Periods) != test.want || len(got.RequestId) != 36 {
				t.Fatalf("got %d periods with request ID %q, want %d with a UUID", len(got.Periods), got.RequestId, test.want)
			}
			for i, period := range got.Periods {
				if !bytes.Equal(period.Kid, kid(test.from+i)) || !proto.Equal(period.Period, req.Keys[test.from+i].Period) {
					t.Errorf("place %d: got %v", i, period)
				}
			}
		})
	}
	next, err := p.GetContentKeys(t.Context(), &v1.GetContentKeysRequest{Kids: [][]byte{kid(8)}})
	if err != nil || !bytes.Equal(next.Results[0].GetKey().GetKey(), issued.Keys[8].Key.GetKey()) {
		t.Errorf("the next period's key: got another one, or %v", err)
	}
	for _, test := range []struct {
		name   string
		who    string
		req    *v1.ListKeyPeriodsRequest
		reason string
		code   codes.Code
	}{
		{"a KID of 15 bytes", everybody, &v1.ListKeyPeriodsRequest{Kid: make([]byte, 15)}, "INVALID", codes.InvalidArgument},
		{"no KID", provider, &v1.ListKeyPeriodsRequest{}, "INVALID", codes.InvalidArgument},
		{"too many", provider, &v1.ListKeyPeriodsRequest{Kid: kid(0), Limit: 65}, "INVALID", codes.InvalidArgument},
		{"a packager", packager, &v1.ListKeyPeriodsRequest{Kid: kid(0)}, "DENIED", codes.PermissionDenied},
		{"unknown, to who may not know", provider, &v1.ListKeyPeriodsRequest{Kid: bytes.Repeat([]byte{9}, 16)}, "DENIED", codes.PermissionDenied},
		{"unknown, to who may know", everybody, &v1.ListKeyPeriodsRequest{Kid: bytes.Repeat([]byte{9}, 16)}, "KEY_NOT_FOUND", codes.NotFound},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := k.dial(t, test.who).ListKeyPeriods(t.Context(), test.req)
			if e := wantRefused(t, err, custodian.Reason(test.reason)); e.Code != test.code {
				t.Errorf("got %v, want %v", e.Code, test.code)
			}
		})
	}
}
