package custodian

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A tokenRef names a token without telling who it was for: the first half of
// the SHA-256 of issuer and jti.
type tokenRef [16]byte

// A tokenUse is the newest use of a token: what it was bound to when it was
// first used, and how many calls have shown it.
type tokenUse struct {
	ref     tokenRef
	binding [8]byte // the beginning of the SHA-256 of caller, session, content
	n       int
	until   time.Time // it may be forgotten
}

// maxTokenUses is how many tokens of a generation are remembered: some 200 MB for
// the two. A thousand new tokens a second, for 40 seconds each, are 4% of one.
const maxTokenUses = 1 << 20

// tokenUses remember which tokens were used. The memory is filled from the
// audit log at a start: a use is written down with the release, and no key
// leaves before that is durable, so a use that is not in the log released
// nothing.
//
// There are two generations. A use is found in both and written to the newer
// one; every span the older one is dropped.
type tokenUses struct {
	most int // tokens of a generation

	// mu guards the fields below.
	mu    sync.Mutex
	turn  time.Time // the end of the newer generation
	newer map[tokenRef]tokenUse
	older map[tokenRef]tokenUse
}

// use counts a call that shows the token t for a key of its content.
func (u *tokenUses) use(rules *Tokens, who Caller, t *Token, now time.Time) (*tokenUse, error) {
	use := tokenUse{ref: refOf(t.issuer.Issuer, t.id), binding: bindingOf(who.ID, t.session, t.content), n: 1, until: now.Add(rules.span())}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.forget(now, rules.span())
	before, ok := u.newer[use.ref]
	if !ok {
		before, ok = u.older[use.ref]
	}
	switch {
	case ok && before.binding != use.binding:
		return nil, fmt.Errorf("licence token: its jti was used by another caller, session or content: %w", ErrTokenReplayed)
	case ok && before.n >= rules.MaxUses:
		return nil, fmt.Errorf("licence token: it was used %d times: %w", before.n, ErrTokenReplayed)
	case !ok && len(u.newer) >= u.most:
		return nil, fmt.Errorf("licence token: %d others are remembered, and no more can be for %s: %w", len(u.newer)+len(u.older), u.turn.Sub(now), ErrRate)
	}
	use.n += before.n
	if u.newer == nil {
		u.newer = map[tokenRef]tokenUse{}
	}
	u.newer[use.ref] = use
	return &use, nil
}

// forget turns the generations.
func (u *tokenUses) forget(now time.Time, span time.Duration) {
	if now.Before(u.turn) {
		return
	}
	u.older = u.newer
	if !now.Before(u.turn.Add(span)) && !u.turn.IsZero() {
		u.older = nil // nobody has come for that long
	}
	u.newer, u.turn = nil, now.Add(span)
}

// loggedUses are the uses that the audit log knows and that are not over.
type loggedUses struct {
	uses  map[tokenRef]tokenUse
	swept int // how many were left after the last sweep
}

// visit takes one entry in.
func (l *loggedUses) visit(e *audit.Entry) {
	if e.Detail == "" || e.Action != string(ActionRelease) || e.Outcome != audit.Allowed {
		return
	}
	use, ok := parseTokenUse(e.Detail)
	if !ok || l.uses[use.ref].n > use.n { // calls that ran at once may be written in another order
		return
	}
	if l.uses == nil {
		l.uses = map[tokenRef]tokenUse{}
	}
	l.uses[use.ref] = use
	if len(l.uses) < 2*l.swept+1024 {
		return
	}
	for ref, use := range l.uses {
		if use.until.Before(e.Time) {
			delete(l.uses, ref)
		}
	}
	l.swept = len(l.uses)
}

// newTokenUses remembers what the log knows.
func newTokenUses(logged loggedUses, now time.Time) *tokenUses {
	return &tokenUses{most: maxTokenUses, older: logged.uses, turn: now.Add(MaxTokenLifetime + 2*MaxTokenSkew)}
}

func refOf(issuer, id string) tokenRef {
	sum := hashTexts(issuer, id)
	return tokenRef(sum[:16])
}

func bindingOf(caller, session string, content ContentID) [8]byte {
	sum := hashTexts(caller, session, string(content))
	return [8]byte(sum[:8])
}

func hashTexts(texts ...string) [32]byte {
	b := make([]byte, 0, 256)
	for _, s := range texts {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	return sha256.Sum256(b)
}

const tokenUsePrefix = "token "

// String is what the audit log says of a use; parseTokenUse reads it.
func (u *tokenUse) String() string {
	b := make([]byte, 0, 96)
	b = append(b, tokenUsePrefix...)
	b = hex.AppendEncode(b, u.ref[:])
	b = append(b, ' ')
	b = hex.AppendEncode(b, u.binding[:])
	b = append(b, " use "...)
	b = strconv.AppendInt(b, int64(u.n), 10)
	b = append(b, " until "...)
	return string(strconv.AppendInt(b, u.until.Unix()+1, 10))
}

// parseTokenUse finds a use among the parts of an audit entry's detail.
func parseTokenUse(detail string) (use tokenUse, ok bool) {
	for detail != "" && !ok {
		var part string
		part, detail, _ = strings.Cut(detail, "; ")
		if !strings.HasPrefix(part, tokenUsePrefix) {
			continue
		}
		f := strings.Fields(part)
		if len(f) != 7 || f[3] != "use" || f[5] != "until" {
			continue
		}
		ref, err1 := hex.DecodeString(f[1])
		binding, err2 := hex.DecodeString(f[2])
		n, err3 := strconv.Atoi(f[4])
		until, err4 := strconv.ParseInt(f[6], 10, 64)
		if err1 == nil && err2 == nil && err3 == nil && err4 == nil && len(ref) == len(use.ref) && len(binding) == len(use.binding) {
			use, ok = tokenUse{tokenRef(ref), [8]byte(binding), n, time.Unix(until, 0)}, true
		}
	}
	return use, ok
}
