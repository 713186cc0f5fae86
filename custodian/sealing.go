package custodian

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/keycustody/custodian/internal/sealing"
	"github.com/keycustody/custodian/internal/secret"
)

// A Sealing says whose keys are sealed to a public key of their own inside the
// answer, and which keys leave only so. The zero Sealing seals nothing.
type Sealing struct {
	Recipients []Recipient
	// Require are the categories whose keys leave sealed or not at all;
	// RequireAll is every category.
	Require    []CategoryName
	RequireAll bool
}

// A Recipient is a caller and the public keys that are pinned for it. Keys are
// sealed to the first one, unless the request names another.
type Recipient struct {
	Identity string
	Keys     []sealing.PublicKey
}

// A SealedTo is a content key that was sealed to a recipient key.
type SealedTo struct {
	KeyID string // of the recipient key
	Bytes []byte // encapsulated key and ciphertext
}

// A sealingRule is a Sealing that was checked.
type sealingRule struct {
	keys     map[string][]sealing.PublicKey // by identity
	required map[CategoryName]bool
	all      bool
}

// WithSealing returns the policy with a sealing of its own, which Digest covers.
// It reports every fault at once.
func (p *Policy) WithSealing(s Sealing) (*Policy, error) {
	rule := &sealingRule{keys: map[string][]sealing.PublicKey{}, required: map[CategoryName]bool{}, all: s.RequireAll}
	var faults []error
	pinned := map[string]string{} // key ID to its place
	text := []string{fmt.Sprintf("all %v", s.RequireAll)}
	for i, r := range s.Recipients {
		at := fmt.Sprintf("sealing.recipients[%d]", i)
		if r.Identity == "" {
			faults = append(faults, fmt.Errorf("%s.identity: empty", at))
		} else if _, twice := rule.keys[r.Identity]; twice {
			faults = append(faults, fmt.Errorf("%s.identity: %s is there twice", at, r.Identity))
		}
		if len(r.Keys) == 0 {
			faults = append(faults, fmt.Errorf("%s.keys: empty; custodianctl pki recipient-key makes one", at))
		}
		for j, k := range r.Keys {
			place := fmt.Sprintf("%s.keys[%d]", at, j)
			if other, twice := pinned[k.ID()]; twice { // else one of two callers could open what is the other's
				faults = append(faults, fmt.Errorf("%s: the same key as %s", place, other))
			}
			pinned[k.ID()] = place
			text = append(text, fmt.Sprintf("%q %d %s", r.Identity, j, k))
		}
		rule.keys[r.Identity] = slices.Clone(r.Keys)
	}
	for i, name := range s.Require {
		if err := name.Check(); err != nil {
			faults = append(faults, fmt.Errorf("sealing.require_sealed[%d]: %w", i, err))
		}
		rule.required[name] = true
		text = append(text, fmt.Sprintf("require %q", name))
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	with := p.with(conditionSealing, text)
	with.sealing = rule
	return with, nil
}

// recipient is the key that a caller's keys are sealed to: the one with the ID,
// or the first one that is pinned for it; the zero key where none is.
func (p *Policy) recipient(who Caller, keyID string) (sealing.PublicKey, error) {
	var keys []sealing.PublicKey
	if p != nil && p.sealing != nil {
		keys = p.sealing.keys[who.ID]
	}
	if keyID == "" && len(keys) > 0 {
		return keys[0], nil
	}
	for _, k := range keys {
		if k.ID() == keyID {
			return k, nil
		}
	}
	if keyID != "" {
		return sealing.PublicKey{}, invalid("recipient_key_id", errors.New("no such key is pinned for the caller"))
	}
	return sealing.PublicKey{}, nil
}

// mayLeave says why a key may not leave in the form that it would, or nil. An
// encrypted CPIX document is not sealed to the caller: the daemon's front door
// has the key in clear for it.
func (p *Policy) mayLeave(r Request) error {
	category := r.Resource.Category
	if !slices.Contains(leaving, r.Action) || !r.Resource.known() || !r.Recipient.IsZero() ||
		p.sealing == nil || !p.sealing.all && !p.sealing.required[category] {
		return nil
	}
	return fmt.Errorf("category %s: %w", category, ErrSealingRequired)
}

// sealTo seals an opened key to a recipient key and wipes it. With the zero key
// nothing is done.
func sealTo(to sealing.PublicKey, who Caller, requestID string, k *ContentKey, key secret.Secret) (*SealedTo, error) {
	if to.IsZero() {
		return nil, nil
	}
	defer key.Destroy()
	about := sealing.About{Caller: who.ID, RequestID: requestID, KID: k.KID[:], Generation: k.Generation, IV: k.IV,
		Category: string(k.Category), ContentID: k.ContentID, TrackType: string(k.TrackType), Scheme: string(k.Scheme)}
	if k.HasPeriod {
		about.Period = &k.Period
	}
	var sealed []byte
	var err error
	key.Use(func(cek []byte) { sealed, err = sealing.Seal(to, about, cek) })
	if err != nil {
		return nil, fmt.Errorf("content key %s: %w", k.KID, err)
	}
	return &SealedTo{to.ID(), sealed}, nil
}

// detail adds to what the audit log says of a release.
func (s *SealedTo) detail(text string) string {
	if s == nil {
		return text
	}
	return strings.TrimPrefix(text+"; sealed to "+s.KeyID, "; ")
}
