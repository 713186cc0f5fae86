package custodian

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"github.com/keycustody/custodian/internal/audit"
)

// An InitSpec is what a first start decides for good.
type InitSpec struct {
	Profile MEKProfile // "": the token's default
	// AuditSigning is the algorithm of the audit log's checkpoints; ECDSA P-256
	// where empty. Not every token has Ed25519.
	AuditSigning SigningAlgorithm
	// Genesis names the officers. Without it, the configuration decides.
	Genesis *Genesis
}

// Init makes MEK v1, the helper and signing keys, and the first head, in a
// store that Create has just made, and writes the first entries of the audit
// log. It is safe to run again after a crash: the journal names the token
// objects before they exist, so a second run can clear them away and make
// them again.
//
// It refuses a store that has a head, and without a journal a token that
// holds objects under our prefix.
func Init(ctx context.Context, cfg Config, spec InitSpec) (err error) {
	c, err := newCustodian(ctx, cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	if cfg.Logged.Revision > 0 {
		return fmt.Errorf("the audit log is that of a custody at control revision %d; restore its store (custodiand restore), or begin a new log", cfg.Logged.Revision)
	}
	if g := spec.Genesis; g != nil {
		if err := g.verify(c.now()); err != nil {
			return fmt.Errorf("genesis plan: %w: %w", err, ErrApproval)
		}
		if a := (&Authority{Conditions: g.Plan.conditionsAfter([32]byte{})}); !a.accepts(cfg.Policy) {
			return refusePlan(ErrConditions, "the genesis plan has conditions %x, and the configuration %x (custodiand -check-config): it would never start", a.Conditions, cfg.Policy.Conditions())
		}
		spec.Profile = g.Plan.Genesis.MEKProfile
	}
	j, interrupted, err := c.journal(ctx, spec)
	if err != nil {
		return err
	}
	if err := c.endAttempts(ctx, cfg.Logged.Begun); err != nil {
		return err
	}
	e := audit.Entry{Action: actionInit, Outcome: audit.Allowed,
		Detail: fmt.Sprintf("mek %s id %x profile %s; audit signer %s id %x", j.MEKLabel, j.MEKID, j.Profile, j.SignLbl, j.SignID)}
	return c.administer(ctx, Decision{Allow: true}, e, nil, func(e audit.Entry) error {
		if interrupted {
			if err := c.clearLeftovers(ctx, j); err != nil {
				return err
			}
		}
		return c.init(ctx, j, spec, e)
	})
}

const actionInit = "init"

// init makes what the journal names, and the first head; e is its entry.
func (c *Custodian) init(ctx context.Context, j InitJournal, spec InitSpec, e audit.Entry) (err error) {
	m := MEK{Version: 1, Label: j.MEKLabel, ID: j.MEKID, Profile: j.Profile, State: StateActive, CreateTime: j.Start, EndTime: j.End,
		TokenSerial: c.hsm.Status().Serial, Revision: 1}
	if err := c.hsm.GenerateMEK(ctx, m); err != nil {
		return fmt.Errorf("mek %s: generate: %w", m.Label, err)
	}
	if m.Canary, err = c.hsm.NewMEKCanary(ctx, m); err != nil {
		return fmt.Errorf("mek %s: canary: %w", m.Label, err)
	}
	if err := c.hsm.CheckMEK(ctx, m); err != nil {
		return mekError(m, err)
	}
	signer, err := c.initSigner(ctx, j, spec.AuditSigning)
	if err != nil {
		return err
	}
	if spec.Genesis != nil && j.Profile != spec.Profile {
		return fmt.Errorf("an init was interrupted that began with a MEK of the profile %s, and the genesis plan says %s; begin with an empty data_dir", j.Profile, spec.Profile)
	}
	return c.firstHead(ctx, j, m, signer, spec.Genesis, e)
}

// journal returns the journal of an interrupted init, or writes a new one.
func (c *Custodian) journal(ctx context.Context, spec InitSpec) (j InitJournal, interrupted bool, err error) {
	err = c.store.View(ctx, func(tx Tx) error {
		if _, err := tx.Head(); !errors.Is(err, ErrNotFound) {
			if err == nil {
				err = errors.New("the store is initialised already; init makes a new custody and never touches an old one")
			}
			return err
		}
		// A head that is lost is no init that was interrupted: what a journal
		// names is destroyed below, and here it would be the MEK in use.
		if err := tx.Controls(func(r ControlRecord) error {
			return corrupt(fmt.Sprintf("control record %q", r.Name), errors.New("the store has no head to it; restore the store (custodiand restore)"))
		}); err != nil {
			return err
		}
		var err error
		j, err = tx.InitJournal()
		interrupted = err == nil
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		return err
	})
	if err != nil || interrupted {
		return j, interrupted, err
	}
	if err := RefuseForeign(ctx, c.hsm, c.prefix); err != nil {
		return j, false, err
	}
	if p := spec.Profile; p != "" && p != ProfileSealed && p != ProfileRotatable {
		// Once it is in the journal, it cannot be taken back.
		return j, false, fmt.Errorf("mek profile %q: must be %s or %s", p, ProfileSealed, ProfileRotatable)
	}
	if len(c.defaultWraps) == 0 {
		return j, false, errors.New("no default provider is configured; name one (local has no outer layer)")
	}
	now := c.now()
	j = InitJournal{MEKLabel: c.prefix + "-v1", SignLbl: c.prefix + "-audit-v1", Profile: spec.Profile, Start: now, End: now.Add(MEKPeriod)}
	if j.Profile == "" {
		j.Profile = c.hsm.Status().DefaultMEK
	}
	for _, id := range []*[16]byte{&j.StoreID, &j.MEKID, &j.SignID} {
		if err := c.hsm.Random(ctx, id[:]); err != nil {
			return j, false, err
		}
	}
	return j, false, c.store.Update(ctx, func(tx UpdateTx) error { return tx.PutInitJournal(j) })
}

// clearLeftovers removes what the interrupted init has made: there is no head,
// so nothing was ever kept under these objects, and a module that is killed in
// the middle leaves objects that are no whole keys.
func (c *Custodian) clearLeftovers(ctx context.Context, j InitJournal) error {
	n, err := c.hsm.DestroyLeftovers(ctx, []string{"", j.MEKLabel, j.SignLbl}, [][16]byte{j.MEKID, j.SignID})
	if err == nil && n > 0 {
		c.log.Warn("removed what an interrupted init had left in the token", "objects", n)
	}
	return err
}

// RefuseForeign refuses a token in which another custody of the prefix lives,
// and one with nameless objects: after a crash they could not be told from
// those that the module left.
func RefuseForeign(ctx context.Context, hsm HSM, prefix string) error {
	objects, err := hsm.Objects(ctx)
	if err != nil {
		return err
	}
	for _, o := range objects {
		if strings.HasPrefix(o.Label, prefix+"-") {
			return fmt.Errorf("the token holds %s %q (CKA_ID %x), but this store does not know it: a MEK without its store. Restore the store (custodiand restore), or choose another hsm.label_prefix", o.Class, o.Label, o.ID)
		}
		if o.Label == "" && len(o.ID) == 0 {
			return fmt.Errorf("the token holds a %s without label and ID; name it or remove it first", o.Class)
		}
	}
	return nil
}

func (c *Custodian) initSigner(ctx context.Context, j InitJournal, alg SigningAlgorithm) (Signer, error) {
	if alg == "" {
		alg = SignECDSAP256
	}
	g := Signer{Purpose: signerAudit, Version: 1, Label: j.SignLbl, ID: j.SignID, State: StateActive, CreateTime: j.Start, Revision: 1}
	if err := c.hsm.GenerateSigner(ctx, alg, g.Label, g.ID); err != nil {
		return g, fmt.Errorf("signing key %s: generate %s: %w", g.Label, alg, err)
	}
	s, err := c.hsm.Signer(ctx, g.Label, g.ID)
	if err != nil {
		return g, fmt.Errorf("signing key %s: %w", g.Label, err)
	}
	g.PublicKey, err = x509.MarshalPKIXPublicKey(s.Public())
	return g, err
}

// firstHead makes the helper keys and writes every first record, the head and
// the end of the journal in one transaction.
func (c *Custodian) firstHead(ctx context.Context, j InitJournal, m MEK, signer Signer, g *Genesis, e audit.Entry) error {
	set := newControlSet()
	set.head = Head{StoreID: j.StoreID, HighestNow: c.now()}
	records := []ControlRecord{mekRecord(m), signerRecord(signer)}
	for _, p := range HelperPurposes {
		w, err := c.keys.make(ctx, m, UseMAC, helperIdentity(j.StoreID, p, 1), c.defaultWraps)
		if err != nil {
			return fmt.Errorf("helper key %s: %w", p, err)
		}
		records = append(records, helperRecord(Helper{Purpose: p, Version: 1, State: StateActive, CreateTime: j.Start, Wrapped: w, Revision: 1}))
	}
	e.Detail = fmt.Sprintf("store %x mek %s id %x profile %s", j.StoreID, m.Label, m.ID, m.Profile)
	if g != nil {
		records = append(records, g.records(c.now(), signer.PublicKey)...)
		e.Detail += fmt.Sprintf("; genesis plan %x, %d officers", g.Plan.Digest(), len(g.Plan.Officers))
	}
	for _, r := range records { // decoded first: signing needs the record helper
		if err := set.decode(r); err != nil {
			return err
		}
	}
	for i := range records {
		if err := c.sign(ctx, set, &records[i]); err != nil {
			return err
		}
		if err := set.put(records[i]); err != nil {
			return err
		}
	}
	set.head.Revision, set.head.Digest = 1, set.digest()
	e = c.headEntry(set, e)
	pending, err := e.MarshalBinary()
	if err != nil {
		return err
	}
	set.head.Pending = sha256.Sum256(pending)
	head := ControlRecord{Name: "head", Body: encodeHead(set.head)}
	if err := c.sign(ctx, set, &head); err != nil {
		return err
	}
	c.unsettled = &unsettled{entry: e} // from here on, a start writes the end where this does not
	err = c.store.Update(ctx, func(tx UpdateTx) error {
		for _, r := range records {
			if err := tx.PutControl(r); err != nil {
				return err
			}
		}
		if err := tx.PutCursor(pendingEntry, pending); err != nil {
			return err
		}
		if err := tx.PutHead(head); err != nil {
			return err
		}
		return tx.DeleteInitJournal()
	})
	if err != nil {
		return err
	}
	if err := c.signLog(ctx, set); err != nil {
		return err
	}
	c.publish(set)
	_, err = c.record(ctx, e)
	return err
}
