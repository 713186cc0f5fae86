package rpc

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// Ceremonies is what the CeremonyService needs of the domain.
type Ceremonies interface {
	ProposeCeremony(ctx context.Context, who custodian.Caller, plan []byte, requestID string, rehearse bool) (custodian.CeremonyInfo, custodian.Rehearsal, error)
	ApproveCeremony(context.Context, custodian.Caller, custodian.ApproveRequest) (custodian.CeremonyInfo, error)
	CancelCeremony(context.Context, custodian.Caller, custodian.ApproveRequest) (custodian.CeremonyInfo, error)
	ExecuteCeremony(ctx context.Context, who custodian.Caller, id, requestID string) (custodian.CeremonyInfo, error)
	Ceremonies(context.Context, custodian.Caller) ([]custodian.CeremonyInfo, error)
	Ceremony(ctx context.Context, who custodian.Caller, id string) (custodian.CeremonyInfo, error)
	Evidence(ctx context.Context, who custodian.Caller, id string) ([]byte, error)
	BlastRadius(ctx context.Context, who custodian.Caller, req custodian.BlastRequest, visit func(custodian.BlastRow) error) error
}

// ceremonyService is the CeremonyService.
type ceremonyService struct {
	v1.UnimplementedCeremonyServiceServer
	server *Server
}

func (s *ceremonyService) ProposeCeremony(ctx context.Context, req *v1.ProposeCeremonyRequest) (*v1.ProposeCeremonyResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	info, r, err := custody.ProposeCeremony(ctx, c.caller, req.GetPlan(), c.requestID, req.GetValidateOnly())
	if err != nil {
		return nil, err
	}
	resp := &v1.ProposeCeremonyResponse{Rehearsal: &v1.CeremonyRehearsal{Kind: string(r.Kind), PlanDigest: r.Digest[:], ApprovalsNeeded: r.Needed,
		Changes: r.Changes, ContentKeys: r.ContentKeys, Duration: durationpb.New(r.Duration)}}
	if !req.GetValidateOnly() {
		resp.Ceremony = encodeCeremony(info)
	}
	return resp, nil
}

func (s *ceremonyService) GetCeremony(ctx context.Context, req *v1.GetCeremonyRequest) (*v1.GetCeremonyResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	info, err := custody.Ceremony(ctx, callOf(ctx).caller, req.GetId())
	if err != nil {
		return nil, err
	}
	return &v1.GetCeremonyResponse{Ceremony: encodeCeremony(info)}, nil
}

func (s *ceremonyService) ListCeremonies(ctx context.Context, _ *v1.ListCeremoniesRequest) (*v1.ListCeremoniesResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	all, err := custody.Ceremonies(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	resp := &v1.ListCeremoniesResponse{}
	for _, info := range all {
		resp.Ceremonies = append(resp.Ceremonies, encodeCeremony(info))
	}
	return resp, nil
}

func (s *ceremonyService) ApproveCeremony(ctx context.Context, req *v1.ApproveCeremonyRequest) (*v1.ApproveCeremonyResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	signed, err := decodeSignature(ctx, req.GetId(), req.GetSignature())
	if err != nil {
		return nil, err
	}
	info, err := custody.ApproveCeremony(ctx, callOf(ctx).caller, signed)
	if err != nil {
		return nil, err
	}
	return &v1.ApproveCeremonyResponse{Ceremony: encodeCeremony(info)}, nil
}

func (s *ceremonyService) CancelCeremony(ctx context.Context, req *v1.CancelCeremonyRequest) (*v1.CancelCeremonyResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	signed, err := decodeSignature(ctx, req.GetId(), req.GetSignature())
	if err != nil {
		return nil, err
	}
	info, err := custody.CancelCeremony(ctx, callOf(ctx).caller, signed)
	if err != nil {
		return nil, err
	}
	return &v1.CancelCeremonyResponse{Ceremony: encodeCeremony(info)}, nil
}

func (s *ceremonyService) ExecuteCeremony(ctx context.Context, req *v1.ExecuteCeremonyRequest) (*v1.ExecuteCeremonyResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	info, err := custody.ExecuteCeremony(ctx, c.caller, req.GetId(), c.requestID)
	if err != nil {
		return nil, err
	}
	return &v1.ExecuteCeremonyResponse{Ceremony: encodeCeremony(info)}, nil
}

func (s *ceremonyService) GetEvidence(ctx context.Context, req *v1.GetEvidenceRequest) (*v1.GetEvidenceResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	b, err := custody.Evidence(ctx, callOf(ctx).caller, req.GetId())
	if err != nil {
		return nil, err
	}
	return &v1.GetEvidenceResponse{Evidence: b}, nil
}

func (s *ceremonyService) GetBlastRadius(req *v1.GetBlastRadiusRequest, stream grpc.ServerStreamingServer[v1.GetBlastRadiusResponse]) error {
	custody, err := s.server.custody()
	if err != nil {
		return err
	}
	ask := custodian.BlastRequest{Caller: req.GetCaller()}
	if v := req.GetKeyVersion(); v != "" {
		if ask.KEK, err = custodian.ParseKEKID(v); err != nil {
			return &custodian.InvalidError{Field: "key_version", Err: err}
		}
	}
	return custody.BlastRadius(stream.Context(), callOf(stream.Context()).caller, ask, func(r custodian.BlastRow) error {
		k := r.Key
		row := &v1.GetBlastRadiusResponse{Kid: k.KID[:], Category: string(k.Category), ContentId: k.ContentID, TrackType: string(k.TrackType), Scheme: string(k.Scheme),
			Generation: k.Generation, BirthKeyVersion: k.BirthKEK, KeyVersion: k.KEK.Version}
		for _, g := range r.Given {
			row.Handouts = append(row.Handouts, &v1.KeyHandout{Caller: g.Caller, FirstTime: timestamp(g.First), LastTime: timestamp(g.Last), Count: g.Count})
		}
		if err := stream.Send(row); err != nil {
			return &sendError{err}
		}
		return nil
	})
}

// decodeSignature reads what an officer has signed. A field that is not there,
// or of another size, stays zero: then it does not fit, and the domain says so.
func decodeSignature(ctx context.Context, id string, s *v1.OfficerSignature) (custodian.ApproveRequest, error) {
	ch := s.GetChallenge()
	req := custodian.ApproveRequest{RequestID: callOf(ctx).requestID, ID: id, Key: s.GetKey(), Signature: s.GetSignature()}
	req.Challenge.Revision = ch.GetControlRevision()
	for _, f := range []struct {
		name     string
		from, to []byte
	}{
		{"plan_digest", ch.GetPlanDigest(), req.Challenge.PlanDigest[:]}, {"store_id", ch.GetStoreId(), req.Challenge.StoreID[:]},
		{"nonce", ch.GetNonce(), req.Challenge.Nonce[:]}, {"log_key_sha256", ch.GetLogKeySha256(), req.Challenge.LogKey[:]},
	} {
		if len(f.from) != len(f.to) {
			return req, &custodian.InvalidError{Field: "signature.challenge." + f.name, Err: errSize}
		}
		copy(f.to, f.from)
	}
	if err := ch.GetExpireTime().CheckValid(); err != nil {
		return req, &custodian.InvalidError{Field: "signature.challenge.expire_time", Err: err}
	}
	req.Challenge.Expires = ch.GetExpireTime().AsTime()
	return req, nil
}

var errSize = errors.New("of another size than it must have")

var ceremonyStates = map[custodian.CeremonyState]v1.CeremonyState{
	custodian.CeremonyProposed:  v1.CeremonyState_CEREMONY_STATE_PROPOSED,
	custodian.CeremonyExecuted:  v1.CeremonyState_CEREMONY_STATE_EXECUTED,
	custodian.CeremonyDone:      v1.CeremonyState_CEREMONY_STATE_DONE,
	custodian.CeremonyCancelled: v1.CeremonyState_CEREMONY_STATE_CANCELLED,
	custodian.CeremonyExpired:   v1.CeremonyState_CEREMONY_STATE_EXPIRED,
	custodian.CeremonyFailed:    v1.CeremonyState_CEREMONY_STATE_FAILED,
}

func encodeCeremony(x custodian.CeremonyInfo) *v1.Ceremony {
	out := &v1.Ceremony{Id: x.ID, Kind: string(x.Kind), Reason: x.Reason, State: ceremonyStates[x.State], Plan: []byte(x.Plan),
		Challenge: &v1.CeremonyChallenge{PlanDigest: x.Digest[:], StoreId: x.StoreID[:], ControlRevision: x.Base, ExpireTime: timestamppb.New(x.Expires),
			Nonce: x.Nonce[:], LogKeySha256: x.LogKey[:]},
		ApprovalsNeeded: x.Needed, Approvals: encodeApprovals(x.Approvals), Cancellations: encodeApprovals(x.Cancels), Proposer: x.Proposer,
		ProposeTime: timestamp(x.ProposeTime), ReadyTime: timestamp(x.ReadyTime), Executor: x.Executor, ExecuteTime: timestamp(x.ExecTime), EndTime: timestamp(x.EndTime)}
	for _, p := range x.Progress {
		out.Progress = append(out.Progress, &v1.CeremonyProgress{Name: p.Name, Step: p.Step, Done: p.Done, Total: p.Total, Rate: p.Rate,
			Remaining: durationpb.New(p.Remaining), LastError: p.LastError})
	}
	return out
}

func encodeApprovals(all []custodian.Approval) []*v1.CeremonyApproval {
	out := make([]*v1.CeremonyApproval, len(all))
	for i, a := range all {
		out[i] = &v1.CeremonyApproval{Officer: a.Officer, Key: a.Key, Time: timestamp(a.Time)}
	}
	return out
}
