package client

import (
	"context"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

// StartRotation replaces a key by a new version, in the background.
func (c *Client) StartRotation(ctx context.Context, req *v1.StartRotationRequest) (*v1.Rotation, error) {
	resp, err := c.rotation.StartRotation(ctx, req)
	return resp.GetRotation(), wrap(err)
}

// ListRotations returns the rotations that the caller may see, oldest first.
func (c *Client) ListRotations(ctx context.Context) ([]*v1.Rotation, error) {
	resp, err := c.rotation.ListRotations(ctx, &v1.ListRotationsRequest{})
	return resp.GetRotations(), wrap(err)
}

// RollBackRotation has the predecessor protect again.
func (c *Client) RollBackRotation(ctx context.Context, req *v1.RollBackRotationRequest) (*v1.Rotation, error) {
	resp, err := c.rotation.RollBackRotation(ctx, req)
	return resp.GetRotation(), wrap(err)
}

// RetireRotation ends the hold of a rotation.
func (c *Client) RetireRotation(ctx context.Context, req *v1.RetireRotationRequest) (*v1.Rotation, error) {
	resp, err := c.rotation.RetireRotation(ctx, req)
	return resp.GetRotation(), wrap(err)
}

// ReportEvent tells the daemon of an event that may call for a new key version.
func (c *Client) ReportEvent(ctx context.Context, req *v1.ReportEventRequest) (*v1.ReportEventResponse, error) {
	return answer(c.rotation.ReportEvent(ctx, req))
}
