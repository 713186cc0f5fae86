package client

import (
	"context"
	"errors"
	"io"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

// ProposeCeremony proposes a plan, or only says what it would do.
func (c *Client) ProposeCeremony(ctx context.Context, req *v1.ProposeCeremonyRequest) (*v1.ProposeCeremonyResponse, error) {
	return answer(c.ceremony.ProposeCeremony(ctx, req))
}

// GetCeremony returns one ceremony.
func (c *Client) GetCeremony(ctx context.Context, id string) (*v1.Ceremony, error) {
	resp, err := c.ceremony.GetCeremony(ctx, &v1.GetCeremonyRequest{Id: id})
	return resp.GetCeremony(), wrap(err)
}

// ListCeremonies returns all ceremonies, the newest first.
func (c *Client) ListCeremonies(ctx context.Context) ([]*v1.Ceremony, error) {
	resp, err := c.ceremony.ListCeremonies(ctx, &v1.ListCeremoniesRequest{})
	return resp.GetCeremonies(), wrap(err)
}

// ApproveCeremony adds an officer's approval to a ceremony.
func (c *Client) ApproveCeremony(ctx context.Context, req *v1.ApproveCeremonyRequest) (*v1.Ceremony, error) {
	resp, err := c.ceremony.ApproveCeremony(ctx, req)
	return resp.GetCeremony(), wrap(err)
}

// CancelCeremony adds an officer's wish to cancel a ceremony.
func (c *Client) CancelCeremony(ctx context.Context, req *v1.CancelCeremonyRequest) (*v1.Ceremony, error) {
	resp, err := c.ceremony.CancelCeremony(ctx, req)
	return resp.GetCeremony(), wrap(err)
}

// ExecuteCeremony does what an approved plan says.
func (c *Client) ExecuteCeremony(ctx context.Context, req *v1.ExecuteCeremonyRequest) (*v1.Ceremony, error) {
	resp, err := c.ceremony.ExecuteCeremony(ctx, req)
	return resp.GetCeremony(), wrap(err)
}

// GetEvidence returns the evidence of a ceremony that is done.
func (c *Client) GetEvidence(ctx context.Context, id string) ([]byte, error) {
	resp, err := c.ceremony.GetEvidence(ctx, &v1.GetEvidenceRequest{Id: id})
	return resp.GetEvidence(), wrap(err)
}

// GetBlastRadius calls visit for each content key that the loss of a key
// version, or of a caller, exposes. An error of visit ends it, and is no *Error.
func (c *Client) GetBlastRadius(ctx context.Context, req *v1.GetBlastRadiusRequest, visit func(*v1.GetBlastRadiusResponse) error) error {
	ctx, cancel := context.WithCancel(ctx) // an error of visit ends the stream
	defer cancel()
	stream, err := c.ceremony.GetBlastRadius(ctx, req)
	if err != nil {
		return wrap(err)
	}
	for {
		row, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return wrap(err)
		}
		if err := visit(row); err != nil {
			return err
		}
	}
}
