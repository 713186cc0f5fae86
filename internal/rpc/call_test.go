package rpc_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keycustody/custodian/custodian"
)

// A status that another system's client made, of a KMS for one, is not passed on.
func TestForeignStatusStaysInside(t *testing.T) {
	foreign := status.Error(codes.PermissionDenied, "projects/film/keyRings/root is not yours")
	for _, test := range []struct {
		name string
		err  error
		want custodian.Reason
	}{
		{"classified", fmt.Errorf("%w: %w", custodian.ErrKMSUnavailable, foreign), "KMS_UNAVAILABLE"},
		{"classified last", fmt.Errorf("open: %w", errors.Join(foreign, custodian.ErrKMSUnavailable)), "KMS_UNAVAILABLE"},
		{"not classified", fmt.Errorf("open: %w", foreign), "INTERNAL"},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := newKit(t, options{})
			k.server.SetCustody(&troubled{Custody: k.core, categories: test.err})
			_, err := k.dial(t, operator).ListCategories(t.Context())
			e := wantRefused(t, err, test.want)
			if strings.Contains(e.Error(), "keyRings") {
				t.Errorf("the caller hears the other system's words: %v", e)
			}
			if got := k.log.String(); !strings.Contains(got, "keyRings") {
				t.Errorf("log: got %q, want the real error", got)
			}
		})
	}
}
