package awskms

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

var authorizationForm = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/]+)/([0-9]{8})/([^/]+)/([^/]+)/aws4_request, SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})$`)

// maxSkew is how far a signature's time may be from ours; AWS General
// Reference, Signature Version 4.
const maxSkew = 5 * time.Minute

// authenticate finds who signed r. It signs the same headers once more with
// the caller's secret, and compares.
func (s *Server) authenticate(r *http.Request, body []byte) (string, *caller, error) {
	header := r.Header.Get("Authorization")
	if header == "" {
		return "", nil, &Error{http.StatusBadRequest, "MissingAuthenticationTokenException", "Request is missing Authentication Token"}
	}
	parts := authorizationForm.FindStringSubmatch(header)
	signed, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if parts == nil || err != nil {
		return "", nil, &Error{http.StatusBadRequest, "IncompleteSignatureException", ""}
	}
	accessKey, region, service := parts[1], parts[3], parts[4]
	if region != Region || service != "kms" {
		return "", nil, &Error{http.StatusBadRequest, "InvalidSignatureException", "Credential should be scoped to a valid region."}
	}
	if skew := time.Since(signed).Abs(); skew > maxSkew {
		return "", nil, &Error{http.StatusBadRequest, "InvalidSignatureException", "Signature expired"}
	}
	s.mu.Lock()
	who := s.callers[accessKey]
	expired := who != nil && who.expired
	s.mu.Unlock()
	if who == nil || r.Header.Get("X-Amz-Security-Token") != who.token {
		return "", nil, &Error{http.StatusBadRequest, "UnrecognizedClientException", "The security token included in the request is invalid."}
	}
	if expired {
		return "", nil, &Error{http.StatusBadRequest, "ExpiredTokenException", "The security token included in the request is expired"}
	}
	again, err := signAgain(r, body, strings.Split(parts[5], ";"), aws.Credentials{AccessKeyID: accessKey, SecretAccessKey: who.secret, SessionToken: who.token}, signed)
	if err != nil {
		return "", nil, err
	}
	if subtle.ConstantTimeCompare([]byte(again), []byte(header)) != 1 {
		return "", nil, &Error{http.StatusBadRequest, "InvalidSignatureException", "The request signature we calculated does not match the signature you provided."}
	}
	return accessKey, who, nil
}

func signAgain(r *http.Request, body []byte, headers []string, secret aws.Credentials, at time.Time) (string, error) {
	again, err := http.NewRequestWithContext(r.Context(), r.Method, "https://"+r.Host+r.URL.RequestURI(), nil)
	if err != nil {
		return "", err
	}
	again.ContentLength = r.ContentLength
	for _, h := range headers {
		if h != "host" && h != "content-length" {
			again.Header[http.CanonicalHeaderKey(h)] = r.Header.Values(h)
		}
	}
	sum := sha256.Sum256(body)
	err = v4.NewSigner().SignHTTP(r.Context(), secret, again, hex.EncodeToString(sum[:]), "kms", Region, at)
	return again.Header.Get("Authorization"), err
}
