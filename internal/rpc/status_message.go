package rpc

import (
	"context"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// GetStatus answers in every state of the daemon: whoever is called out of bed
// because it does not serve wants to know why.
func (s *custodyService) GetStatus(ctx context.Context, _ *v1.GetStatusRequest) (*v1.GetStatusResponse, error) {
	c := callOf(ctx)
	custody, unavailable := s.server.custody()
	ask := s.server.config.EarlyStatus
	if unavailable == nil {
		ask = custody.Status
	}
	if ask == nil {
		return nil, unavailable
	}
	st, err := ask(ctx, c.caller)
	if err != nil {
		return nil, err
	}
	out := encodeStatus(st)
	out.Version = s.server.config.Version
	out.State = servingState(unavailable)
	return &v1.GetStatusResponse{Status: out}, nil
}

func servingState(unavailable error) v1.ServingState {
	switch {
	case unavailable == nil:
		return v1.ServingState_SERVING_STATE_SERVING
	case reasonOf(unavailable) == reasonOf(custodian.ErrUninitialised):
		return v1.ServingState_SERVING_STATE_UNINITIALISED
	case reasonOf(unavailable) == reasonOf(custodian.ErrSealed):
		return v1.ServingState_SERVING_STATE_SEALED
	}
	return v1.ServingState_SERVING_STATE_STARTING
}

func encodeStatus(s custodian.Status) *v1.Status {
	out := &v1.Status{
		Time: timestamp(s.Time), StartTime: timestamp(s.Started), Warnings: s.Warnings, Authority: s.Authority, Conditions: s.Conditions, SignedConditions: s.SignedConditions,
		StoreId: s.StoreID, ControlRevision: s.ControlRevision, Categories: int32(s.Categories),
		KeksLoaded: int32(s.KEKsLoaded), KekLoads: s.KEKLoads, CeksInClear: int32(s.CEKsInClear), UnknownKidIncidents: s.Incidents,
		Hsm:   encodeHSM(s.HSM),
		Store: &v1.StoreStatus{Engine: s.Store.Engine, Path: s.Store.Path, Schema: s.Store.Schema, SizeBytes: s.Store.Bytes, ContentKeys: s.Store.ContentKeys, Sequence: s.Store.Sequence},
		Audit: &v1.AuditStatus{Entries: s.Audit.Entries, Root: s.Audit.Root, Blocked: s.Audit.Blocked},
	}
	for _, a := range s.Audit.Anchors {
		out.Audit.Anchors = append(out.Audit.Anchors, &v1.AnchorStatus{Name: a.Name, Kind: a.Kind, Size: a.Size, ConfirmTime: timestamp(a.Time),
			LagEntries: a.Lag, Lag: durationpb.New(a.LagTime), LastError: a.LastError, Failures: a.Failures, AlertTime: timestamp(a.Alert)})
	}
	for _, m := range s.MEKs {
		out.Meks = append(out.Meks, &v1.MekStatus{Version: m.Version, Label: m.Label, State: states[m.State], Profile: string(m.Profile),
			CreateTime: timestamp(m.CreateTime), EndTime: timestamp(m.EndTime), DaysLeft: int32(m.DaysLeft)})
	}
	for _, o := range s.UnknownObjects {
		out.UnknownObjects = append(out.UnknownObjects, &v1.TokenObject{Class: o.Class, Label: o.Label, Id: o.ID})
	}
	for _, p := range s.Providers {
		out.Providers = append(out.Providers, encodeProvider(p))
	}
	for _, r := range s.Rotations {
		out.Rotations = append(out.Rotations, encodeRotation(r))
	}
	for _, j := range s.Rewraps {
		out.Rewraps = append(out.Rewraps, encodeRewrap(j))
	}
	return out
}

func encodeHSM(h custodian.HSMStatus) *v1.HsmStatus {
	return &v1.HsmStatus{Label: h.Label, Serial: h.Serial, Model: h.Model, Manufacturer: h.Manufacturer, Profile: h.Profile,
		Epoch: h.Epoch, DefaultMekProfile: string(h.DefaultMEK), EnforcesWrapWithTrusted: h.EnforcesTrusted,
		SessionsInUse: int32(h.SessionsInUse), SessionsMax: int32(h.SessionsMax), AbandonedCalls: int32(h.Abandoned)}
}

func encodeProvider(p custodian.ProviderStatus) *v1.ProviderStatus {
	out := &v1.ProviderStatus{Name: p.Name, Kind: p.Kind, KeyRef: p.KeyRef, OuterLayer: p.OuterLayer,
		Reachable: p.Reachable, LastContactTime: timestamp(p.LastContact), LastError: p.LastError, Calls: p.Calls, Failures: p.Failures,
		AwaySinceTime: timestamp(p.AwaySince), GraceLeft: durationpb.New(p.GraceLeft), Refused: p.Refused,
		IncidentTime: timestamp(p.Incident), Incidents: p.Incidents, LoginRefused: p.LoginRefused,
		NextRenewalTime: timestamp(p.NextRenewal), LoginEndTime: timestamp(p.LoginEnd), KeyVersions: int32(p.KeyVersions), SoleKeyVersions: int32(p.SoleKeyVersions)}
	for _, c := range p.CallsByReason {
		out.CallsByReason = append(out.CallsByReason, &v1.ProviderCalls{Reason: string(c.Reason), Result: string(c.Result), Count: c.Count})
	}
	return out
}
