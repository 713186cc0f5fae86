package client

import (
	"context"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

// SetProviders says which KMS instances hold the outer wraps of a category, or
// of the helper keys, and begins the job that moves them.
func (c *Client) SetProviders(ctx context.Context, req *v1.SetProvidersRequest) (*v1.Rewrap, error) {
	resp, err := c.custody.SetProviders(ctx, req)
	return resp.GetRewrap(), wrap(err)
}

// Reencrypt begins the job that makes outer wraps anew, after a KMS instance
// rotated its own key.
func (c *Client) Reencrypt(ctx context.Context, req *v1.ReencryptRequest) (*v1.Rewrap, error) {
	resp, err := c.custody.Reencrypt(ctx, req)
	return resp.GetRewrap(), wrap(err)
}

// ListRewraps returns the jobs that have not ended, the helper keys first.
func (c *Client) ListRewraps(ctx context.Context) ([]*v1.Rewrap, error) {
	resp, err := c.custody.ListRewraps(ctx, &v1.ListRewrapsRequest{})
	return resp.GetRewraps(), wrap(err)
}
