package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/rpc"
)

// A contractRow is what a caller hears of an error.
type contractRow struct {
	err   error
	want  codes.Code
	http  int
	retry bool
}

// The table of docs/DESIGN.md, section "What the caller hears".
var contract = []contractRow{
	{custodian.ErrKeyNotFound, codes.NotFound, 404, false},
	{custodian.ErrCategoryNotFound, codes.NotFound, 404, false},
	{custodian.ErrDenied, codes.PermissionDenied, 403, false},
	{custodian.ErrCallerFrozen, codes.PermissionDenied, 403, false},
	{custodian.ErrTokenMissing, codes.Unauthenticated, 401, false},
	{custodian.ErrTokenInvalid, codes.Unauthenticated, 401, false},
	{custodian.ErrTokenExpired, codes.Unauthenticated, 401, false},
	{custodian.ErrTokenMismatch, codes.Unauthenticated, 401, false},
	{custodian.ErrTokenReplayed, codes.Unauthenticated, 401, false},
	{custodian.ErrTokenRevoked, codes.Unauthenticated, 401, false},
	{custodian.ErrTokenKeys, codes.Unavailable, 503, true},
	{custodian.ErrKeyState, codes.FailedPrecondition, 409, false},
	{custodian.ErrKeyCompromised, codes.FailedPrecondition, 409, false},
	{custodian.ErrCategoryFrozen, codes.FailedPrecondition, 409, false},
	{custodian.ErrSealingRequired, codes.FailedPrecondition, 409, false},
	{custodian.ErrMEKExpired, codes.FailedPrecondition, 409, false},
	{custodian.ErrRotationState, codes.FailedPrecondition, 409, false},
	{custodian.ErrKEKExhausted, codes.FailedPrecondition, 409, false},
	{custodian.ErrKeyDestroyed, codes.NotFound, 410, false},
	{custodian.ErrKIDConflict, codes.AlreadyExists, 409, false},
	{custodian.ErrKeyConflict, codes.AlreadyExists, 409, false},
	{custodian.ErrContentCategory, codes.AlreadyExists, 409, false},
	{custodian.ErrCategoryExists, codes.AlreadyExists, 409, false},
	{custodian.ErrInvalid, codes.InvalidArgument, 400, false},
	{custodian.ErrRate, codes.ResourceExhausted, 429, true},
	{custodian.ErrKIDBudget, codes.ResourceExhausted, 429, true},
	{custodian.ErrKMSUnavailable, codes.Unavailable, 503, true},
	{custodian.ErrHSMUnavailable, codes.Unavailable, 503, true},
	{custodian.ErrStoreUnavailable, codes.Unavailable, 503, true},
	{custodian.ErrAuditBlocked, codes.Unavailable, 503, true},
	{custodian.ErrRecordCorrupt, codes.DataLoss, 500, false},
	{custodian.ErrDeadline, codes.DeadlineExceeded, 504, false},
	{custodian.ErrStarting, codes.Unavailable, 503, true},
	{custodian.ErrUninitialised, codes.Unavailable, 503, true},
	{custodian.ErrSealed, codes.Unavailable, 503, true},
	{custodian.ErrQuorum, codes.FailedPrecondition, 409, false},
	{custodian.ErrApproval, codes.PermissionDenied, 403, false},
	{custodian.ErrPlan, codes.FailedPrecondition, 409, false},
	{custodian.ErrCeremonyState, codes.FailedPrecondition, 409, false},
	{custodian.ErrCeremonyNotFound, codes.NotFound, 404, false},
	{custodian.ErrClock, codes.Unavailable, 503, true},
}

func TestContract(t *testing.T) {
	for _, row := range contract {
		reason := custodian.ReasonOf(row.err)
		t.Run(string(reason), func(t *testing.T) {
			err := fmt.Errorf("unwrap: slot 7: token 0123: %w", row.err)
			st := rpc.StatusOf(t.Context(), err)
			if got := st.Code(); got != row.want {
				t.Errorf("code: got %v, want %v", got, row.want)
			}
			info, retry := details(t, st)
			if got := info.GetReason(); got != string(reason) {
				t.Errorf("reason: got %q, want %q", got, reason)
			}
			if got, want := info.GetDomain(), "custodian"; got != want {
				t.Errorf("domain: got %q, want %q", got, want)
			}
			if got := retry != nil; got != row.retry {
				t.Errorf("has RetryInfo: got %v, want %v", got, row.retry)
			}
			if retry != nil && retry.GetRetryDelay().AsDuration() <= 0 {
				t.Errorf("retry delay: got %v, want more than zero", retry.GetRetryDelay().AsDuration())
			}
			// What went wrong inside is nobody's business outside.
			if got := st.Message(); got == "" || got == err.Error() {
				t.Errorf("message: got %q, want a sentence without our own error", got)
			}
			refusal := rpc.Explain(t.Context(), err)
			if got := refusal.HTTPStatus; got != row.http {
				t.Errorf("http: got %d, want %d", got, row.http)
			}
			if got := refusal.RetryAfter > 0; got != row.retry {
				t.Errorf("has Retry-After: got %v, want %v", got, row.retry)
			}
		})
	}
}

// TestEverySentinelHasARow reads the sentinels from their source, so that a new
// one cannot be forgotten here.
func TestEverySentinelHasARow(t *testing.T) {
	reasons := declaredReasons(t, "../../custodian/errors.go")
	if len(reasons) < 20 {
		t.Fatalf("got %d reasons in the source, want them all", len(reasons))
	}
	known := rpc.Reasons()
	for _, reason := range reasons {
		if !slices.Contains(known, custodian.Reason(reason)) {
			t.Errorf("%s: got no row in the table", reason)
		}
		if !slices.ContainsFunc(contract, func(r contractRow) bool { return string(custodian.ReasonOf(r.err)) == reason }) {
			t.Errorf("%s: got no row in this test", reason)
		}
	}
}

func declaredReasons(t *testing.T, file string) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var reasons []string
	ast.Inspect(f, func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		name, ok := lit.Type.(*ast.Ident)
		if !ok || name.Name != "refusal" || len(lit.Elts) == 0 {
			return true
		}
		if s, ok := lit.Elts[0].(*ast.BasicLit); ok {
			reason, err := strconv.Unquote(s.Value)
			if err != nil {
				t.Fatal(err)
			}
			reasons = append(reasons, reason)
		}
		return true
	})
	return reasons
}

func TestExplain(t *testing.T) {
	expired, cancel := context.WithDeadline(context.Background(), time.Unix(0, 0))
	defer cancel()
	gone, leave := context.WithCancel(context.Background())
	leave()
	hsmTimeout := fmt.Errorf("wait for a session: %w: %w", context.DeadlineExceeded, custodian.ErrHSMUnavailable)
	tests := []struct {
		name string
		ctx  context.Context
		err  error
		want custodian.Reason
	}{
		{"nobody classified it", t.Context(), errors.New("slot 7 caught fire"), "INTERNAL"},
		{"a part timed out within the call", t.Context(), hsmTimeout, "HSM_UNAVAILABLE"},
		{"the call timed out in that part", expired, hsmTimeout, "DEADLINE"},
		{"the call timed out", expired, context.DeadlineExceeded, "DEADLINE"},
		{"refused just before the deadline", expired, custodian.ErrDenied, "DENIED"},
		{"the caller left", gone, fmt.Errorf("%w: %w", context.Canceled, custodian.ErrDeadline), "CANCELLED"},
		{"two refusals", t.Context(), errors.Join(custodian.ErrAuditBlocked, custodian.ErrDenied), "AUDIT_BLOCKED"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			info, _ := details(t, rpc.StatusOf(test.ctx, test.err))
			if got := info.GetReason(); got != string(test.want) {
				t.Errorf("reason: got %s, want %s", got, test.want)
			}
		})
	}
}

func TestInvalidNamesTheField(t *testing.T) {
	st := rpc.StatusOf(t.Context(), fmt.Errorf("issue: %w", &custodian.InvalidError{Field: "keys[3].kid", Err: errors.New("15 bytes")}))
	if got, want := st.Message(), "keys[3].kid: 15 bytes"; got != want {
		t.Errorf("message: got %q, want %q", got, want)
	}
	info, _ := details(t, st)
	if got, want := info.GetMetadata()["field"], "keys[3].kid"; got != want {
		t.Errorf("field: got %q, want %q", got, want)
	}
}

func details(t *testing.T, st *status.Status) (*errdetails.ErrorInfo, *errdetails.RetryInfo) {
	t.Helper()
	var info *errdetails.ErrorInfo
	var retry *errdetails.RetryInfo
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.RetryInfo:
			retry = d
		default:
			t.Errorf("details: got %T", d)
		}
	}
	if info == nil {
		t.Fatalf("status %v: got no ErrorInfo", st)
	}
	return info, retry
}
