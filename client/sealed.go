package client

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/internal/sealing"
)

// ErrSealed means that a content key is sealed and does not open: it is for
// another recipient key, or is not the key that the answer says it is.
var ErrSealed = errors.New("sealed content key does not open")

// A RecipientKey opens the content keys that are sealed to its public half.
type RecipientKey struct{ key sealing.PrivateKey }

// GenerateRecipientKey makes a recipient key for one of RecipientKEMs.
func GenerateRecipientKey(kem string) (RecipientKey, error) {
	k, err := sealing.GenerateKey(kem)
	return RecipientKey{k}, err
}

// RecipientKEMs are the key encapsulation mechanisms, the one to prefer first.
func RecipientKEMs() []string { return append([]string(nil), sealing.KEMs...) }

// ReadRecipientKey reads a file that only its owner may read.
func ReadRecipientKey(path string) (RecipientKey, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return RecipientKey{}, fmt.Errorf("recipient key: %w", err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return RecipientKey{}, fmt.Errorf("recipient key %s: mode %04o lets others read it; chmod 600 it", path, fi.Mode().Perm())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return RecipientKey{}, fmt.Errorf("recipient key: %w", err)
	}
	defer clear(text)
	k, err := sealing.ParsePrivateKey(text)
	if err != nil {
		return RecipientKey{}, fmt.Errorf("%s: %w", path, err)
	}
	return RecipientKey{k}, nil
}

// Public is the text that the daemon's configuration pins.
func (k RecipientKey) Public() string { return k.key.Public().String() }

// ID names the key in requests and answers.
func (k RecipientKey) ID() string { return k.key.Public().ID() }

// Text is what ReadRecipientKey reads. It is secret.
func (k RecipientKey) Text() ([]byte, error) { return k.key.Text() }

// Open puts the key in clear in the place of the sealed one. requestID is that
// of the call which the key answers. The error wraps ErrSealed.
func (k RecipientKey) Open(c *v1.ContentKey, requestID string) error {
	s := c.GetSealedKey()
	if s == nil {
		return fmt.Errorf("content key %x: it is not sealed: %w", c.GetKid(), ErrSealed)
	}
	about := sealing.About{Caller: s.GetCaller(), RequestID: requestID, KID: c.GetKid(), Generation: c.GetGeneration(), IV: c.GetIv(),
		Category: c.GetCategory(), ContentID: c.GetContentId(), TrackType: c.GetTrackType(), Scheme: c.GetScheme()}
	if p := c.GetPeriod(); p != nil {
		index := p.GetIndex()
		about.Period = &index
	}
	key, err := k.key.Open(about, s.GetSealed())
	if err != nil {
		return fmt.Errorf("content key %x: %w: %w", c.GetKid(), err, ErrSealed)
	}
	c.KeyMaterial = &v1.ContentKey_Key{Key: key}
	return nil
}

// recipients are the keys of a client, by ID. An answer to a client that has
// any holds only keys that were opened with one of them, or its call fails.
type recipients map[string]RecipientKey

func newRecipients(keys []RecipientKey) recipients {
	r := recipients{}
	for _, k := range keys {
		r[k.ID()] = k
	}
	return r
}

// named returns the request with a request ID: an answer is opened only if it
// is to this request.
func named[T interface {
	proto.Message
	GetRequestId() string
}](r recipients, req T, set func(T, string)) T {
	if len(r) == 0 || req.GetRequestId() != "" {
		return req
	}
	req = proto.CloneOf(req)
	set(req, rand.Text())
	return req
}

// open opens the key of an answer. One in clear is refused: somebody on the way
// could have put it there.
func (r recipients) open(c *v1.ContentKey, requestID string) error {
	if len(r) == 0 || c == nil {
		return nil
	}
	k, ok := r[c.GetSealedKey().GetRecipientKeyId()]
	if !ok {
		clear(c.GetKey())
		c.KeyMaterial = nil
		return fmt.Errorf("content key %x: it is not sealed to one of this client's recipient keys: %w", c.GetKid(), ErrSealed)
	}
	return k.Open(c, requestID)
}
