package client

import (
	"context"
	"errors"
	"io"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

// FollowAuditEntries calls fn with the entries of the audit log that the request
// picks, in their canonical encoding, and then with those that are written, for
// an auditor. It returns when ctx ends, when fn returns an error, or when the
// stream breaks: then it can be called again from behind the last entry.
func (c *Client) FollowAuditEntries(ctx context.Context, req *v1.FollowEntriesRequest, fn func(entry []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.audit.FollowEntries(ctx, req)
	if err != nil {
		return wrap(err)
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return wrap(err)
		}
		for _, entry := range resp.GetEntries() {
			if err := fn(entry); err != nil {
				return err
			}
		}
	}
}
