package custodian

// What the officers decide, as control records.

const (
	// ControlAuthority is the one Authority, ControlCeremony a Ceremony.
	ControlAuthority ControlKind = 9
	ControlCeremony  ControlKind = 10

	formAuthority = 11
	formCeremony  = 12

	// formConditions is the version of the form of an authority with conditions: it
	// has them at the end. Others stay as they were.
	formConditions = 2

	authorityName = "authority"
)

func authorityRecord(a Authority) ControlRecord {
	return ControlRecord{Kind: ControlAuthority, Name: authorityName, Body: encodeAuthority(a)}
}

func ceremonyRecord(x Ceremony) ControlRecord {
	return ControlRecord{Kind: ControlCeremony, Name: x.ID, Body: encodeCeremony(x)}
}

// A ceremonial is the part of a control set that the officers rule.
type ceremonial struct {
	authority  *Authority // nil: there are no officers, the configuration decides
	policy     *Policy    // of authority's grants
	ceremonies map[string]Ceremony
}

// decodeCeremonial takes one of the two records in, and returns the name that
// it must have.
func (s *ceremonial) decodeCeremonial(r ControlRecord) (want string, err error) {
	if r.Kind == ControlCeremony {
		x, err := decodeCeremony(r.Body)
		s.ceremonies[x.ID] = x
		return x.ID, err
	}
	a, err := decodeAuthority(r.Body)
	if err != nil {
		return "", err
	}
	s.authority = &a
	if s.policy, err = planPolicy(a.Grants, a.Officers); err != nil {
		return "", corrupt("grants of the authority record", err)
	}
	return authorityName, nil
}

func encodeAuthority(a Authority) []byte {
	e := newEncoder(formAuthority, 1024)
	e.officers(a.Officers)
	e.uint(uint64(len(a.Quorum)))
	for _, q := range a.Quorum {
		e.str(string(q.Kind))
		e.uint(uint64(q.M))
	}
	e.officers(a.Recovery)
	e.uint(uint64(a.RecoveryQuorum))
	e.grants(a.Grants)
	e.bool(a.Sealed)
	e.uint(a.Revision)
	if a.Conditions != [32]byte{} {
		e.b[1] = formConditions
		e.raw(a.Conditions[:])
	}
	return e.b
}

func decodeAuthority(b []byte) (Authority, error) {
	version := byte(formVersion)
	if len(b) > 1 && b[1] == formConditions {
		version = formConditions
	}
	d := newDecoderOf(formAuthority, version, b)
	a := Authority{Officers: d.officers()}
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		a.Quorum = append(a.Quorum, QuorumRule{PlanKind(d.str()), d.uint32()})
	}
	a.Recovery, a.RecoveryQuorum = d.officers(), d.uint32()
	a.Grants, a.Sealed, a.Revision = d.grants(), d.bool(), d.uint()
	if version == formConditions {
		if a.Conditions = d.array32(); a.Conditions == [32]byte{} {
			d.fail() // then it has the other version
		}
	}
	return a, d.done("authority record")
}

func (e *encoder) officers(all []Officer) {
	e.uint(uint64(len(all)))
	for _, o := range all {
		e.str(o.Name)
		e.str(o.Key)
	}
}

func (d *decoder) officers() (all []Officer) {
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		all = append(all, Officer{d.str(), d.str()})
	}
	return all
}

func (e *encoder) grants(all []PlanGrant) {
	e.uint(uint64(len(all)))
	for _, g := range all {
		e.str(g.Identity)
		e.str(g.Role)
		e.uint(uint64(len(g.Categories)))
		for _, c := range g.Categories {
			e.str(c)
		}
		e.bool(g.Reissue)
		e.str(g.SPKI)
	}
}

func (d *decoder) grants() (all []PlanGrant) {
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		g := PlanGrant{Identity: d.str(), Role: d.str()}
		for n := d.uint(); n > 0 && d.err == nil; n-- {
			g.Categories = append(g.Categories, d.str())
		}
		g.Reissue, g.SPKI = d.bool(), d.str()
		all = append(all, g)
	}
	return all
}

func encodeCeremony(x Ceremony) []byte {
	e := newEncoder(formCeremony, 2048+len(x.Plan))
	e.str(x.ID)
	e.str(x.Plan)
	e.uint(uint64(x.State))
	e.uint(x.Base)
	e.raw(x.Nonce[:])
	e.raw(x.LogKey[:])
	e.raw(x.Basis[:])
	e.str(x.Proposer)
	e.time(x.ProposeTime)
	e.uint(x.FirstEntry)
	e.uint(uint64(x.Needed))
	e.approvals(x.Approvals)
	e.approvals(x.Cancels)
	e.time(x.QuorumTime)
	e.str(x.Executor)
	e.time(x.ExecTime)
	e.time(x.EndTime)
	e.bytes(x.Before)
	e.bytes(x.After)
	e.uint(x.Revision)
	return e.b
}

func decodeCeremony(b []byte) (Ceremony, error) {
	d := newDecoder(formCeremony, b)
	x := Ceremony{ID: d.str(), Plan: d.str(), State: CeremonyState(d.uint8()), Base: d.uint(), Nonce: d.array32(), LogKey: d.array32(), Basis: d.array32(),
		Proposer: d.str(), ProposeTime: d.time(), FirstEntry: d.uint(), Needed: d.uint32(), Approvals: d.approvals(), Cancels: d.approvals(),
		QuorumTime: d.time(), Executor: d.str(), ExecTime: d.time(), EndTime: d.time(), Before: d.bytes(), After: d.bytes(), Revision: d.uint()}
	return x, d.done("ceremony record")
}

func (e *encoder) approvals(all []Approval) {
	e.uint(uint64(len(all)))
	for _, a := range all {
		e.str(a.Officer)
		e.str(a.Key)
		e.time(a.Time)
		e.bytes(a.Signature)
	}
}

func (d *decoder) approvals() (all []Approval) {
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		all = append(all, Approval{Officer: d.str(), Key: d.str(), Time: d.time(), Signature: d.bytes()})
	}
	return all
}
