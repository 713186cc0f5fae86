package custodian

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// PlanFormat is the first line of every plan: plan: custodian/1.
const PlanFormat = "custodian/1"

// Limits of a plan.
const (
	MaxPlanSize = 64 << 10            // bytes
	MaxPlanLife = 30 * 24 * time.Hour // from its proposal to its expiry
)

// A PlanKind is a kind of ceremony.
type PlanKind string

// The kinds of ceremonies.
const (
	KindGenesis  PlanKind = "genesis"  // officers, quorum, grants and MEK profile, once, by custodiand init
	KindOfficers PlanKind = "officers" // officers, quorum or recovery keys change
	KindRecovery PlanKind = "recovery" // the recovery keys replace the officers, after RecoveryDelay
	KindPolicy   PlanKind = "policy"   // the grants are replaced, and the conditions beside them
	KindUnfreeze PlanKind = "unfreeze" // categories are opened again, or callers
	KindSeal     PlanKind = "seal"     // nothing is served any more
	KindUnseal   PlanKind = "unseal"   // service goes on

	KindProviders     PlanKind = "providers"      // categories move to other KMS providers
	KindKEKRotation   PlanKind = "kek-rotation"   // categories get a new KEK version
	KindMEKRotation   PlanKind = "mek-rotation"   // a new MEK takes the place of one
	KindKEKCompromise PlanKind = "kek-compromise" // KEK versions became known to others
	KindRollback      PlanKind = "rollback"       // rotations that are held are taken back
	KindRetire        PlanKind = "retire"         // rotations that are held are ended for good

	KindImport PlanKind = "import" // keys that others have made may come in
	KindExport PlanKind = "export" // keys may go out to who takes them by push

	KindRestore          PlanKind = "restore"           // a backup takes the place of a lost store, by custodiand restore
	KindCallerCompromise PlanKind = "caller-compromise" // a caller is stopped, and what it was given decided about
	KindDestroy          PlanKind = "destroy"           // retired KEK versions, or a retired MEK, are erased
	KindCategoryPolicy   PlanKind = "category-policy"   // mode and standing approval of categories
	KindRekey            PlanKind = "rekey"             // content gets new keys
	KindWithdraw         PlanKind = "withdraw"          // the keys that were superseded are released no more
)

// A Plan says what a ceremony is to do, and names every object that it will
// touch. It is a small YAML file: that file is reviewed, read aloud, approved
// and archived.
type Plan struct {
	Format string   `yaml:"plan" json:"plan"` // PlanFormat
	Kind   PlanKind `yaml:"kind" json:"kind"`
	Reason string   `yaml:"reason" json:"reason"`
	// Expires is UTC to the second, 2026-11-24T12:00:00Z. Nothing is approved
	// or executed from then on.
	Expires string `yaml:"expires" json:"expires"`

	// Genesis is what only the first ceremony decides.
	Genesis *GenesisPlan `yaml:"genesis,omitempty" json:"genesis,omitempty"`
	// Officers, Quorum and Recovery are the officers as they will be, all of
	// them: of genesis, officers and (without Recovery) recovery.
	Officers []Officer     `yaml:"officers,omitempty" json:"officers,omitempty"`
	Quorum   *Quorum       `yaml:"quorum,omitempty" json:"quorum,omitempty"`
	Recovery *RecoveryPlan `yaml:"recovery,omitempty" json:"recovery,omitempty"`
	Grants   []PlanGrant   `yaml:"grants,omitempty" json:"grants,omitempty"` // of genesis and policy: all of them
	// Conditions are what the officers sign beside the grants: Policy.Conditions in
	// hexadecimal, or ConditionsOfConfiguration. Without it they stay as they are.
	Conditions string         `yaml:"conditions,omitempty" json:"conditions,omitempty"`
	Categories []CategoryName `yaml:"categories,omitempty" json:"categories,omitempty"`
	Callers    []string       `yaml:"callers,omitempty" json:"callers,omitempty"`     // identities, as the grants have them
	Providers  []string       `yaml:"providers,omitempty" json:"providers,omitempty"` // all that each category is to have
	// MEKVersion is the one whose place a new one takes, or that is destroyed.
	MEKVersion  uint32   `yaml:"mek_version,omitempty" json:"mek_version,omitempty"`
	KeyVersions []string `yaml:"key_versions,omitempty" json:"key_versions,omitempty"` // movies/4: compromised, destroyed, or what content lies under
	Decision    string   `yaml:"decision,omitempty" json:"decision,omitempty"`         // DecisionServe or DecisionFreeze
	Rotations   []string `yaml:"rotations,omitempty" json:"rotations,omitempty"`       // kek/movies/5, mek/2
	// Hold is how long a rotation can be rolled back at least: 72h.
	Hold string `yaml:"hold,omitempty" json:"hold,omitempty"`

	HelperKeys bool `yaml:"helper_keys,omitempty" json:"helper_keys,omitempty"` // they move to Providers, too

	KIDs      []string       `yaml:"kids,omitempty" json:"kids,omitempty"` // of the keys that may come in
	Recipient *PlanRecipient `yaml:"recipient,omitempty" json:"recipient,omitempty"`
	Backup    *BackupPlan    `yaml:"backup,omitempty" json:"backup,omitempty"`

	Mode     string        `yaml:"mode,omitempty" json:"mode,omitempty"` // one of PlanModes
	NewBatch *NewBatchPlan `yaml:"new_batch,omitempty" json:"new_batch,omitempty"`
	Content  []PlanContent `yaml:"content,omitempty" json:"content,omitempty"`
}

// A GenesisPlan is the part of a genesis plan that never changes again.
type GenesisPlan struct {
	MEKProfile MEKProfile `yaml:"mek_profile" json:"mek_profile"`
	// Nonce makes the approvals of this genesis those of no other: 64 random
	// hexadecimal digits.
	Nonce string `yaml:"nonce" json:"nonce"`
}

// A RecoveryPlan names the keys that can replace the officers, and nothing
// else. None of them is an officer's.
type RecoveryPlan struct {
	Keys   []Officer `yaml:"keys" json:"keys"`
	Quorum uint32    `yaml:"quorum" json:"quorum"` // how many of them it takes, 2 at least
}

// A Quorum is how many officers a ceremony needs.
type Quorum struct {
	Default uint32              `yaml:"default" json:"default"`
	Kinds   map[PlanKind]uint32 `yaml:"kinds,omitempty" json:"kinds,omitempty"` // where it is another
}

// A PlanGrant is a Grant as a file has it.
type PlanGrant struct {
	Identity   string   `yaml:"identity" json:"identity"`
	Role       string   `yaml:"role" json:"role"`
	Categories []string `yaml:"categories,omitempty" json:"categories,omitempty"` // "*": all
	Reissue    bool     `yaml:"reissue,omitempty" json:"reissue,omitempty"`
	SPKI       string   `yaml:"spki,omitempty" json:"spki,omitempty"` // 64 hexadecimal digits
}

// sections are the parts of a plan beside its first four lines.
var sections = []struct {
	name  string
	there func(*Plan) bool
}{
	{"genesis", func(p *Plan) bool { return p.Genesis != nil }},
	{"officers", func(p *Plan) bool { return len(p.Officers) > 0 }},
	{"quorum", func(p *Plan) bool { return p.Quorum != nil }},
	{"recovery", func(p *Plan) bool { return p.Recovery != nil }},
	{"grants", func(p *Plan) bool { return len(p.Grants) > 0 }},
	{"conditions", func(p *Plan) bool { return p.Conditions != "" }},
	{"categories", func(p *Plan) bool { return len(p.Categories) > 0 }},
	{"callers", func(p *Plan) bool { return len(p.Callers) > 0 }},
	{"providers", func(p *Plan) bool { return len(p.Providers) > 0 }},
	{"mek_version", func(p *Plan) bool { return p.MEKVersion > 0 }},
	{"key_versions", func(p *Plan) bool { return len(p.KeyVersions) > 0 }},
	{"decision", func(p *Plan) bool { return p.Decision != "" }},
	{"rotations", func(p *Plan) bool { return len(p.Rotations) > 0 }},
	{"hold", func(p *Plan) bool { return p.Hold != "" }},
	{"helper_keys", func(p *Plan) bool { return p.HelperKeys }},
	{"kids", func(p *Plan) bool { return len(p.KIDs) > 0 }},
	{"recipient", func(p *Plan) bool { return p.Recipient != nil }},
	{"backup", func(p *Plan) bool { return p.Backup != nil }},
	{"mode", func(p *Plan) bool { return p.Mode != "" }},
	{"new_batch", func(p *Plan) bool { return p.NewBatch != nil }},
	{"content", func(p *Plan) bool { return len(p.Content) > 0 }},
}

// planSections are the sections that a kind must have; one with a question
// mark it may have. It has no others.
var planSections = map[PlanKind][]string{
	KindGenesis:  {"genesis", "officers", "quorum", "recovery?", "grants", "conditions?"},
	KindOfficers: {"officers", "quorum", "recovery?"},
	KindRecovery: {"officers", "quorum"},
	KindPolicy:   {"grants", "conditions?"},
	KindUnfreeze: {"categories?", "callers?"},
	KindSeal:     {},
	KindUnseal:   {},

	KindProviders:     {"categories?", "helper_keys?", "providers"},
	KindKEKRotation:   {"categories", "hold?"},
	KindMEKRotation:   {"mek_version", "hold?"},
	KindKEKCompromise: {"key_versions", "decision"},
	KindRollback:      {"rotations"},
	KindRetire:        {"rotations"},

	KindImport: {"content", "kids"},
	KindExport: {"content", "recipient"},

	KindRestore:          {"backup"},
	KindCallerCompromise: {"callers", "categories?", "decision"},
	KindDestroy:          {"key_versions?", "mek_version?"},
	KindCategoryPolicy:   {"categories", "mode?", "new_batch?"},
	KindRekey:            {"content?", "key_versions?", "callers?"},
	KindWithdraw:         {"content?", "key_versions?", "callers?"},
}

// ParsePlan reads a plan, and says everything that is wrong with it at once.
// Unknown and repeated fields are errors.
func ParsePlan(text []byte) (*Plan, error) {
	if len(text) > MaxPlanSize {
		return nil, invalid("plan", fmt.Errorf("%d bytes: must be at most %d", len(text), MaxPlanSize))
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	var p Plan
	if err := d.Decode(&p); errors.Is(err, io.EOF) {
		return nil, invalid("plan", errors.New("the file is empty"))
	} else if err != nil {
		return nil, invalid("plan", plainYAML(err))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, invalid("plan", errors.New("the file holds more than one document"))
	}
	if err := p.check(); err != nil {
		return nil, invalid("plan", err)
	}
	return &p, nil
}

// yamlType is how the YAML package words an unknown field, with a Go type in it.
var yamlType = regexp.MustCompile(`field (\S+) not found in type \S+`)

func plainYAML(err error) error {
	types, ok := errors.AsType[*yaml.TypeError](err)
	if !ok {
		return err
	}
	var faults []error
	for _, text := range types.Errors {
		faults = append(faults, errors.New(yamlType.ReplaceAllString(text, "unknown field $1")))
	}
	return errors.Join(faults...)
}

// Canonical is the plan as JSON, which is the same for every way of writing
// the same plan: of two files that differ in comments and layout only, it is
// one. It is a plan itself.
func (p *Plan) Canonical() []byte {
	b, err := json.Marshal(p)
	if err != nil {
		panic("plan: " + err.Error()) // strings and numbers only
	}
	return b
}

// Digest names the plan. It is what officers approve.
func (p *Plan) Digest() [32]byte {
	return sha256.Sum256(append([]byte("custodian plan 1\x00"), p.Canonical()...))
}

// ExpireTime is Expires.
func (p *Plan) ExpireTime() time.Time {
	t, _ := time.Parse(time.RFC3339, p.Expires) // checked by ParsePlan
	return t.UTC()
}

func (p *Plan) check() error {
	var faults []error
	fault := func(field, format string, args ...any) {
		faults = append(faults, fmt.Errorf("%s: %w", field, fmt.Errorf(format, args...)))
	}
	if p.Format != PlanFormat {
		fault("plan", "%.40q: must be %s", p.Format, PlanFormat)
	}
	if err := printable(p.Reason, MaxCauseSize); err != nil {
		fault("reason", "%w", err)
	}
	if t, err := time.Parse(time.RFC3339, p.Expires); err != nil || t.UTC().Format(time.RFC3339) != p.Expires {
		fault("expires", "%.40q: must be a time in UTC, to the second: 2026-11-24T12:00:00Z", p.Expires)
	}
	wanted, known := planSections[p.Kind]
	if !known {
		fault("kind", "%.40q: must be one of %v", string(p.Kind), kindNames())
		return errors.Join(faults...)
	}
	for _, s := range sections {
		must, may := slices.Contains(wanted, s.name), slices.Contains(wanted, s.name+"?")
		switch {
		case s.there(p) && !must && !may:
			fault(s.name, "a plan of kind %s has none", p.Kind)
		case !s.there(p) && must:
			fault(s.name, "a plan of kind %s needs it", p.Kind)
		}
	}
	if p.Genesis != nil {
		faults = append(faults, p.Genesis.check()...)
	}
	if p.Backup != nil {
		faults = append(faults, p.Backup.check()...)
	}
	if len(p.Officers) > 0 {
		faults = append(faults, p.checkOfficers()...)
	}
	if len(p.Grants) > 0 {
		if _, err := planPolicy(p.Grants, p.Officers); err != nil {
			faults = append(faults, err)
		}
	}
	if err := p.checkConditions(); err != nil {
		faults = append(faults, err)
	}
	faults = slices.Concat(faults, p.checkRotationFields(), p.checkCategoryPolicy(), p.checkContent(), p.checkTransfer())
	if p.Kind == KindUnfreeze && len(p.Categories)+len(p.Callers) == 0 {
		fault("categories", "a plan of kind %s needs it, or callers", p.Kind)
	}
	if p.Kind == KindDestroy && len(p.KeyVersions) == 0 && p.MEKVersion == 0 {
		fault("key_versions", "a plan of kind %s needs it, or mek_version", p.Kind)
	}
	if p.Kind == KindProviders && len(p.Categories) == 0 && !p.HelperKeys {
		fault("categories", "a plan of kind %s needs it, or helper_keys: true", p.Kind)
	}
	faults = slices.Concat(faults,
		checkEach("callers", p.Callers, checkCallerID),
		checkEach("providers", p.Providers, func(name string) error { return printable(name, 64) }),
		checkEach("categories", p.Categories, CategoryName.Check))
	return errors.Join(faults...)
}

// checkEach says what is wrong with the names of a list, and which are there
// twice.
func checkEach[N ~string](list string, all []N, check func(N) error) (faults []error) {
	for i, name := range all {
		if err := check(name); err != nil {
			faults = append(faults, fmt.Errorf("%s[%d]: %w", list, i, err))
		}
		if slices.Contains(all[:i], name) {
			faults = append(faults, fmt.Errorf("%s[%d]: %.200s is named twice", list, i, name))
		}
	}
	return faults
}

func kindNames() []string {
	var names []string
	for k := range planSections {
		names = append(names, string(k))
	}
	slices.Sort(names)
	return names
}

func (g *GenesisPlan) check() (faults []error) {
	if g.MEKProfile != ProfileSealed && g.MEKProfile != ProfileRotatable {
		faults = append(faults, fmt.Errorf("genesis.mek_profile: %.40q: must be %s or %s", string(g.MEKProfile), ProfileSealed, ProfileRotatable))
	}
	if b, err := hex.DecodeString(g.Nonce); err != nil || len(b) != 32 || strings.ToLower(g.Nonce) != g.Nonce {
		faults = append(faults, errors.New("genesis.nonce: must be 64 random digits, 0-9 a-f"))
	}
	return faults
}

// printable says what is wrong with a text that people read aloud, or nil.
func printable(s string, limit int) error {
	if strings.TrimSpace(s) == "" {
		return errors.New("empty")
	}
	if err := checkText(s, limit); err != nil {
		return err
	}
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) && r != '\n' }) {
		return errors.New("must hold printable characters only")
	}
	return nil
}

// planPolicy makes the policy of a bundle, and holds it against the officers:
// somebody must be able to call as an officer, and no officer's key is an
// operator's.
func planPolicy(grants []PlanGrant, officers []Officer) (*Policy, error) {
	var faults []error
	list := make([]Grant, len(grants))
	caller := false
	for i, g := range grants {
		if err := printable(g.Identity, 2048); err != nil {
			faults = append(faults, fmt.Errorf("grants[%d].identity: %w", i, err))
		}
		list[i] = Grant{Identity: g.Identity, Role: Role(g.Role), Reissue: g.Reissue}
		caller = caller || list[i].Role == RoleOfficer
		for _, cat := range g.Categories {
			if cat == "*" {
				list[i].AllCategories = true
			} else {
				list[i].Categories = append(list[i].Categories, CategoryName(cat))
			}
		}
		if g.SPKI == "" {
			continue
		}
		pin, err := hex.DecodeString(g.SPKI)
		if err != nil || len(pin) != sha256.Size {
			faults = append(faults, fmt.Errorf("grants[%d].spki: must be 64 hexadecimal digits, the SHA-256 of the public key (custodianctl pki show prints it)", i))
			continue
		}
		list[i].SPKI = (*[32]byte)(pin)
	}
	if !caller {
		faults = append(faults, errors.New("grants: nobody has the role officer, so nobody could ever propose a ceremony again"))
	}
	p, err := NewPolicy(list)
	if err := errors.Join(append(faults, err)...); err != nil {
		return nil, err
	}
	for _, o := range officers {
		p.officers[o.keyHash()] = true
	}
	for i, g := range list {
		if g.Role == RoleOperator && g.SPKI != nil && p.officers[*g.SPKI] {
			faults = append(faults, fmt.Errorf("grants[%d].spki: an operator with the key of an officer; these must be different people", i))
		}
	}
	return p, errors.Join(faults...)
}
