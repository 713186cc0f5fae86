package rpc

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

const healthWatch = healthv1.Health_Watch_FullMethodName

// watchInterval is how often a watched health is looked at.
const watchInterval = time.Second

// health is the gRPC health protocol: readiness, for the server as a whole and
// alike for each of its services.
type health struct {
	healthv1.UnimplementedHealthServer
	server *Server
}

func (h *health) Check(ctx context.Context, req *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	if !served(req.GetService()) {
		return nil, status.Errorf(codes.NotFound, "no service %.80q", req.GetService())
	}
	return &healthv1.HealthCheckResponse{Status: h.now(ctx)}, nil
}

func (h *health) Watch(req *healthv1.HealthCheckRequest, stream healthv1.Health_WatchServer) error {
	ctx := stream.Context()
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	last := healthv1.HealthCheckResponse_UNKNOWN
	for {
		now := healthv1.HealthCheckResponse_SERVICE_UNKNOWN
		if served(req.GetService()) {
			now = h.now(ctx)
		}
		if now != last {
			if err := stream.Send(&healthv1.HealthCheckResponse{Status: now}); err != nil {
				return err
			}
			last = now
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

func (h *health) now(ctx context.Context) healthv1.HealthCheckResponse_ServingStatus {
	if h.server.ready(ctx) != nil {
		return healthv1.HealthCheckResponse_NOT_SERVING
	}
	return healthv1.HealthCheckResponse_SERVING
}

func served(service string) bool {
	switch service {
	case "", v1.KeyRetrievalService_ServiceDesc.ServiceName, v1.KeyIssuanceService_ServiceDesc.ServiceName, v1.CustodyService_ServiceDesc.ServiceName:
		return true
	}
	return false
}
