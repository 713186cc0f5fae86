package rpc

import (
	"context"
	"fmt"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/secret"
)

// An Exporter knows the recipients that the configuration pins for exports,
// and encrypts to them.
type Exporter interface {
	// Recipient is the SHA-256 of the certificate of the recipient with that
	// name; false where keys of the category may not be exported to it.
	Recipient(name string, category custodian.CategoryName) (certificate string, ok bool)
	// Document encrypts the keys of one content item to the recipient with that
	// name and certificate.
	Document(name, certificate string, keys []custodian.ExportedKey) ([]byte, error)
}

// transfer is the KeyTransferService.
type transfer struct {
	v1.UnimplementedKeyTransferServiceServer
	server *Server
}

func (s *transfer) ImportContentKeys(ctx context.Context, req *v1.ImportContentKeysRequest) (*v1.ImportContentKeysResponse, error) {
	defer func() {
		for _, k := range req.GetKeys() {
			clear(k.GetKey())
		}
	}()
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	keys, err := decodeImports(req.GetKeys(), custody.Arena())
	defer func() {
		for i := range keys {
			keys[i].Key.Destroy()
		}
	}()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	stored, err := custody.Import(ctx, c.caller, custodian.ImportRequest{RequestID: c.requestID,
		Category: custodian.CategoryName(req.GetCategory()), ContentID: req.GetContentId(), Keys: keys, Ceremony: req.GetCeremony()})
	if err != nil {
		return nil, err
	}
	resp := &v1.ImportContentKeysResponse{RequestId: c.requestID}
	for _, k := range stored {
		resp.Results = append(resp.Results, &v1.ImportContentKeysResult{Kid: k.KID[:], Created: k.Created,
			Receipt: &v1.Receipt{Index: k.Receipt.Index, LeafHash: k.Receipt.LeafHash[:], Checkpoint: k.Receipt.Checkpoint}})
	}
	return resp, nil
}

// decodeImports moves the keys into the arena, and wipes them in the message.
// The keys are there even with an error.
func decodeImports(in []*v1.ImportedContentKey, arena *secret.Arena) ([]custodian.ImportKey, error) {
	specs := make([]*v1.ContentKeySpec, len(in))
	for i, k := range in {
		specs[i] = k.GetSpec()
	}
	decoded, err := decodeSpecs(specs)
	if err != nil {
		return nil, err
	}
	keys := make([]custodian.ImportKey, 0, len(in))
	for i, k := range in {
		if n := len(k.GetKey()); n != custodian.CEKSize {
			return keys, &custodian.InvalidError{Field: fmt.Sprintf("keys[%d].key", i), Err: fmt.Errorf("%d bytes: must be %d", n, custodian.CEKSize)}
		}
		slot, err := arena.Get()
		if err != nil {
			return keys, fmt.Errorf("import: %w: %w", err, custodian.ErrRate)
		}
		copy(slot, k.GetKey())
		clear(k.GetKey())
		keys = append(keys, custodian.ImportKey{KeySpec: decoded[i], IV: k.GetIv(), Key: secret.New(arena, slot, custodian.CEKSize)})
	}
	return keys, nil
}

func (s *transfer) ExportContentKeys(ctx context.Context, req *v1.ExportContentKeysRequest) (*v1.ExportContentKeysResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	order := custodian.ExportRequest{RequestID: c.requestID, Category: custodian.CategoryName(req.GetCategory()), ContentID: req.GetContentId(), Ceremony: req.GetCeremony()}
	// Who may not export at all does not hear who the recipients are: so it is
	// the domain that refuses where there is none.
	var certificate string
	if exports := s.server.config.Exports; exports != nil {
		var ok bool
		if certificate, ok = exports.Recipient(req.GetRecipient(), order.Category); ok {
			order.Recipient = custodian.ExportRecipient(req.GetRecipient(), certificate)
		}
	}
	keys, err := custody.Export(ctx, c.caller, order)
	if err != nil {
		return nil, err
	}
	defer func() {
		for i := range keys {
			keys[i].Key.Destroy()
		}
	}()
	resp := &v1.ExportContentKeysResponse{RequestId: c.requestID}
	if resp.Cpix, err = s.server.config.Exports.Document(req.GetRecipient(), certificate, keys); err != nil {
		return nil, err
	}
	for _, k := range keys {
		resp.Kids = append(resp.Kids, k.KID[:])
		resp.Receipts = append(resp.Receipts, &v1.Receipt{Index: k.Receipt.Index, LeafHash: k.Receipt.LeafHash[:], Checkpoint: k.Receipt.Checkpoint})
	}
	return resp, nil
}
