package rpc

import (
	"context"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// revocationService is the RevocationService.
type revocationService struct {
	v1.UnimplementedRevocationServiceServer
	server *Server
}

func (s *revocationService) Revoke(ctx context.Context, req *v1.RevokeRequest) (*v1.RevokeResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	until, err := decodeTime(req.GetUntilTime(), "until_time")
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	r, err := custody.Revoke(ctx, c.caller, custodian.RevokeRequest{RequestID: c.requestID, SessionID: req.GetSessionId(), Issuer: req.GetIssuer(),
		Until: until, Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.RevokeResponse{Revocation: encodeRevocation(r)}, nil
}

func (s *revocationService) LiftRevocation(ctx context.Context, req *v1.LiftRevocationRequest) (*v1.LiftRevocationResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	err = custody.LiftRevocation(ctx, c.caller, custodian.LiftRequest{RequestID: c.requestID, Name: req.GetName(), SessionID: req.GetSessionId(), Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.LiftRevocationResponse{}, nil
}

func (s *revocationService) ListRevocations(ctx context.Context, _ *v1.ListRevocationsRequest) (*v1.ListRevocationsResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	list, err := custody.Revocations(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	resp := &v1.ListRevocationsResponse{}
	for _, r := range list {
		resp.Revocations = append(resp.Revocations, encodeRevocation(r))
	}
	return resp, nil
}

func encodeRevocation(r custodian.Revocation) *v1.Revocation {
	return &v1.Revocation{Name: r.Name(), Issuer: r.Issuer, UntilTime: timestamp(r.Until), Cause: r.Cause, Caller: r.By, CreateTime: timestamp(r.Time)}
}
