package rpc

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// issuance is the KeyIssuanceService.
type issuance struct {
	v1.UnimplementedKeyIssuanceServiceServer
	server *Server
}

func (s *issuance) IssueContentKeys(ctx context.Context, req *v1.IssueContentKeysRequest) (*v1.IssueContentKeysResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	specs, err := decodeSpecs(req.GetKeys())
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	keys, err := custody.Issue(ctx, c.caller, custodian.IssueRequest{RequestID: c.requestID,
		Category: custodian.CategoryName(req.GetCategory()), ContentID: req.GetContentId(), Keys: specs, Sealable: true})
	if err != nil {
		return nil, err
	}
	var grace graceTrailer
	for i := range keys {
		grace.add(keys[i].Grace)
	}
	grace.send(ctx)
	return s.encode(c, keys), nil
}

// encode makes the response, whose keys are the arena's until the codec has
// encoded them.
func (s *issuance) encode(c *call, keys []custodian.IssuedKey) *v1.IssueContentKeysResponse {
	resp := &v1.IssueContentKeysResponse{RequestId: c.requestID, Keys: make([]*v1.IssuedContentKey, len(keys))}
	parts := make([]struct {
		issued v1.IssuedContentKey
		key    keyParts
	}, len(keys))
	for i := range keys {
		from, to := &keys[i], &parts[i]
		to.issued.Key = to.key.encode(&from.ContentKey, from.Key.Lend())
		to.key.sealed(c, from.Sealed)
		to.key.attest(from.Receipt.Index, from.Receipt.LeafHash[:], from.Receipt.Checkpoint)
		to.issued.Created = from.Created
		resp.Keys[i] = &to.issued
	}
	s.server.metrics.countIssued(keys)
	return resp
}

// decodeSpecs reads what the wire can get wrong. What a spec may say is the
// domain's to check.
func decodeSpecs(in []*v1.ContentKeySpec) ([]custodian.KeySpec, error) {
	if len(in) < 1 || len(in) > custodian.MaxKeysPerIssue {
		return nil, &custodian.InvalidError{Field: "keys", Err: fmt.Errorf("%d keys: must be 1 to %d", len(in), custodian.MaxKeysPerIssue)}
	}
	specs := make([]custodian.KeySpec, len(in))
	for i, s := range in {
		specs[i].TrackType = custodian.TrackType(s.GetTrackType())
		specs[i].Scheme = custodian.Scheme(s.GetScheme())
		var err error
		if len(s.GetKid()) > 0 {
			if specs[i].KID, err = custodian.KIDFromBytes(s.GetKid()); err != nil {
				return nil, &custodian.InvalidError{Field: fmt.Sprintf("keys[%d].kid", i), Err: err}
			}
		}
		if specs[i].Period, err = decodePeriod(s.GetPeriod(), fmt.Sprintf("keys[%d].period", i)); err != nil {
			return nil, err
		}
	}
	return specs, nil
}

func decodePeriod(p *v1.Period, field string) (custodian.Period, error) {
	if p == nil {
		return custodian.Period{}, nil
	}
	start, err := decodeTime(p.GetStartTime(), field+".start_time")
	if err != nil {
		return custodian.Period{}, err
	}
	end, err := decodeTime(p.GetEndTime(), field+".end_time")
	if err != nil {
		return custodian.Period{}, err
	}
	return custodian.Period{Set: true, Index: p.GetIndex(), Start: start, End: end}, nil
}

// decodeTime reads an optional timestamp; absent is the zero time.
func decodeTime(t *timestamppb.Timestamp, field string) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, &custodian.InvalidError{Field: field, Err: err}
	}
	return t.AsTime(), nil
}

// timestamp writes an optional time; the zero time is absent.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
