package custodian

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ErrConditions: the configuration's conditions are not those that the officers
// have signed. It matches ErrQuorum.
var ErrConditions = fmt.Errorf("the conditions are not the officers': %w", ErrQuorum)

// ConditionsOfConfiguration in a plan gives the conditions back to the
// configuration.
const ConditionsOfConfiguration = "configuration"

// A condition is a part of what decides beside the grants.
type condition int

const (
	conditionRules condition = iota
	conditionSealing
	conditionTokens
	conditionBudgets
	conditions // how many there are
)

func (c condition) String() string {
	return [conditions]string{"rules", "sealing", "tokens", "budgets"}[c]
}

// with returns the policy with a condition, whose text both digests cover. The
// order of the lines is nothing that decides.
func (p *Policy) with(c condition, lines []string) *Policy {
	slices.Sort(lines)
	text := strings.Join(lines, "\n")
	next := *p
	next.digest = sha256.Sum256([]byte(fmt.Sprintf("%x %s\n%s", p.digest, c, text)))
	if len(lines) > 0 {
		next.conditions[c] = sha256.Sum256([]byte(text))
	}
	return &next
}

// Conditions is the digest of all that decides beside the grants: rules, sealing,
// licence tokens but for the issuers' keys, and budgets. Officers sign it, so what
// it is of a given configuration never changes. It is not zero, even of none.
func (p *Policy) Conditions() [32]byte {
	if p == nil {
		p = &Policy{}
	}
	text := []byte("custodian conditions 1\x00")
	for c := range conditions {
		text = append(text, p.conditions[c][:]...)
	}
	return sha256.Sum256(text)
}

// checkConditions says what is wrong with the conditions of a plan.
func (p *Plan) checkConditions() error {
	if p.Conditions == "" || p.Conditions == ConditionsOfConfiguration {
		return nil
	}
	if b, err := hex.DecodeString(p.Conditions); err != nil || len(b) != 32 || [32]byte(b) == [32]byte{} || strings.ToLower(p.Conditions) != p.Conditions {
		return errors.New("conditions: must be the 64 digits, 0-9 a-f, that custodiand -check-config prints, or " + ConditionsOfConfiguration)
	}
	return nil
}

// conditionsAfter are the officers' conditions once the plan is done. The zero
// ones are left to the configuration.
func (p *Plan) conditionsAfter(was [32]byte) [32]byte {
	switch p.Conditions {
	case "":
		return was
	case ConditionsOfConfiguration:
		return [32]byte{}
	}
	b, _ := hex.DecodeString(p.Conditions) // checked by ParsePlan
	return [32]byte(b)
}

// accepts says whether the policy's conditions are the officers', or the officers
// leave them to the configuration.
func (a *Authority) accepts(p *Policy) bool {
	return a.Conditions == [32]byte{} || p.Conditions() == a.Conditions
}

func sayConditions(d [32]byte) string {
	if d == ([32]byte{}) {
		return "those of the configuration file"
	}
	return hex.EncodeToString(d[:])
}

// rehearseConditions says what a plan makes of the officers' conditions; same
// where it leaves them as they are.
func (c *Custodian) rehearseConditions(a *Authority, p *Plan) (line string, same bool) {
	is := p.conditionsAfter(a.Conditions)
	if is == a.Conditions {
		return "conditions stay: " + sayConditions(is), true
	}
	line = fmt.Sprintf("conditions: from %s to %s", sayConditions(a.Conditions), sayConditions(is))
	running := c.policy.Load()
	if running == nil || is == [32]byte{} {
		return line, false
	}
	after := *a
	after.Conditions = is
	if after.accepts(running) {
		return line + ", which the running configuration has", false
	}
	d := running.Conditions()
	return line + fmt.Sprintf("; the running configuration has others, %x, which stay in force until one with those of the plan is loaded: no other starts any more", d), false
}

// conditionsOf are the digest in force, and the one that the officers have signed:
// "" where they leave the conditions to the configuration.
func (c *Custodian) conditionsOf(a *Authority) (inForce, signed string) {
	if a != nil && a.Conditions != [32]byte{} {
		signed = sayConditions(a.Conditions)
	}
	d := c.policy.Load().Conditions()
	return hex.EncodeToString(d[:]), signed
}

// conditionsWarning says to everybody who decides the conditions, where it is
// not the officers; "" where all is well.
func (c *Custodian) conditionsWarning(a *Authority) string {
	running := c.policy.Load()
	switch {
	case running == nil:
		return ""
	case a.Conditions == [32]byte{}:
		return fmt.Sprintf("the officers leave rules, licence tokens, sealing and budgets to the configuration file: an operator alone changes them (conditions %x)", running.Conditions())
	case !a.accepts(running):
		return fmt.Sprintf("rules, licence tokens, sealing or budgets in force (conditions %x) are not what the officers have signed (%x): load the configuration that has it, none other starts any more", running.Conditions(), a.Conditions)
	}
	return ""
}
