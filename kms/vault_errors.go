package kms

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/api"

	"github.com/keycustody/custodian/custodian"
)

// Vault has no error codes beside the HTTP status: with a 400 the text alone
// says whether the key is gone or the blob is wrong. These are the texts, of
// builtin/logical/transit and sdk/helper/keysutil of Vault 1.21, which say
// that the key cannot be used; every other 400 is about the blob.
var disabledTexts = []string{
	"encryption key not found",
	"disallowed by policy (too old)", // min_decryption_version
	"no such key version",            // trimmed
	"not supported for key type",     // a signing key
	"unknown key type",               // our guard against making a new key, see Wrap
}

// classify turns a failed request into one of the errors of a
// custodian.Provider, in a sentence.
func (v *vault) classify(op string, err error) error {
	answer := answerOf(err)
	if answer == nil {
		return fmt.Errorf("kms %s: %s with %s: %w: %w", v.name, op, v.keyRef(), custodian.ErrProviderUnavailable, err)
	}
	return v.fault(op, says(answer), sentinel(op, answer))
}

func (v *vault) fault(op, what string, sentinel error) error {
	return fmt.Errorf("kms %s: %s with %s: %s: %w", v.name, op, v.keyRef(), what, sentinel)
}

// binds says how a transit key is made that binds the context.
func (v *vault) binds() string { return "the key must be made with derived=true" }

func sentinel(op string, answer *api.ResponseError) error {
	switch {
	case answer.StatusCode == http.StatusTooManyRequests:
		return custodian.ErrProviderThrottled
	case answer.RawError:
		// Not Vault's own form: something between us and Vault answers.
		return custodian.ErrProviderUnavailable
	case answer.StatusCode == http.StatusForbidden:
		return custodian.ErrProviderDenied
	case answer.StatusCode == http.StatusNotFound && mentions(answer, "no handler for route"):
		return custodian.ErrProviderDisabled // the transit engine is unmounted
	case answer.StatusCode != http.StatusBadRequest:
		return custodian.ErrProviderUnavailable
	case op == "encrypt" || mentions(answer, disabledTexts...):
		return custodian.ErrProviderDisabled
	}
	return custodian.ErrProviderBlob
}

// answerOf is the answer of an HTTP server in err, or nil.
func answerOf(err error) *api.ResponseError {
	var answer *api.ResponseError
	if errors.As(err, &answer) {
		return answer
	}
	return nil
}

func (v *vault) forbidden(err error) bool { return forbidden(err) }

// forbidden reports whether Vault itself, not something in between, answers
// that the token may not do this or is none.
func forbidden(err error) bool {
	answer := answerOf(err)
	return answer != nil && answer.StatusCode == http.StatusForbidden && !answer.RawError
}

func mentions(answer *api.ResponseError, texts ...string) bool {
	for _, line := range answer.Errors {
		for _, text := range texts {
			if strings.Contains(line, text) {
				return true
			}
		}
	}
	return false
}

// says is Vault's answer on one line. What is not in Vault's form is left
// out: it could be a page of anything.
func says(answer *api.ResponseError) string {
	if answer.RawError || len(answer.Errors) == 0 {
		return fmt.Sprintf("status %d", answer.StatusCode)
	}
	text := strings.Join(strings.Fields(strings.Join(answer.Errors, "; ")), " ")
	return fmt.Sprintf("status %d, %.300q", answer.StatusCode, text)
}
