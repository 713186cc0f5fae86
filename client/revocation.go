package client

import (
	"context"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

// Revoke revokes a session or an issuer of licence tokens.
func (c *Client) Revoke(ctx context.Context, req *v1.RevokeRequest) (*v1.Revocation, error) {
	resp, err := c.revoke.Revoke(ctx, req)
	return resp.GetRevocation(), wrap(err)
}

// LiftRevocation ends a revocation before its time.
func (c *Client) LiftRevocation(ctx context.Context, req *v1.LiftRevocationRequest) error {
	_, err := c.revoke.LiftRevocation(ctx, req)
	return wrap(err)
}

// ListRevocations returns what is revoked.
func (c *Client) ListRevocations(ctx context.Context) ([]*v1.Revocation, error) {
	resp, err := c.revoke.ListRevocations(ctx, &v1.ListRevocationsRequest{})
	return resp.GetRevocations(), wrap(err)
}
