package rpc

import (
	"context"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

func (s *custodyService) SetProviders(ctx context.Context, req *v1.SetProvidersRequest) (*v1.SetProvidersResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	job, err := custody.SetProviders(ctx, c.caller, custodian.SetProvidersRequest{RequestID: c.requestID,
		Category: custodian.CategoryName(req.GetCategory()), HelperKeys: req.GetHelperKeys(), Providers: req.GetProviders(), Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.SetProvidersResponse{Rewrap: encodeRewrap(job)}, nil
}

func (s *custodyService) Reencrypt(ctx context.Context, req *v1.ReencryptRequest) (*v1.ReencryptResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	job, err := custody.Reencrypt(ctx, c.caller, custodian.ReencryptRequest{RequestID: c.requestID,
		Category: custodian.CategoryName(req.GetCategory()), HelperKeys: req.GetHelperKeys(), Providers: req.GetProviders(), Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.ReencryptResponse{Rewrap: encodeRewrap(job)}, nil
}

func (s *custodyService) ListRewraps(ctx context.Context, _ *v1.ListRewrapsRequest) (*v1.ListRewrapsResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	jobs, err := custody.Rewraps(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	resp := &v1.ListRewrapsResponse{}
	for _, j := range jobs {
		resp.Rewraps = append(resp.Rewraps, encodeRewrap(j))
	}
	return resp, nil
}

func encodeRewrap(j custodian.RewrapStatus) *v1.Rewrap {
	return &v1.Rewrap{Category: string(j.Category), Providers: j.Providers, Reencrypt: j.Reencrypt, BeginTime: timestamp(j.BeginTime),
		RequestedBy: j.By, Done: int32(j.Done), Total: int32(j.Total), LastError: j.LastError}
}
