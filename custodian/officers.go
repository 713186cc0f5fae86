package custodian

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// MinOfficers is the least number of officers: with 2 ≤ m ≤ n−1, two approve
// and one may be away.
const MinOfficers = 3

// RecoveryDelay is how long everybody can see that the recovery keys are
// about to replace the officers, and any remaining officer can stop it.
const RecoveryDelay = 72 * time.Hour

// An Officer is a pinned public key with a name for people. The key is what
// counts.
type Officer struct {
	Name string `yaml:"name" json:"name"`
	Key  string `yaml:"key" json:"key"` // base64 of the DER SubjectPublicKeyInfo, ECDSA P-256 or Ed25519
}

var officerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}$`)

// OfficerKey is the form of a public key in a plan. It is an error if it is
// neither ECDSA P-256 nor Ed25519.
func OfficerKey(key crypto.PublicKey) (string, error) {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return "", fmt.Errorf("an ECDSA key on %s: must be on P-256", k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	default:
		return "", fmt.Errorf("a key of type %T: must be ECDSA P-256 or Ed25519", key)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(der), nil
}

// PublicKey reads the officer's key.
func (o Officer) PublicKey() (crypto.PublicKey, error) {
	der, err := base64.StdEncoding.Strict().DecodeString(o.Key)
	if err != nil {
		return nil, errors.New("must be the base64 of a DER SubjectPublicKeyInfo (custodianctl ceremony key prints it)")
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, err
	}
	if text, err := OfficerKey(key); err != nil {
		return nil, err
	} else if text != o.Key {
		return nil, errors.New("not in its canonical form")
	}
	return key, nil
}

// keyHash is the SHA-256 of the SubjectPublicKeyInfo, as Caller.SPKI is.
func (o Officer) keyHash() [32]byte {
	der, _ := base64.StdEncoding.DecodeString(o.Key) // checked before
	return sha256.Sum256(der)
}

// checkOfficers says what is wrong with the officers, the quorum and the
// recovery keys of a plan.
func (p *Plan) checkOfficers() (faults []error) {
	n := uint32(len(p.Officers))
	if n < MinOfficers {
		faults = append(faults, fmt.Errorf("officers: %d of them: must be %d at least, so that two can approve while one is away", n, MinOfficers))
	}
	var recovery []Officer
	if p.Recovery != nil {
		recovery = p.Recovery.Keys
	}
	names, keys := map[string]string{}, map[string]string{}
	check := func(list string, all []Officer) {
		for i, o := range all {
			place := fmt.Sprintf("%s[%d]", list, i)
			if !officerName.MatchString(o.Name) {
				faults = append(faults, fmt.Errorf("%s.name: %.80q: must be 1 to 64 letters, digits, spaces and . _ @ -", place, o.Name))
			}
			if _, err := o.PublicKey(); err != nil {
				faults = append(faults, fmt.Errorf("%s.key: %w", place, err))
			}
			if other, twice := names[o.Name]; twice {
				faults = append(faults, fmt.Errorf("%s.name: %s is that of %s, too", place, o.Name, other))
			}
			if other, twice := keys[o.Key]; twice {
				faults = append(faults, fmt.Errorf("%s.key: it is that of %s, too", place, other))
			}
			names[o.Name], keys[o.Key] = place, place
		}
	}
	check("officers", p.Officers)
	check("recovery.keys", recovery)
	if r := p.Recovery; r != nil && (r.Quorum < 2 || r.Quorum > uint32(len(r.Keys))) {
		faults = append(faults, fmt.Errorf("recovery.quorum: %d of %d: must be 2 at least and not more than there are keys", r.Quorum, len(r.Keys)))
	}
	if p.Quorum == nil {
		return faults
	}
	within := func(place string, m uint32) {
		if m < 2 || m > n-1 {
			faults = append(faults, fmt.Errorf("%s: %d of %d officers: must be 2 at least, and one less than there are officers at most", place, m, n))
		}
	}
	within("quorum.default", p.Quorum.Default)
	for _, k := range slices.Sorted(maps.Keys(p.Quorum.Kinds)) {
		if _, known := planSections[k]; !known || k == KindGenesis || k == KindRecovery {
			faults = append(faults, fmt.Errorf("quorum.kinds: %.40q: no kind of ceremony that officers approve by quorum", string(k)))
		}
		within("quorum.kinds."+string(k), p.Quorum.Kinds[k])
	}
	return faults
}

// An Authority is what the officers have decided: who they are, how many it
// takes, who may do what under which conditions, and whether anything is
// served. It is one control record; a custody without it is ruled by its
// configuration.
type Authority struct {
	Officers       []Officer
	Quorum         []QuorumRule // by kind; the first is that of all others
	Recovery       []Officer
	RecoveryQuorum uint32
	Grants         []PlanGrant
	Conditions     [32]byte // beside the grants: Policy.Conditions; zero: the configuration's
	Sealed         bool
	Revision       uint64
}

// A QuorumRule is how many officers a kind of ceremony needs.
type QuorumRule struct {
	Kind PlanKind // "": every kind that has no rule of its own
	M    uint32
}

// adopt takes officers, quorum and recovery keys from a plan.
func (a *Authority) adopt(p *Plan) {
	a.Officers = p.Officers
	a.Quorum = []QuorumRule{{"", p.Quorum.Default}}
	for _, k := range slices.Sorted(maps.Keys(p.Quorum.Kinds)) {
		a.Quorum = append(a.Quorum, QuorumRule{k, p.Quorum.Kinds[k]})
	}
	if p.Kind == KindRecovery {
		return // it replaces officers, and nothing else
	}
	a.Recovery, a.RecoveryQuorum = nil, 0
	if p.Recovery != nil {
		a.Recovery, a.RecoveryQuorum = p.Recovery.Keys, p.Recovery.Quorum
	}
}

// voters are who approves a plan of that kind, and how many of them it takes.
// Without officers it takes nobody: the configuration's officer decides alone.
func (a *Authority) voters(k PlanKind) (who []Officer, needed uint32) {
	switch {
	case a == nil:
		return nil, 0
	case k == KindRecovery:
		return a.Recovery, a.RecoveryQuorum
	case k == KindGenesis:
		return a.Officers, uint32(len(a.Officers))
	}
	needed = a.Quorum[0].M
	for _, r := range a.Quorum {
		if r.Kind == k {
			needed = r.M
		}
	}
	return a.Officers, needed
}

// An Act is what a signature says of a plan.
type Act string

// The acts.
const (
	ActApprove Act = "approval"
	ActCancel  Act = "cancellation"
)

// A Challenge is what an officer signs beside the plan. It ties the signature
// to one ceremony of one store: a plan that is proposed again has another.
type Challenge struct {
	PlanDigest [32]byte
	StoreID    [16]byte  // zero for genesis: there is no store yet
	Revision   uint64    // of the control set when the plan was proposed; 0 for genesis
	Expires    time.Time // of the plan
	Nonce      [32]byte  // drawn by the token for this ceremony; for genesis the plan's own
	LogKey     [32]byte  // SHA-256 of the public key that signs the audit log; zero for genesis
}

// Message is what is signed: domain, and then the fields, which all have a
// fixed size.
func (c Challenge) Message(a Act) []byte {
	b := make([]byte, 0, 192)
	b = append(b, "custodian ceremony "+string(a)+" 1\x00"...)
	b = append(b, c.PlanDigest[:]...)
	b = append(b, c.StoreID[:]...)
	b = binary.BigEndian.AppendUint64(b, c.Revision)
	b = binary.BigEndian.AppendUint64(b, uint64(c.Expires.Unix()))
	b = append(b, c.Nonce[:]...)
	return append(b, c.LogKey[:]...)
}

// Sign makes the signature of an officer: Ed25519 over the message, or ECDSA
// in ASN.1 DER over its SHA-256.
func (c Challenge) Sign(a Act, key crypto.Signer) ([]byte, error) {
	message := c.Message(a)
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		return key.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return key.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// verify says whether the officer has signed it.
func (c Challenge) verify(a Act, o Officer, signature []byte) bool {
	key, err := o.PublicKey()
	if err != nil {
		return false
	}
	message := c.Message(a)
	switch k := key.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(k, message, signature)
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		return ecdsa.VerifyASN1(k, sum[:], signature)
	}
	return false
}

// An Approval is an officer's signature on a plan.
type Approval struct {
	Officer   string    `json:"officer"`
	Key       string    `json:"key"`
	Time      time.Time `json:"time"`
	Signature []byte    `json:"signature"`
}

// sealed says whether the officers have sealed the custody.
func (s *controlSet) sealed() bool { return s.authority != nil && s.authority.Sealed }

// policyOf is the policy in force: with the grants of the officers' bundle, or
// without officers those of the configuration.
func (c *Custodian) policyOf(s *controlSet) *Policy {
	config := c.policy.Load()
	if s.policy == nil {
		return config
	}
	if j := c.joined.Load(); j != nil && j.config == config && j.bundle == s.policy {
		return j.both
	}
	p := *s.policy
	if config != nil {
		p.tokens, p.sealing, p.budgets, p.conditions = config.tokens, config.sealing, config.budgets, config.conditions
		p.authority = &authority{permits: s.policy.authority.permits, rules: config.rules()}
	}
	c.joined.Store(&joinedPolicy{config, s.policy, &p})
	return &p
}

// A joinedPolicy is the officers' grants with what the configuration has
// beside grants: rules that forbid, licence tokens and sealing.
type joinedPolicy struct{ config, bundle, both *Policy }

// refusePolicy says no to the configuration's policy where officers decide,
// unless it is theirs, and writes the attempt down.
func (c *Custodian) refusePolicy(ctx context.Context, p *Policy) error {
	set := c.set.Load()
	if set.authority == nil || p == nil {
		return nil
	}
	d := p.Digest()
	var err error
	switch {
	case !set.authority.accepts(p):
		err = refusePlan(ErrConditions, "the rules, licence tokens, sealing and budgets of the configuration (conditions %x) are not what the officers have signed (%x): use the configuration that has it, custodiand -check-config prints what one has, or have a policy ceremony change it", p.Conditions(), set.authority.Conditions)
	case p.granted == set.policy.granted:
		return nil
	default:
		err = refusePlan(ErrQuorum, "the grants of the configuration (digest %x) are not the officers' bundle: %s; the bundle stays in force, and a policy ceremony changes it", d, difference(p, set.policy))
	}
	c.log.Error("policy refused", "err", err)
	if _, aerr := c.record(ctx, audit.Entry{Action: "policy.load", Outcome: audit.Denied, Reason: string(ReasonOf(err)), Priority: true,
		ControlRevision: set.head.Revision, Detail: fmt.Sprintf("policy %x conditions %x", d, p.Conditions())}); aerr != nil {
		return aerr
	}
	return err
}

// difference says which grants the configuration has alone, and which the
// officers' bundle, so that nobody has to compare two files by eye.
func difference(config, bundle *Policy) string {
	has, wants := config.lines(), bundle.lines()
	var told []string
	for _, g := range missing(has, wants) {
		told = append(told, "only the configuration has "+g)
	}
	for _, g := range missing(wants, has) {
		told = append(told, "only the bundle has "+g)
	}
	const most = 10
	if len(told) > most {
		told = append(told[:most], fmt.Sprintf("and %d more", len(told)-most))
	}
	return strings.Join(told, "; ")
}

// describe says who may change policy, for the status.
func (a *Authority) describe() string {
	if a == nil {
		return "configuration file (no officers' quorum)"
	}
	return fmt.Sprintf("%d officers, of whom a ceremony needs %d (conditions: %s)", len(a.Officers), a.Quorum[0].M, sayConditions(a.Conditions))
}

// ceremonyWarnings are what everybody should see of the officers' part.
func (c *Custodian) ceremonyWarnings(set *controlSet, now time.Time) []string {
	if set.authority == nil {
		return []string{"no officers' quorum: the configuration file decides who may do what"}
	}
	w := []string{}
	if set.sealed() {
		w = append(w, "sealed by the officers: nothing is served")
	}
	if p := c.policy.Load(); p != nil && p.granted != set.policy.granted {
		w = append(w, "the grants of the configuration file are not the officers' bundle, and are refused")
	}
	if text := c.conditionsWarning(set.authority); text != "" {
		w = append(w, text)
	}
	for _, id := range slices.Sorted(maps.Keys(set.ceremonies)) {
		info, err := c.describeCeremony(set, set.ceremonies[id])
		if err != nil || info.State != CeremonyProposed || info.ReadyTime.IsZero() {
			continue
		}
		w = append(w, fmt.Sprintf("recovery %s replaces the officers from %s on; any officer can stop it: custodianctl ceremony cancel %s",
			id, info.ReadyTime.UTC().Format(time.RFC3339), id))
	}
	return w
}
