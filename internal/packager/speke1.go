package packager

import (
	"context"
	"net/http"
	"slices"

	"github.com/keycustody/custodian/custodian"
)

// SPEKE 1.0 is a profile of CPIX 2.0 with elements of its own for what CPIX did
// not have yet. Its requests name no version. A content ID has one key, or one
// for each key period, which is for all tracks.
const nsSPEKE = "urn:aws:amazon:com:speke"

const (
	textNoID           = "Missing CPIX@id"
	textNoPeriodFilter = "Missing ContentKeyUsageRule/KeyPeriodFilter: the document has key periods"
)

// checkSPEKE1 is checkSPEKE for version 1.0. It names the content as CPIX does
// since 2.1.
func (d *CPIX) checkSPEKE1(string) error {
	id, hasID := d.root.attr("id")
	switch {
	case d.Version != "" && d.Version != "2.0":
		return unprocessable("%s", textSPEKEVersion) // the document is of SPEKE 2, and the header is not there
	case !hasID:
		return unprocessable("%s", textNoID)
	case d.ContentID != "" && d.ContentID != id:
		return unprocessable("CPIX@contentId is of SPEKE 2: CPIX@id names the content, and they differ")
	case len(d.Keys) == 0:
		return unprocessable("%s", textNoKey)
	case len(d.Keys) > 1:
		return unprocessable("ContentKeyList: %d keys: SPEKE 1.0 has one for each content ID and key period", len(d.Keys))
	case len(d.Systems) == 0:
		return unprocessable("%s", textNoSystem)
	}
	d.ContentID = id
	if err := d.Keys[0].checkSPEKE(); err != nil {
		return err
	}
	for _, r := range d.Rules {
		if len(d.Periods) > 0 && len(r.Periods) == 0 {
			return unprocessable("%s", textNoPeriodFilter)
		}
	}
	if len(d.Periods) > 0 && len(d.Rules) == 0 {
		return unprocessable("%s", textNoPeriodFilter)
	}
	return d.checkSystems("HLSSignalingData", "SmoothStreamingProtectionHeaderData", "HDSSignalingData")
}

// specs1 is specs for version 1.0. Of the usage rules only the key period counts.
func (d *CPIX) specs1() ([]custodian.KeySpec, error) {
	scheme, err := d.scheme()
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, r := range d.Rules {
		ids = append(ids, r.Periods...)
	}
	slices.Sort(ids)
	spec := custodian.KeySpec{TrackType: trackTypeAll, Scheme: scheme, KID: d.Keys[0].KID}
	switch ids = slices.Compact(ids); len(ids) {
	case 0:
	case 1:
		if spec.Period = d.Periods[d.periods[ids[0]]].Period; !spec.Period.Set {
			return nil, unprocessable("Missing ContentKeyPeriod@index")
		}
	default:
		return nil, unprocessable("KID %s is for %d key periods: a key is for one", spec.KID, len(ids))
	}
	return []custodian.KeySpec{spec}, nil
}

// scheme1 is the scheme that SPEKE 1.0 does not name: FairPlay plays only cbcs,
// and what plays without it was cenc then.
func (d *CPIX) scheme1() custodian.Scheme {
	if slices.ContainsFunc(d.Systems, func(s CPIXSystem) bool { return s.SystemID == FairPlay }) {
		return custodian.SchemeCBCS
	}
	return custodian.SchemeCENC
}

// heartbeat answers encryptors of SPEKE 1.0, which ask now and then whether
// there is somebody.
func (s *Server) heartbeat(_ context.Context, c *call) (reply, error) {
	if err := c.Available(); err != nil {
		return reply{}, &spekeRefusal{"", err}
	}
	return reply{status: http.StatusOK, contentType: "text/plain; charset=utf-8", header: spekeHeaders(""), body: []byte("the key provider is there")}, nil
}
