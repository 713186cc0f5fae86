// Package kms makes the outer wrap of a KEK: what the HSM has wrapped under
// its MEK, a KMS encrypts once more, so that neither of them opens a KEK
// alone. It decides which provider is spoken to (Open), how a provider is
// logged in to and called, and into which of the five errors of a
// custodian.Provider each of its answers falls. It is also where package hsm
// meets the domain (Token).
//
// When a provider is called, what is served while it is away, and what the
// context bytes are, is decided in package custodian.
package kms

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keycustody/custodian/custodian"
)

// The kinds of provider.
const (
	KindLocal = "local"
	KindVault = "vault"
	KindAWS   = "aws"
	KindGCP   = "gcp"
)

// minDeadline is less than any KMS takes.
const minDeadline = 10 * time.Millisecond

var kinds = []string{KindLocal, KindVault, KindAWS, KindGCP}

// A Config configures one provider instance. Only the settings of its kind
// may be there.
type Config struct {
	// Name is the instance's name, which every outer wrap that it makes
	// carries: 1 to 64 of a-z, 0-9, '.', '_' and '-'. It is never changed once
	// keys are wrapped.
	Name string `yaml:"name"`
	// Deadline of opening one wrap with this provider, with all tries; the
	// daemon's for all providers without it. Package custodian keeps it.
	Deadline time.Duration `yaml:"deadline,omitempty"`
	// Kind is local, vault, aws or gcp.
	Kind  string      `yaml:"kind"`
	Local struct{}    `yaml:"local,omitempty"`
	Vault VaultConfig `yaml:"vault,omitempty"`
	AWS   AWSConfig   `yaml:"aws,omitempty"`
	GCP   GCPConfig   `yaml:"gcp,omitempty"`

	// Now is the clock; nil is time.Now.
	Now func() time.Time `yaml:"-"`
}

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// Check returns everything that is wrong with the configuration, each fault
// with the path of its field, files included: a secret that others can read
// is a fault. It calls no KMS.
func (c Config) Check() []error {
	var faults []error
	if !nameForm.MatchString(c.Name) {
		faults = append(faults, fmt.Errorf("name: %.80q: must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit", c.Name))
	}
	if c.Deadline != 0 && (c.Deadline < minDeadline || c.Deadline > maxTimeout) {
		faults = append(faults, fmt.Errorf("deadline: %s: must be %s to %s", c.Deadline, minDeadline, maxTimeout))
	}
	for _, other := range []struct {
		kind string
		set  bool
	}{{KindVault, c.Vault != (VaultConfig{})}, {KindAWS, c.AWS != (AWSConfig{})}, {KindGCP, c.GCP != (GCPConfig{})}} {
		if other.set && c.Kind != other.kind && slices.Contains(kinds, c.Kind) {
			faults = append(faults, fmt.Errorf("%s: set, but kind is %s", other.kind, c.Kind))
		}
	}
	switch c.Kind {
	case KindLocal:
	case KindVault:
		faults = append(faults, c.Vault.check()...)
	case KindAWS:
		faults = append(faults, c.AWS.check()...)
	case KindGCP:
		faults = append(faults, c.GCP.check()...)
	default:
		faults = append(faults, fmt.Errorf("kind: %.80q: must be one of %s", c.Kind, strings.Join(kinds, ", ")))
	}
	return faults
}

// Open makes the provider that c describes. It refuses whatever Check finds,
// all of it in one error. No KMS is called before the first Wrap or Unwrap,
// so that a daemon can start while its KMS is away.
func Open(ctx context.Context, c Config) (custodian.Provider, error) {
	if err := errors.Join(c.Check()...); err != nil {
		return nil, fmt.Errorf("kms %s: %w", c.Name, err)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	switch c.Kind {
	case KindLocal:
		return openLocal(c), nil
	case KindVault:
		return opened(openVault(c))
	case KindAWS:
		return opened(openAWS(c))
	case KindGCP:
		return opened(openGCP(ctx, c))
	}
	return nil, fmt.Errorf("kms %s: kind %q has no provider", c.Name, c.Kind)
}

// opened keeps a provider that was not made from becoming an interface that
// is not nil.
func opened[P custodian.Provider](p P, err error) (custodian.Provider, error) {
	if err != nil {
		return nil, err
	}
	return p, nil
}

func checkTimeout(d time.Duration) error {
	if d < 0 || d > maxTimeout {
		return fmt.Errorf("%s: must be above 0 and at most %s", d, maxTimeout)
	}
	return nil
}

// refuse says what is wrong with the arguments of a call, before any KMS is
// asked. It holds for every provider alike.
func refuse(name string, blob, context []byte) error {
	if len(blob) == 0 {
		return fmt.Errorf("kms %s: the blob is empty: %w", name, custodian.ErrProviderBlob)
	}
	if len(context) == 0 {
		return fmt.Errorf("kms %s: the context is empty: %w", name, custodian.ErrProviderBlob)
	}
	return nil
}

// refuseWrap is refuse for a blob that a provider made, or should have.
func refuseWrap(name string, w custodian.OuterWrap, context []byte) error {
	if w.Provider != name {
		return fmt.Errorf("kms %s: the blob was wrapped by provider %q: %w", name, w.Provider, custodian.ErrProviderBlob)
	}
	return refuse(name, w.Blob, context)
}

// An opener is a provider that has an outer layer.
type opener interface {
	// open takes the layer off.
	open(ctx context.Context, w custodian.OuterWrap, context []byte) ([]byte, error)
	// fault is a sentence about op that wraps sentinel.
	fault(op, what string, sentinel error) error
	// binds says what a key must be like, so that it binds the context.
	binds() string
}

// proveBound tries a new wrap under another context, under which it must not
// open. Some keys ignore the context (Vault's that are not derived), and
// whether a key is such a one can be read only with a right that is not needed
// otherwise. That the wrap opens under its own context is for the domain to
// prove, of every provider alike.
func proveBound(ctx context.Context, p opener, w custodian.OuterWrap, context []byte) error {
	other, err := p.open(ctx, w, append(slices.Clone(context), 0))
	clear(other)
	if err == nil {
		return p.fault("verify a new wrap", "it opens under another context: "+p.binds(), custodian.ErrProviderDisabled)
	}
	if !errors.Is(err, custodian.ErrProviderBlob) {
		return fmt.Errorf("verify a new wrap: %w", err)
	}
	return nil
}

func same(a, b []byte) bool { return subtle.ConstantTimeCompare(a, b) == 1 }

// A contact remembers how past calls went, for Status.
type contact struct {
	now func() time.Time

	// mu guards the fields below.
	mu        sync.Mutex
	calls     uint64
	failures  uint64
	reachable bool
	last      time.Time
	lastError string
}

// done takes down how one call of a Provider's method went. A blob or an
// access that the KMS refuses is a failure, but it is contact all the same. A
// call that its caller gave up, or that was throttled, says nothing about
// whether the KMS is there.
func (c *contact) done(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	if err == nil {
		c.reachable, c.last, c.lastError = true, c.now(), ""
		return
	}
	c.failures++
	c.lastError = err.Error()
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, custodian.ErrProviderThrottled):
	case errors.Is(err, custodian.ErrProviderUnavailable):
		c.reachable = false
	default:
		c.reachable, c.last = true, c.now()
	}
}

// describe fills in s what past calls have shown. Calls are calls of the
// Provider's methods, not requests on the wire.
func (c *contact) describe(s custodian.ProviderStatus) custodian.ProviderStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Reachable, s.LastContact, s.LastError = c.reachable, c.last, c.lastError
	s.Calls, s.Failures = c.calls, c.failures
	return s
}
