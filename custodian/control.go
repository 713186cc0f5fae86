package custodian

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// What a start finds when records were tampered with. Each of them matches
// ErrRecordCorrupt as well.
var (
	// ErrRecordMAC: a control record, or the head, is not as we wrote it.
	ErrRecordMAC = errors.New("the record's MAC does not verify")
	// ErrControlDigest: every record is genuine, but together they are not the
	// control set that the head closes: one was dropped, added or replaced by
	// its older self.
	ErrControlDigest = errors.New("the control records are not the set that the head closes")
	// ErrStoreRollback: the audit log knows a later store than this one.
	ErrStoreRollback = errors.New("the store is older than the audit log")
	// ErrLogRollback: the store knows more control changes than the audit log.
	ErrLogRollback = errors.New("the audit log is older than the store")
)

func corrupt(which string, err error) error {
	return fmt.Errorf("%s: %w: %w", which, err, ErrRecordCorrupt)
}

type controlKey struct {
	kind ControlKind
	name string
}

// A controlSet is the control records, decoded, at one revision of the head.
// It never changes once it is published: a change makes a new one.
type controlSet struct {
	head             Head
	meks             map[uint32]MEK
	keks             map[KEKID]KEK
	helpers          map[helperID]Helper
	signers          map[string]Signer
	categories       map[CategoryName]Category
	exceptions       map[KID]Exception
	rotations        map[string]Rotation // by name
	exposed          map[CategoryName][]exposure
	rewraps          map[CategoryName]RewrapJob // those of the helper keys under ""
	categoryPolicies map[CategoryName]CategoryPolicy
	rekeys           map[contentItem]Rekey
	frozenCallers    map[string]FrozenCaller // by identity
	ceremonial
	revoked
	// buckets hold the hash of every record, by the first byte of the hash of
	// its key. The head's digest is the hash of the buckets' hashes, so a
	// change costs one bucket, not the whole set.
	buckets [256]map[controlKey][32]byte
	sums    [256][32]byte
}

type helperID struct {
	purpose HelperPurpose
	version uint32
}

func newControlSet() *controlSet {
	return &controlSet{meks: map[uint32]MEK{}, keks: map[KEKID]KEK{}, helpers: map[helperID]Helper{}, signers: map[string]Signer{},
		categories: map[CategoryName]Category{}, exceptions: map[KID]Exception{}, rotations: map[string]Rotation{}, rewraps: map[CategoryName]RewrapJob{}, exposed: map[CategoryName][]exposure{},
		frozenCallers: map[string]FrozenCaller{}, categoryPolicies: map[CategoryName]CategoryPolicy{}, rekeys: map[contentItem]Rekey{},
		ceremonial: ceremonial{ceremonies: map[string]Ceremony{}}, revoked: newRevoked()}
}

func (s *controlSet) clone() *controlSet {
	n := *s
	n.meks, n.keks, n.helpers = maps.Clone(s.meks), maps.Clone(s.keks), maps.Clone(s.helpers)
	n.signers, n.categories, n.exceptions = maps.Clone(s.signers), maps.Clone(s.categories), maps.Clone(s.exceptions)
	n.rotations, n.exposed = maps.Clone(s.rotations), maps.Clone(s.exposed)
	n.rewraps, n.frozenCallers = maps.Clone(s.rewraps), maps.Clone(s.frozenCallers)
	n.categoryPolicies, n.rekeys = maps.Clone(s.categoryPolicies), maps.Clone(s.rekeys)
	n.ceremonies = maps.Clone(s.ceremonies)
	n.revoked = s.revoked.clone()
	return &n
}

func (k controlKey) hash() [32]byte {
	b := append([]byte("custodian control key 1\x00"), byte(k.kind))
	return sha256.Sum256(append(b, k.name...))
}

func recordHash(r ControlRecord) [32]byte {
	b := append([]byte("custodian control record 1\x00"), byte(r.Kind))
	b = binary.AppendUvarint(b, uint64(len(r.Name)))
	b = append(b, r.Name...)
	b = binary.AppendUvarint(b, uint64(r.MACVersion))
	b = append(b, r.MAC[:]...)
	return sha256.Sum256(append(b, r.Body...))
}

// put takes a record into the set: its decoded form and its hash.
func (s *controlSet) put(r ControlRecord) error {
	if err := s.decode(r); err != nil {
		return err
	}
	k := controlKey{r.Kind, r.Name}
	i := k.hash()[0]
	s.buckets[i] = maps.Clone(s.buckets[i])
	if s.buckets[i] == nil {
		s.buckets[i] = map[controlKey][32]byte{}
	}
	s.buckets[i][k] = recordHash(r)
	s.sums[i] = sumBucket(s.buckets[i])
	return nil
}

func (s *controlSet) remove(k controlKey) {
	i := k.hash()[0]
	s.buckets[i] = maps.Clone(s.buckets[i])
	delete(s.buckets[i], k)
	s.sums[i] = sumBucket(s.buckets[i])
	switch k.kind {
	case ControlException:
		if kid, err := ParseKID(k.name); err == nil {
			delete(s.exceptions, kid)
		}
	case ControlRewrap:
		maps.DeleteFunc(s.rewraps, func(name CategoryName, _ RewrapJob) bool { return rewrapName(name) == k.name })
	case ControlRevocation:
		s.revoked.drop(k.name)
	case ControlFrozenCaller:
		maps.DeleteFunc(s.frozenCallers, func(identity string, _ FrozenCaller) bool { return frozenCallerName(identity) == k.name })
	}
}

func sumBucket(m map[controlKey][32]byte) [32]byte {
	if len(m) == 0 {
		return [32]byte{}
	}
	leaves := make([][64]byte, 0, len(m))
	for k, h := range m {
		var leaf [64]byte
		kh := k.hash()
		copy(leaf[:32], kh[:])
		copy(leaf[32:], h[:])
		leaves = append(leaves, leaf)
	}
	slices.SortFunc(leaves, func(a, b [64]byte) int { return bytes.Compare(a[:], b[:]) })
	h := sha256.New()
	for _, l := range leaves {
		h.Write(l[:])
	}
	return [32]byte(h.Sum(nil))
}

func (s *controlSet) digest() [32]byte {
	h := sha256.New()
	h.Write([]byte("custodian control set 1\x00"))
	for i := range s.sums {
		h.Write(s.sums[i][:])
	}
	return [32]byte(h.Sum(nil))
}

func (s *controlSet) decode(r ControlRecord) error {
	want := ""
	var err error
	switch r.Kind {
	case ControlMEK:
		var m MEK
		m, err = decodeMEK(r.Body)
		s.meks[m.Version], want = m, mekName(m.Version)
	case ControlKEK:
		var k KEK
		k, err = decodeKEK(r.Body)
		s.keks[k.ID], want = k, k.ID.String()
	case ControlHelper:
		var h Helper
		h, err = decodeHelper(r.Body)
		s.helpers[helperID{h.Purpose, h.Version}], want = h, helperName(h.Purpose, h.Version)
	case ControlSigner:
		var g Signer
		g, err = decodeSigner(r.Body)
		s.signers[r.Name], want = g, signerName(g.Purpose, g.Version)
	case ControlCategory:
		var c Category
		c, err = decodeCategory(r.Body)
		s.categories[c.Name], want = c, string(c.Name)
	case ControlException:
		var x Exception
		x, err = decodeException(r.Body)
		s.exceptions[x.KID], want = x, x.KID.String()
	case ControlRotation:
		var x Rotation
		x, err = decodeRotation(r.Body)
		s.rotations[r.Name], want = x, x.Name()
		s.expose(x)
	case ControlRewrap:
		var j RewrapJob
		j, err = decodeRewrap(r.Body)
		s.rewraps[j.Category], want = j, rewrapName(j.Category)
	case ControlFrozenCaller:
		var f FrozenCaller
		f, err = decodeFrozenCaller(r.Body)
		s.frozenCallers[f.Identity], want = f, frozenCallerName(f.Identity)
	case ControlCategoryPolicy:
		var p CategoryPolicy
		p, err = decodeCategoryPolicy(r.Body)
		s.categoryPolicies[p.Category], want = p, string(p.Category)
	case ControlRekey:
		var x Rekey
		x, err = decodeRekey(r.Body)
		s.rekeys[x.item()], want = x, x.item().recordName()
	case ControlAuthority, ControlCeremony:
		want, err = s.decodeCeremonial(r)
	case ControlRevocation:
		want, err = s.decodeRevocation(r.Body)
	default:
		return fmt.Errorf("control record %q: unknown kind %d: %w", r.Name, r.Kind, ErrRecordCorrupt)
	}
	if err == nil && want != r.Name {
		err = fmt.Errorf("control record %q is of %q: %w", r.Name, want, ErrRecordCorrupt)
	}
	return err
}

func mekName(v uint32) string                     { return fmt.Sprintf("mek/%d", v) }
func helperName(p HelperPurpose, v uint32) string { return fmt.Sprintf("%s/%d", p, v) }
func signerName(purpose string, v uint32) string  { return fmt.Sprintf("%s/%d", purpose, v) }
func mekRecord(m MEK) ControlRecord {
	return ControlRecord{Kind: ControlMEK, Name: mekName(m.Version), Body: encodeMEK(m)}
}
func kekRecord(k KEK) ControlRecord {
	return ControlRecord{Kind: ControlKEK, Name: k.ID.String(), Body: encodeKEK(k)}
}
func categoryRecord(c Category) ControlRecord {
	return ControlRecord{Kind: ControlCategory, Name: string(c.Name), Body: encodeCategory(c)}
}
func exceptionRecord(x Exception) ControlRecord {
	return ControlRecord{Kind: ControlException, Name: x.KID.String(), Body: encodeException(x)}
}
func rotationRecord(r Rotation) ControlRecord {
	return ControlRecord{Kind: ControlRotation, Name: r.Name(), Body: encodeRotation(r)}
}
func helperRecord(h Helper) ControlRecord {
	return ControlRecord{Kind: ControlHelper, Name: helperName(h.Purpose, h.Version), Body: encodeHelper(h)}
}
func signerRecord(g Signer) ControlRecord {
	return ControlRecord{Kind: ControlSigner, Name: signerName(g.Purpose, g.Version), Body: encodeSigner(g)}
}

// latestHelper is the version of a helper that protects.
func (s *controlSet) latestHelper(p HelperPurpose) (Helper, error) {
	var latest Helper
	for id, h := range s.helpers {
		if id.purpose == p && h.State == StateActive && h.Version > latest.Version {
			latest = h
		}
	}
	if latest.Version == 0 {
		return Helper{}, corrupt("helper key "+string(p), errors.New("no active version"))
	}
	return latest, nil
}

// activeMEK is the version that new keys are wrapped under.
func (s *controlSet) activeMEK(now time.Time) (MEK, error) {
	latest := s.protectingMEK()
	if latest.Version == 0 {
		return MEK{}, corrupt("mek", errors.New("no active version"))
	}
	return latest, usableMEK(latest, Protect, now)
}

// errNoChange ends a change that has become needless.
var errNoChange = errors.New("nothing to change")

// A change is one change of the control set.
type change struct {
	put    []ControlRecord // without MACs
	remove []controlKey
	entry  audit.Entry // what the audit log says of it
	lift   uint64      // the new revision is above this one, too
	// restricts tells a change that only takes rights away, as a freeze does: it
	// holds at once, not only when the log has it.
	restricts bool
	setTime   bool // the clock was confirmed: the highest time seen becomes now
}

// change makes one change: MACs and head are made first, the store takes them
// in one transaction, the new set is published, and the audit log is told.
// The caller answers nobody before it has returned.
//
// A store update that failed after doing it is told apart from one that did
// nothing by reading the head again.
func (c *Custodian) change(ctx context.Context, build func(old *controlSet, now time.Time) (change, error)) error {
	c.controlMu.Lock()
	defer c.controlMu.Unlock()
	if err := c.settle(ctx); err != nil {
		return err
	}
	old := c.set.Load()
	now := c.now()
	ch, err := build(old, now)
	if errors.Is(err, errNoChange) {
		return nil
	}
	if err != nil {
		return err
	}
	next := old.clone()
	for i := range ch.put {
		if err := c.sign(ctx, old, &ch.put[i]); err != nil {
			return err
		}
		if err := next.put(ch.put[i]); err != nil {
			return err
		}
	}
	if err := lawful(old, next); err != nil {
		return err
	}
	for _, k := range ch.remove {
		next.remove(k)
	}
	next.head.Revision = max(old.head.Revision, ch.lift) + 1
	next.head.Previous = old.head.Digest
	next.head.Digest = next.digest()
	// A clock that is not believed must not become the highest time seen: the
	// next start would believe it, and then no other.
	if ch.setTime || now.After(next.head.HighestNow) && c.lookAtClock() == nil {
		next.head.HighestNow = now
	}
	ch.entry = c.headEntry(next, ch.entry)
	pending, err := ch.entry.MarshalBinary()
	if err != nil {
		return fmt.Errorf("audit entry of control revision %d: %w", next.head.Revision, err)
	}
	next.head.Pending = sha256.Sum256(pending)
	head := ControlRecord{Name: "head", Body: encodeHead(next.head)}
	if err := c.sign(ctx, old, &head); err != nil {
		return err
	}
	err = c.store.Update(ctx, func(tx UpdateTx) error {
		if cur, err := tx.Head(); err != nil {
			return err
		} else if h, err := decodeHead(cur.Body); err != nil {
			return err
		} else if h.Revision != old.head.Revision {
			return fmt.Errorf("head is at revision %d, not %d: %w", h.Revision, old.head.Revision, ErrChanged)
		}
		for _, r := range ch.put {
			if err := tx.PutControl(r); err != nil {
				return err
			}
		}
		for _, k := range ch.remove {
			if err := tx.DeleteControl(k.kind, k.name); err != nil {
				return err
			}
		}
		if err := tx.PutCursor(pendingEntry, pending); err != nil {
			return err
		}
		return tx.PutHead(head)
	})
	u := &unsettled{next: next, entry: ch.entry, failed: err, restricts: ch.restricts}
	c.unsettled = u
	if serr := c.settle(ctx); serr != nil {
		return errors.Join(err, serr)
	}
	if u.stored {
		return nil // whatever the store answered, it did it
	}
	return err
}

// lawful says whether every key version went to a state that it may go to. Only
// a rotation that is rolled back makes its predecessor ACTIVE again.
func lawful(old, next *controlSet) error {
	for id, was := range old.keks {
		if is := next.keks[id]; is.State != was.State && !was.State.CanBecome(is.State) && !next.rolledBackTo(RotateKEK, id.Category, id.Version) &&
			!next.rolledBackTo(RotateMEK, "", is.Wrapped.MEKVersion) {
			return fmt.Errorf("kek %s: %s cannot become %s: %w", id, was.State, is.State, ErrKeyState)
		}
	}
	for v, was := range old.meks {
		if is := next.meks[v]; is.State != was.State && !was.State.CanBecome(is.State) && !next.rolledBackTo(RotateMEK, "", v) {
			return fmt.Errorf("mek %s: %s cannot become %s: %w", was.Label, was.State, is.State, ErrKeyState)
		}
	}
	return nil
}

// unsettled is a change whose end is not known or not yet written down.
type unsettled struct {
	next   *controlSet
	entry  audit.Entry
	failed error // what the store answered
	stored bool

	restricts bool
}

// pendingEntry is where the store keeps the audit entry of the newest change,
// so that a start can write it down if the last run did not get to it. The
// head's MAC covers its hash.
const pendingEntry = "audit-entry-of-head"

// settleTimeout bounds the end of a change, which the caller's deadline does
// not: what the store has taken is written down.
const settleTimeout = 10 * time.Second

// settle brings a change to its end: it finds out whether the store took it,
// writes it to the audit log, and publishes it. No other change may begin
// before, or the log would fall behind the store by more than the one entry
// that a start can mend. controlMu is held.
func (c *Custodian) settle(ctx context.Context) error {
	u := c.unsettled
	if u == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if u.failed != nil && !u.stored {
		h, err := c.readHead(ctx)
		if err != nil {
			return fmt.Errorf("control revision %d: the outcome of its update is unknown: %w", u.next.head.Revision, err)
		}
		if h != u.next.head {
			c.unsettled = nil // the store did nothing
			return nil
		}
	}
	u.stored = true
	if u.restricts {
		c.publish(u.next)
	}
	if _, err := c.record(ctx, u.entry); err != nil {
		return err
	}
	c.publish(u.next)
	c.unsettled = nil
	return nil
}

// settleNow ends a change whose audit entry could not be written before.
func (c *Custodian) settleNow(ctx context.Context) error {
	c.controlMu.Lock()
	defer c.controlMu.Unlock()
	return c.settle(ctx)
}

func (c *Custodian) headEntry(s *controlSet, e audit.Entry) audit.Entry {
	e.ControlRevision = s.head.Revision
	e.ControlDigest = slices.Clone(s.head.Digest[:])
	if e.Time.IsZero() {
		e.Time = c.now()
	}
	if e.Outcome == 0 {
		e.Outcome = audit.Allowed
	}
	return e
}

func (c *Custodian) readHead(ctx context.Context) (Head, error) {
	var h Head
	err := c.store.View(ctx, func(tx Tx) error {
		r, err := tx.Head()
		if err != nil {
			return err
		}
		h, err = decodeHead(r.Body)
		return err
	})
	return h, err
}

// sign sets the MAC of r under the newest record helper.
func (c *Custodian) sign(ctx context.Context, s *controlSet, r *ControlRecord) error {
	h, err := s.latestHelper(HelperRecord)
	if err != nil {
		return err
	}
	r.MACVersion = h.Version
	return c.keys.withHelper(ctx, s, HelperRecord, h.Version, func(k Key) error {
		r.MAC, err = k.CMAC(ctx, macInput(s.head.StoreID, *r))
		return err
	})
}

// verify checks the MAC of r.
func (c *Custodian) verify(ctx context.Context, s *controlSet, r ControlRecord) error {
	var mac [16]byte
	err := c.keys.withHelper(ctx, s, HelperRecord, r.MACVersion, func(k Key) error {
		var err error
		mac, err = k.CMAC(ctx, macInput(s.head.StoreID, r))
		return err
	})
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(mac[:], r.MAC[:]) != 1 {
		return corrupt(fmt.Sprintf("control record %q (kind %d)", r.Name, r.Kind), ErrRecordMAC)
	}
	return nil
}
