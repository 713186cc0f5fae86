package rpc

import (
	"context"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// rotationService is the RotationService.
type rotationService struct {
	v1.UnimplementedRotationServiceServer
	server *Server
}

var kinds = map[v1.RotationKind]custodian.RotationKind{
	v1.RotationKind_ROTATION_KIND_KEK: custodian.RotateKEK,
	v1.RotationKind_ROTATION_KIND_MEK: custodian.RotateMEK,
}

func (s *rotationService) StartRotation(ctx context.Context, req *v1.StartRotationRequest) (*v1.StartRotationResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	hold, err := decodeDuration(req.GetHold(), "hold")
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	r, err := custody.StartRotation(ctx, c.caller, custodian.RotationOrder{RequestID: c.requestID, Kind: kinds[req.GetKind()],
		Category: custodian.CategoryName(req.GetCategory()), Compromised: req.GetCompromisedVersions(), Serve: req.GetServeCompromised(),
		Hold: hold, Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.StartRotationResponse{Rotation: encodeRotation(r.Status())}, nil
}

func (s *rotationService) ListRotations(ctx context.Context, _ *v1.ListRotationsRequest) (*v1.ListRotationsResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	list, err := custody.Rotations(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	resp := &v1.ListRotationsResponse{}
	for _, r := range list {
		resp.Rotations = append(resp.Rotations, encodeRotation(r))
	}
	return resp, nil
}

func (s *rotationService) RollBackRotation(ctx context.Context, req *v1.RollBackRotationRequest) (*v1.RollBackRotationResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	r, err := custody.RollBackRotation(ctx, c.caller, c.requestID, req.GetName())
	if err != nil {
		return nil, err
	}
	return &v1.RollBackRotationResponse{Rotation: encodeRotation(r.Status())}, nil
}

func (s *rotationService) RetireRotation(ctx context.Context, req *v1.RetireRotationRequest) (*v1.RetireRotationResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	r, err := custody.RetireRotation(ctx, c.caller, c.requestID, req.GetName())
	if err != nil {
		return nil, err
	}
	return &v1.RetireRotationResponse{Rotation: encodeRotation(r.Status())}, nil
}

var eventKinds = map[v1.EventKind]custodian.EventKind{
	v1.EventKind_EVENT_KIND_NEW_BATCH:       custodian.EventNewBatch,
	v1.EventKind_EVENT_KIND_PACKAGED:        custodian.EventPackaged,
	v1.EventKind_EVENT_KIND_SESSION_REVOKED: custodian.EventSessionRevoked,
}

func (s *rotationService) ReportEvent(ctx context.Context, req *v1.ReportEventRequest) (*v1.ReportEventResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	res, err := custody.ReportEvent(ctx, callOf(ctx).caller, custodian.Event{ID: req.GetEventId(), Kind: eventKinds[req.GetKind()],
		Category: custodian.CategoryName(req.GetCategory()), ContentID: req.GetContentId(), SessionID: req.GetSessionId()})
	if err != nil {
		return nil, err
	}
	return &v1.ReportEventResponse{KeyVersion: res.KEK.Version, Rotated: res.Rotated, Reason: res.Reason, MarkedKeys: uint32(res.Marked)}, nil
}

func encodeRotation(r custodian.RotationStatus) *v1.Rotation {
	out := &v1.Rotation{Name: r.Name, Kind: v1.RotationKind_ROTATION_KIND_KEK, Category: string(r.Category), FromVersions: r.From, ToVersion: r.To,
		CompromisedVersions: r.Compromised, ServeCompromised: r.Serve, Step: v1.RotationStep(r.Step), Cause: r.Cause,
		StartTime: timestamp(r.StartTime), StepTime: timestamp(r.StepTime), HoldUntilTime: timestamp(r.HoldUntil),
		DoneRecords: r.Done, TotalRecords: r.Total, RecordRate: r.Rate, LastError: r.LastError}
	if r.Kind == custodian.RotateMEK {
		out.Kind = v1.RotationKind_ROTATION_KIND_MEK
	}
	if r.Remaining > 0 {
		out.Remaining = durationpb.New(r.Remaining)
	}
	return out
}
