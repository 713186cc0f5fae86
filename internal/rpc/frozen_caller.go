package rpc

import (
	"context"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

func (s *custodyService) FreezeCaller(ctx context.Context, req *v1.FreezeCallerRequest) (*v1.FreezeCallerResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	f, err := custody.FreezeCaller(ctx, c.caller, custodian.FreezeCallerRequest{RequestID: c.requestID, Identity: req.GetIdentity(), Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.FreezeCallerResponse{Caller: encodeFrozenCaller(f)}, nil
}

func (s *custodyService) LiftCaller(ctx context.Context, req *v1.LiftCallerRequest) (*v1.LiftCallerResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	f, err := custody.LiftCaller(ctx, c.caller, custodian.FreezeCallerRequest{RequestID: c.requestID, Identity: req.GetIdentity(), Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.LiftCallerResponse{Caller: encodeFrozenCaller(f)}, nil
}

func (s *custodyService) ListFrozenCallers(ctx context.Context, _ *v1.ListFrozenCallersRequest) (*v1.ListFrozenCallersResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	all, err := custody.FrozenCallers(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	resp := &v1.ListFrozenCallersResponse{}
	for _, f := range all {
		resp.Callers = append(resp.Callers, encodeFrozenCaller(f))
	}
	return resp, nil
}

func encodeFrozenCaller(f custodian.FrozenCaller) *v1.FrozenCaller {
	return &v1.FrozenCaller{Identity: f.Identity, By: f.By, Cause: f.Cause, Time: timestamp(f.Time)}
}
