package custodian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keycustody/custodian/internal/audit"
)

// A Rekey is the generation of a content item whose keys were renewed. Nothing
// is made in advance: whoever asks for the item's keys next gets new ones, of
// this generation, with new KIDs. The keys of older generations are DEACTIVATED:
// they go on being released, until they are withdrawn. It is a control record.
type Rekey struct {
	Category   CategoryName
	ContentID  ContentID
	Generation uint32 // from 2
	Withdrawn  uint32 // keys of generations below it are not released any more
	Ceremony   string // that raised the generation last
	By         string // the ceremony that withdrew last
	Time       time.Time
	Revision   uint64
}

const (
	// ControlRekey is a Rekey. It is named by the hash of category and content ID.
	ControlRekey ControlKind = 14

	formRekey = 16
)

// A contentItem is the category and the ID of a content item.
type contentItem struct {
	category CategoryName
	id       string
}

func (i contentItem) String() string { return fmt.Sprintf("%q in category %s", i.id, i.category) }

func (i contentItem) recordName() string {
	sum := sha256.Sum256(append(append([]byte(i.category), 0), i.id...))
	return hex.EncodeToString(sum[:])
}

func (r Rekey) item() contentItem { return contentItem{r.Category, string(r.ContentID)} }

func rekeyRecord(r Rekey) ControlRecord {
	return ControlRecord{Kind: ControlRekey, Name: r.item().recordName(), Body: encodeRekey(r)}
}

func encodeRekey(r Rekey) []byte {
	e := newEncoder(formRekey, 160+len(r.ContentID))
	e.str(string(r.Category))
	e.bytes(r.ContentID)
	e.uint(uint64(r.Generation))
	e.uint(uint64(r.Withdrawn))
	e.str(r.Ceremony)
	e.str(r.By)
	e.time(r.Time)
	e.uint(r.Revision)
	return e.b
}

func decodeRekey(b []byte) (Rekey, error) {
	d := newDecoder(formRekey, b)
	r := Rekey{Category: CategoryName(d.str()), ContentID: d.bytes(), Generation: d.uint32(), Withdrawn: d.uint32(), Ceremony: d.str(), By: d.str(),
		Time: d.time(), Revision: d.uint()}
	return r, d.done("re-key record")
}

// generation is that of the keys that a content item gets from now on.
func (s *controlSet) generation(name CategoryName, id ContentID) uint32 {
	if len(s.rekeys) == 0 {
		return 1
	}
	return max(1, s.rekeys[contentItem{name, string(id)}].Generation)
}

// generationIn is generation in the store's own state.
func generationIn(tx Tx, name CategoryName, id ContentID) (uint32, error) {
	r, err := tx.Control(ControlRekey, contentItem{name, string(id)}.recordName())
	if errors.Is(err, ErrNotFound) {
		return 1, nil
	}
	if err != nil {
		return 0, fmt.Errorf("generation of %s: %w", contentItem{name, string(id)}, err)
	}
	x, err := decodeRekey(r.Body)
	return max(1, x.Generation), err
}

// superseded is the state of a content key whose content was re-keyed after it;
// ok is false for every other key.
func (s *controlSet) superseded(k *ContentKey) (state State, ok bool) {
	if len(s.rekeys) == 0 {
		return 0, false
	}
	switch r := s.rekeys[contentItem{k.Category, string(k.ContentID)}]; {
	case k.Generation < r.Withdrawn:
		return StateSuspended, true
	case k.Generation < r.Generation:
		return StateDeactivated, true
	}
	return 0, false
}

// A PlanContent is a content item as a plan has it: its ID as text or, where it
// is none, in hexadecimal.
type PlanContent struct {
	Category CategoryName `yaml:"category" json:"category"`
	ID       string       `yaml:"id,omitempty" json:"id,omitempty"`
	Hex      string       `yaml:"hex,omitempty" json:"hex,omitempty"`
}

func (p PlanContent) item() (contentItem, error) {
	if (p.ID == "") == (p.Hex == "") {
		return contentItem{}, errors.New("name it by id, as text, or by hex")
	}
	id := []byte(p.ID)
	if p.Hex != "" {
		var err error
		if id, err = hex.DecodeString(p.Hex); err != nil || strings.ToLower(p.Hex) != p.Hex {
			return contentItem{}, fmt.Errorf("hex: %.80q: must be digits 0-9 a-f, two a byte", p.Hex)
		}
	}
	return contentItem{p.Category, string(id)}, errors.Join(p.Category.Check(), ContentID(id).Check())
}

// checkContent says what is wrong with the content that a plan names.
func (p *Plan) checkContent() (faults []error) {
	seen := map[contentItem]bool{}
	for i, c := range p.Content {
		item, err := c.item()
		if err == nil && seen[item] {
			err = fmt.Errorf("%s is named twice", item)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("content[%d]: %w", i, err))
		}
		seen[item] = true
	}
	if p.Kind == KindRekey || p.Kind == KindWithdraw {
		named := 0
		for _, there := range []bool{len(p.Content) > 0, len(p.KeyVersions) > 0, len(p.Callers) > 0} {
			if there {
				named++
			}
		}
		if named != 1 {
			faults = append(faults, fmt.Errorf("content: a plan of kind %s has it, or key_versions, or callers: one of the three", p.Kind))
		}
	}
	return faults
}

// concerns says whether a plan of kind rekey or withdraw has something to do
// about a content key as things are.
func (s *controlSet) concerns(p *Plan, k *ContentKey) bool {
	r := s.rekeys[contentItem{k.Category, string(k.ContentID)}]
	if p.Kind == KindWithdraw {
		return r.Withdrawn <= k.Generation && k.Generation < r.Generation
	}
	return k.Generation >= r.Generation
}

// contentOf lists the content items that a plan is about: those that it names,
// or the blast radius of the key versions or callers that it names, as far as
// there is something left to do.
func (c *Custodian) contentOf(ctx context.Context, set *controlSet, p *Plan) ([]contentItem, error) {
	found := map[contentItem]bool{}
	note := func(k *ContentKey) {
		if i := (contentItem{k.Category, string(k.ContentID)}); !found[i] && set.concerns(p, k) {
			found[i] = true
		}
	}
	for _, named := range p.Content {
		item, _ := named.item() // checked by ParsePlan
		if err := c.eachOf(ctx, item, note); err != nil {
			return nil, err
		}
	}
	var versions []uint32
	var name CategoryName
	for _, text := range p.KeyVersions {
		id, _ := ParseKEKID(text) // checked by ParsePlan
		name, versions = id.Category, append(versions, id.Version)
	}
	if len(versions) > 0 {
		if err := c.eachKey(ctx, name, func(page []SealedKey) error {
			for i := range page {
				if k := &page[i].Key; slices.ContainsFunc(versions, func(v uint32) bool { return k.BirthKEK <= v && v <= k.KEK.Version }) {
					note(k)
				}
			}
			return ctx.Err()
		}); err != nil {
			return nil, err
		}
	}
	for _, identity := range p.Callers {
		given, err := c.handedOut(ctx, BlastRequest{Caller: identity})
		if err != nil {
			return nil, err
		}
		for kid := range given {
			if k, ok, err := c.storedKey(ctx, kid); err != nil {
				return nil, err
			} else if ok {
				note(&k)
			}
		}
	}
	items := make([]contentItem, 0, len(found))
	for i := range found {
		items = append(items, i)
	}
	slices.SortFunc(items, func(a, b contentItem) int {
		if n := strings.Compare(string(a.category), string(b.category)); n != 0 {
			return n
		}
		return strings.Compare(a.id, b.id)
	})
	return items, nil
}

// storedKey is the metadata of a content key; one that a restore has lost is
// not there.
func (c *Custodian) storedKey(ctx context.Context, kid KID) (k ContentKey, ok bool, err error) {
	err = c.store.View(ctx, func(tx Tx) error {
		s, err := tx.ContentKey(kid)
		k = s.Key
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return k, false, nil
	}
	return k, err == nil, err
}

// eachOf calls f with every key of a content item.
func (c *Custodian) eachOf(ctx context.Context, item contentItem, f func(*ContentKey)) error {
	return c.store.View(ctx, func(tx Tx) error {
		return tx.ContentKeys(item.category, ContentID(item.id), nil, maxItemKeys, func(k SealedKey) error {
			f(&k.Key)
			return nil
		})
	})
}

func checkRekey(ctx context.Context, c *Custodian, set *controlSet, p *Plan, r *Rehearsal) error {
	if err := set.checkExposers(p); err != nil {
		return err
	}
	items, err := c.contentOf(ctx, set, p)
	if err != nil {
		return err
	}
	if err := set.nothingMissed(p, items); err != nil {
		return err
	}
	if len(items) == 0 {
		return refusePlan(ErrPlan, "there is no content to %s", p.Kind)
	}
	var keys, unpacked uint64 // keys that it is about, and items that have no newer ones yet
	for _, item := range items {
		newer := false
		if err := c.eachOf(ctx, item, func(k *ContentKey) {
			if set.concerns(p, k) {
				keys++
			}
			newer = newer || k.Generation >= set.generation(k.Category, k.ContentID)
		}); err != nil {
			return err
		}
		if !newer {
			unpacked++
		}
	}
	if p.Kind == KindRekey {
		r.Changes = append(r.Changes, fmt.Sprintf("content items that are re-keyed: %d; whoever packages them next gets new keys, with new KIDs", len(items)),
			fmt.Sprintf("content keys that are superseded: %d; they go on being released until they are withdrawn", keys))
		return nil
	}
	r.Changes = append(r.Changes, fmt.Sprintf("content keys that are withdrawn: %d, of %d content items; they are released to nobody any more", keys, len(items)))
	if unpacked > 0 {
		r.Changes = append(r.Changes, fmt.Sprintf("content items for which nobody has asked for new keys yet: %d; they will not play at all", unpacked))
	}
	return nil
}

// checkExposers says what stands against the key versions and callers of a plan
// of kind rekey or withdraw.
func (s *controlSet) checkExposers(p *Plan) error {
	for _, text := range p.KeyVersions {
		id, _ := ParseKEKID(text) // checked by ParsePlan
		switch k, ok := s.keks[id]; {
		case !ok:
			return refusePlan(ErrPlan, "there is no key version %s", id)
		case k.State == StateActive:
			return refusePlan(ErrPlan, "key version %s protects, and would wrap the new keys, too: rotate it first", id)
		}
	}
	return nil
}

// nothingMissed refuses a plan that names content there is nothing to do about:
// the officers would take it for done.
func (s *controlSet) nothingMissed(p *Plan, items []contentItem) error {
	for _, named := range p.Content {
		item, _ := named.item() // checked by ParsePlan
		switch r := s.rekeys[item]; {
		case slices.Contains(items, item):
		case p.Kind == KindWithdraw && r.Generation == 0:
			return refusePlan(ErrPlan, "content %s was not re-keyed: there are no older keys to withdraw", item)
		case p.Kind == KindWithdraw:
			return refusePlan(ErrPlan, "content %s has no keys that are superseded and not withdrawn", item)
		case r.Generation > 0:
			return refusePlan(ErrPlan, "content %s is re-keyed to generation %d, and nobody has asked for its keys since", item, r.Generation)
		default:
			return refusePlan(ErrPlan, "there is no content %s", item)
		}
	}
	return nil
}

const (
	// rekeyBatch is how many content items one change of the control set takes.
	rekeyBatch = 64
	// workSlice is about how long a ceremony works before others have their turn.
	workSlice = time.Second
)

// rekeyContent raises, or withdraws below, the generations of what the plan is
// about, a slice at a time.
func rekeyContent(ctx context.Context, c *Custodian, x Ceremony, p *Plan) (bool, error) {
	work := about(x.ID)
	items, ok := c.workLists[x.ID]
	if !ok {
		var err error
		if items, err = c.contentOf(ctx, c.set.Load(), p); err != nil {
			return false, err
		}
		c.rotations.begin(work, 0, 0, uint64(len(items)))
	}
	for began := time.Now(); len(items) > 0; {
		if time.Since(began) > workSlice {
			c.workLists[x.ID] = items
			c.rotations.wakeUp()
			return false, nil
		}
		batch := items[:min(len(items), rekeyBatch)]
		if err := c.rekeyItems(ctx, x, p, batch); err != nil {
			return false, err
		}
		c.rotations.add(work, len(batch))
		items = items[len(batch):]
	}
	delete(c.workLists, x.ID)
	c.rotations.note(work, nil)
	return true, nil
}

// rekeyItems writes down what becomes of each content item, and then does it in
// one change. What this ceremony has done already, before a crash, it leaves.
func (c *Custodian) rekeyItems(ctx context.Context, x Ceremony, p *Plan, items []contentItem) error {
	set := c.set.Load()
	var entries []audit.Entry
	var todo []contentItem
	for _, item := range items {
		r, left := set.rekeys[item].next(p.Kind, item, x.ID, c.now())
		if !left {
			continue
		}
		todo = append(todo, item)
		entries = append(entries, audit.Entry{Action: "content." + string(p.Kind), Outcome: audit.Allowed, Caller: x.Executor, RequestID: about(x.ID), Category: string(item.category),
			ContentID: []byte(item.id), Generation: r.Generation, ControlRevision: set.head.Revision})
	}
	if len(todo) == 0 {
		return nil
	}
	if _, err := c.record(ctx, entries...); err != nil {
		return err
	}
	return c.change(ctx, func(old *controlSet, now time.Time) (change, error) {
		ch := change{restricts: p.Kind == KindWithdraw, entry: audit.Entry{Action: "content." + string(p.Kind) + ".done", Caller: x.Executor, RequestID: about(x.ID),
			Detail: fmt.Sprintf("%d content items", len(todo))}}
		for _, item := range todo {
			if r, left := old.rekeys[item].next(p.Kind, item, x.ID, now); left {
				ch.put = append(ch.put, rekeyRecord(r))
			}
		}
		return ch, nil
	})
}

// next is what a ceremony makes of the record of a content item; left is false
// where it has done so already.
func (r Rekey) next(k PlanKind, item contentItem, ceremony string, now time.Time) (next Rekey, left bool) {
	done := r.Ceremony
	if k == KindWithdraw {
		done = r.By
	}
	if done == ceremony {
		return r, false
	}
	r.Category, r.ContentID, r.Revision = item.category, ContentID(item.id), r.Revision+1
	if k == KindWithdraw {
		r.Withdrawn, r.By = r.Generation, ceremony
	} else {
		r.Generation, r.Ceremony, r.Time = max(1, r.Generation)+1, ceremony, now
	}
	return r, true
}

// rekeyed counts the content items that a ceremony has raised, or withdrawn.
func (s *controlSet) rekeyed(id string) (raised, withdrawn uint64) {
	for _, r := range s.rekeys {
		if r.Ceremony == id {
			raised++
		}
		if r.By == id {
			withdrawn++
		}
	}
	return raised, withdrawn
}
