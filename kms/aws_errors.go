package kms

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/keycustody/custodian/custodian"
)

// Codes of AWS: of KMS (API Reference, Errors of Encrypt, Decrypt and
// ReEncrypt) and those common to its services (Common Errors). What is in no
// list here says that AWS is out of order.
var (
	awsThrottled = []string{"ThrottlingException", "Throttling", "ThrottledException", "RequestThrottled", "RequestThrottledException",
		"TooManyRequestsException", "RequestLimitExceeded", "LimitExceededException", "PriorRequestNotComplete", "SlowDown"}
	// The caller is known, and may not.
	awsDenied = []string{"AccessDeniedException", "AccessDenied", "NotAuthorized"}
	// The caller is not known (any more): another login may help.
	awsLogin = []string{"UnrecognizedClientException", "InvalidClientTokenId", "ExpiredTokenException", "ExpiredToken", "InvalidSignatureException",
		"SignatureDoesNotMatch", "IncompleteSignature", "IncompleteSignatureException", "MissingAuthenticationToken",
		"MissingAuthenticationTokenException", "RequestExpired", "OptInRequired"}
	// NotFoundException: the key or alias is not there. InvalidArnException and
	// InvalidKeyUsageException: it is not a key that encrypts.
	awsDisabled = []string{"DisabledException", "NotFoundException", "InvalidArnException", "InvalidKeyUsageException"}
	awsBlob     = []string{"InvalidCiphertextException", "IncorrectKeyException"}
	// states are what KMSInvalidStateException says of a key that somebody
	// took away. Of a key in a custom key store that is away, too, AWS says
	// KMSInvalidStateException: that is an outage.
	awsStates = []string{"pending deletion", "pending import", "pending replica deletion", "is disabled"}
)

// classify turns a failed request into one of the errors of a
// custodian.Provider, in a sentence.
func (a *amazon) classify(op string, err error) error {
	var answer smithy.APIError
	if !errors.As(err, &answer) {
		return fmt.Errorf("kms %s: %s with %s: %w: %w", a.name, op, a.c.Key, custodian.ErrProviderUnavailable, err)
	}
	return a.fault(op, awsSays(answer), awsSentinel(op, answer, err))
}

func (a *amazon) fault(op, what string, sentinel error) error {
	return fmt.Errorf("kms %s: %s with %s: %s: %w", a.name, op, a.c.Key, what, sentinel)
}

func awsSentinel(op string, answer smithy.APIError, err error) error {
	code, text := answer.ErrorCode(), answer.ErrorMessage()
	has := func(codes []string) bool { return slices.Contains(codes, code) }
	switch {
	case has(awsThrottled), awsStatus(err) == http.StatusTooManyRequests:
		return custodian.ErrProviderThrottled
	case has(awsDenied):
		return custodian.ErrProviderDenied
	case has(awsLogin):
		return custodian.ErrProviderLogin
	case has(awsDisabled):
		return custodian.ErrProviderDisabled
	case code == "KMSInvalidStateException" && slices.ContainsFunc(awsStates, func(s string) bool { return strings.Contains(text, s) }):
		return custodian.ErrProviderDisabled
	case has(awsBlob):
		return custodian.ErrProviderBlob
	case code == "ValidationException" && op == "encrypt":
		return custodian.ErrProviderDisabled // a key that cannot do what is asked
	case code == "ValidationException":
		return custodian.ErrProviderBlob // a blob that is too long to be one
	}
	return custodian.ErrProviderUnavailable
}

func awsStatus(err error) int {
	var answer *smithyhttp.ResponseError
	if errors.As(err, &answer) {
		return answer.HTTPStatusCode()
	}
	return 0
}

// awsSays is AWS's answer on one line.
func awsSays(answer smithy.APIError) string {
	text := strings.Join(strings.Fields(answer.ErrorMessage()), " ")
	if text == "" {
		return answer.ErrorCode()
	}
	return fmt.Sprintf("%s, %.300q", answer.ErrorCode(), text)
}

// forbidden reports whether AWS refuses the credentials, or what they may do.
func (a *amazon) forbidden(err error) bool {
	var answer smithy.APIError
	return a.refused(err) || errors.As(err, &answer) && slices.Contains(awsDenied, answer.ErrorCode())
}

func (a *amazon) refused(err error) bool {
	var answer smithy.APIError
	return errors.As(err, &answer) && slices.Contains(awsLogin, answer.ErrorCode())
}

// refusal is a login that found no credentials, in a sentence.
func (a *amazon) refusal(err error) error {
	var answer smithy.APIError
	if !errors.As(err, &answer) {
		return fmt.Errorf("kms %s: log in to aws: %w: %w", a.name, custodian.ErrProviderUnavailable, err)
	}
	sentinel := custodian.ErrProviderUnavailable
	switch {
	case slices.Contains(awsThrottled, answer.ErrorCode()):
		sentinel = custodian.ErrProviderThrottled
	case slices.Contains(awsLogin, answer.ErrorCode()), slices.Contains(awsDenied, answer.ErrorCode()):
		sentinel = custodian.ErrProviderLogin // by whoever gives credentials
	}
	return fmt.Errorf("kms %s: log in to aws: %s: %w", a.name, awsSays(answer), sentinel)
}
