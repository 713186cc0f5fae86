package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"
	rpccode "google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"

	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// The exit codes. Scripts rely on them: a number never changes its meaning.
const (
	exitOK          = 0
	exitOther       = 1
	exitUsage       = 2
	exitRefused     = 3
	exitNotFound    = 4
	exitState       = 5
	exitUnavailable = 6
	exitIntegrity   = 7
)

func exitCodesTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What the exit codes mean",
		Long: `The exit code says what a script can do about it:

  0  done
  1  anything else
  2  the command line, the config file or the request is wrong
     (INVALID_ARGUMENT): mend it
  3  refused (UNAUTHENTICATED, PERMISSION_DENIED): ask for a grant, or use the
     certificate of the right role
  4  not there (NOT_FOUND): no such key, category or file
  5  there already, or its state does not permit it (ALREADY_EXISTS,
     FAILED_PRECONDITION): look at what is there
  6  not now (UNAVAILABLE, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED): try again
  7  something is damaged (DATA_LOSS; an audit log or a backup that does not
     verify): keep everything as it is, and call somebody

With --json an error is {"error": {"reason", "message", "code", "retry_after_ms",
"next"}} on standard error; reason is the stable name, code the name of the
google.rpc.Code in brackets above.`,
	}
}

// exitOf is the one map from a status code to an exit code.
func exitOf(c codes.Code) int {
	switch c {
	case codes.OK:
		return exitOK
	case codes.InvalidArgument, codes.OutOfRange:
		return exitUsage
	case codes.Unauthenticated, codes.PermissionDenied:
		return exitRefused
	case codes.NotFound:
		return exitNotFound
	case codes.AlreadyExists, codes.FailedPrecondition, codes.Aborted:
		return exitState
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded:
		return exitUnavailable
	case codes.DataLoss:
		return exitIntegrity
	}
	return exitOther
}

// Reasons of failures on this side. Those of the daemon are in its error table.
const (
	reasonUsage    = "USAGE"
	reasonConfig   = "CONFIG"
	reasonDamaged  = "DAMAGED"
	reasonExists   = "EXISTS"
	reasonNotThere = "NOT_THERE"
	reasonNoAnswer = "NO_ANSWER"
	reasonLocal    = "LOCAL"
)

// A failure is an error that knows its exit code.
type failure struct {
	reason string
	code   codes.Code
	retry  time.Duration // how long to wait before trying again, zero: it does not help
	next   string        // what to do now; empty: what nextStep says of the reason
	err    error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// usage is a command line that is wrong.
func usage(c *cobra.Command, err error) error {
	if name, ok := strings.CutPrefix(c.CommandPath(), c.Root().Name()+" "); ok {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return &failure{reason: reasonUsage, code: codes.InvalidArgument, next: c.CommandPath() + " --help", err: err}
}

// invalid is a request that is wrong, before it is sent.
func invalid(err error) error {
	return &failure{reason: "INVALID", code: codes.InvalidArgument, err: err}
}

// damaged is something that does not verify.
func damaged(err error) error {
	return &failure{reason: reasonDamaged, code: codes.DataLoss, err: err}
}

// classify finds out what kind of error this is.
func classify(err error) *failure {
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	if e, ok := errors.AsType[*client.Error](err); ok {
		f := &failure{reason: e.Reason, code: e.Code, retry: e.Retry, err: err}
		if f.reason == "" {
			f.reason = reasonNoAnswer
		}
		return f
	}
	if _, ok := errors.AsType[*audit.DamageError](err); ok {
		return &failure{reason: reasonDamaged, code: codes.DataLoss, err: err}
	}
	switch {
	case errors.Is(err, checkpoint.ErrMalformed), errors.Is(err, checkpoint.ErrSignature), errors.Is(err, checkpoint.ErrProof):
		return &failure{reason: reasonDamaged, code: codes.DataLoss, err: err}
	case errors.Is(err, audit.ErrNoEntry), errors.Is(err, audit.ErrNoCheckpoint), errors.Is(err, audit.ErrPruned):
		return &failure{reason: reasonNotThere, code: codes.NotFound, err: err}
	case errors.Is(err, fs.ErrNotExist):
		return &failure{reason: reasonNotThere, code: codes.NotFound, err: err}
	case errors.Is(err, fs.ErrExist):
		return &failure{reason: reasonExists, code: codes.AlreadyExists, err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{reason: reasonNoAnswer, code: codes.DeadlineExceeded, err: err}
	case errors.Is(err, context.Canceled):
		return &failure{reason: "CANCELLED", code: codes.Canceled, err: err}
	}
	return &failure{reason: reasonLocal, code: codes.Unknown, err: err}
}

// nextSteps say what to do about a refusal, by its reason.
var nextSteps = map[string]string{
	reasonConfig:             "custodianctl --help shows a config file",
	reasonDamaged:            "keep the file as it is, and compare it with a copy kept elsewhere",
	reasonExists:             "nothing was overwritten; choose another name",
	reasonNoAnswer:           "see that the daemon runs at this address; where the message names tls or x509, that --cert, --ca and --server-name fit (custodianctl pki show FILE)",
	"DENIED":                 "custodianctl pki show FILE says who the certificate stands for; ask the daemon's operator what it is granted",
	"IDENTITY":               "custodianctl pki show FILE says who the certificate stands for",
	"KEY_NOT_FOUND":          "see that the KID is right; if a player asks for it, keys are missing: call somebody",
	"CATEGORY_NOT_FOUND":     "custodianctl category list",
	"KEY_STATE":              "custodianctl keys show KID",
	"KEY_COMPROMISED":        "custodianctl keys show KID; an officer decides whether it is served on",
	"CATEGORY_FROZEN":        "custodianctl audit list --action category.freeze says why; an officer opens it with custodianctl category unfreeze",
	"CALLER_FROZEN":          "the daemon's officers say why; custodianctl audit list --action caller.freeze",
	"TOKEN_MISSING":          "give the viewer's licence token with --token-file",
	"TOKEN_INVALID":          "the daemon's audit log and docs/OPERATIONS.md, licence tokens, say what a token must have",
	"TOKEN_EXPIRED":          "ask the playback service for a new token; compare the clocks of both machines",
	"TOKEN_MISMATCH":         "ask the playback service for a token for this content, session and key",
	"TOKEN_REPLAYED":         "ask the playback service for a new token",
	"TOKEN_REVOKED":          "custodianctl revocation list says what is revoked and why",
	"TOKEN_KEYS_UNAVAILABLE": "the daemon's log says why it has no keys of the token's issuer",
	"SEALING_REQUIRED":       "custodianctl pki recipient-key makes a key; the daemon's config pins its public half in sealing.recipients",
	"MEK_EXPIRED":            "the root key is due for rotation: call the officers; keys in use go on being served",
	"ROTATION_STATE":         "custodianctl rotation list",
	"KEK_EXHAUSTED":          "the category's key is due for rotation: call the officers",
	"KID_CONFLICT":           "leave --kid out, and the daemon draws a KID",
	"KEY_CONFLICT":           "nothing of the import was kept; custodianctl audit list --action keys.import names the KID (auditor)",
	"CONTENT_CATEGORY":       "ask in the category that has this content item",
	"CATEGORY_EXISTS":        "custodianctl category list shows it",
	"KMS_UNAVAILABLE":        "custodianctl status says which KMS is out of reach",
	"HSM_UNAVAILABLE":        "custodianctl status says what the token answered",
	"STORE_UNAVAILABLE":      "custodianctl status; see to the disk of the store",
	"AUDIT_BLOCKED":          "see to the disk of the audit log: nothing is released that cannot be written down",
	"RECORD_CORRUPT":         "keep the store as it is, and call somebody: a record was changed",
	"UNINITIALISED":          "custodiand init -config FILE, on the daemon's machine",
	"QUORUM":                 "write a plan and propose it: custodianctl ceremony propose PLAN --rehearse (docs/CEREMONY.md)",
	"APPROVAL":               "custodianctl ceremony show ID, and compare with custodianctl ceremony digest PLAN",
	"PLAN":                   "mend the plan, and rehearse it: custodianctl ceremony propose PLAN --rehearse",
	"CEREMONY_STATE":         "custodianctl ceremony show ID",
	"CEREMONY_NOT_FOUND":     "custodianctl ceremony list",
	"CLOCK_SUSPECT":          "set the daemon's clock, or start it once with -confirm-time",
	"INTERNAL":               "the daemon's log has the cause",
}

// report tells the user what went wrong, and returns the exit code.
func (a *app) report(err error, asJSON bool) int {
	f := classify(err)
	next := f.next
	if next == "" {
		next = nextSteps[f.reason]
	}
	if exitOf(f.code) == exitUnavailable {
		again := "try again"
		if f.retry > 0 {
			again += " in " + f.retry.String()
		}
		next = strings.TrimPrefix(next+"; "+again, "; ")
	}
	if !asJSON {
		fmt.Fprintf(a.err, "custodianctl: %v\n", err)
		if next != "" {
			fmt.Fprintf(a.err, "next: %s\n", next)
		}
		return exitOf(f.code)
	}
	// Where standard error cannot be written, there is nobody to tell.
	_ = encodeJSON(a.err, map[string]errorView{"error": {
		Reason: f.reason, Message: err.Error(), Code: rpccode.Code(f.code).String(), RetryAfterMS: f.retry.Milliseconds(), Next: next,
	}})
	return exitOf(f.code)
}

// An errorView is an error in JSON.
type errorView struct {
	Reason       string `json:"reason"`
	Message      string `json:"message"`
	Code         string `json:"code"`
	RetryAfterMS int64  `json:"retry_after_ms"`
	Next         string `json:"next,omitempty"`
}
