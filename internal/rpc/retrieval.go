package rpc

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// retrieval is the KeyRetrievalService.
type retrieval struct {
	v1.UnimplementedKeyRetrievalServiceServer
	server *Server
}

func (r *retrieval) GetContentKeys(ctx context.Context, req *v1.GetContentKeysRequest) (*v1.GetContentKeysResponse, error) {
	custody, err := r.server.custody()
	if err != nil {
		return nil, err
	}
	kids, err := decodeKIDs(req.GetKids())
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	results, err := custody.Retrieve(ctx, c.caller, custodian.RetrieveRequest{RequestID: c.requestID, ContentID: req.GetContentId(), KIDs: kids,
		RecipientKeyID: req.GetRecipientKeyId(), LicenceToken: req.GetLicenceToken(), SessionID: req.GetViewerContext().GetSessionId(),
		UserID: req.GetViewerContext().GetUserId(), Asserted: viewer(req.GetViewerContext())})
	if err != nil {
		return nil, err
	}
	return r.encode(ctx, c, results)
}

// viewer is what the caller asserts.
func viewer(v *v1.ViewerContext) custodian.Viewer {
	return custodian.Viewer{DRMSystem: v.GetDrmSystem(), SecurityLevel: v.GetSecurityLevel(), HDCP: v.GetHdcp(), Region: v.GetRegion(), LicenceType: v.GetLicenceType()}
}

// encode makes the response, or the call's error where no key was released. The
// keys of the response are the arena's until the codec has encoded them.
func (r *retrieval) encode(ctx context.Context, c *call, results []custodian.RetrieveResult) (*v1.GetContentKeysResponse, error) {
	resp := &v1.GetContentKeysResponse{RequestId: c.requestID, Results: make([]*v1.GetContentKeysResult, len(results))}
	parts := make([]struct {
		result  v1.GetContentKeysResult
		success v1.GetContentKeysResult_Key
		key     keyParts
	}, len(results))
	released := 0
	for i := range results {
		from, to := &results[i], &parts[i]
		resp.Results[i] = &to.result
		to.result.Kid = from.KID[:]
		if from.Err != nil {
			to.result.Result = &v1.GetContentKeysResult_Error{Error: r.refused(ctx, from)}
			continue
		}
		to.success.Key = to.key.encode(&from.Info, from.Key.Lend())
		to.key.sealed(c, from.Sealed)
		to.key.attest(from.Receipt.Index, from.Receipt.LeafHash[:], from.Receipt.Checkpoint)
		to.result.Result = &to.success
		released++
	}
	r.server.metrics.released.Add(float64(released))
	if released == 0 && len(results) > 0 {
		return nil, results[0].Err // unary logs it
	}
	var grace graceTrailer
	for i := range results {
		grace.add(results[i].Grace)
		if err := results[i].Err; err != nil {
			r.server.report(c, explain(ctx, err), err)
		}
	}
	grace.send(ctx)
	return resp, nil
}

// refused tells why one key is not there.
func (r *retrieval) refused(ctx context.Context, result *custodian.RetrieveResult) *v1.KeyError {
	row := explain(ctx, result.Err)
	r.server.metrics.refused(row.reason)
	return row.keyErrorOf(result.Err)
}

func decodeKIDs(in [][]byte) ([]custodian.KID, error) {
	if len(in) < 1 || len(in) > custodian.MaxKIDsPerCall {
		return nil, &custodian.InvalidError{Field: "kids", Err: fmt.Errorf("%d KIDs: must be 1 to %d", len(in), custodian.MaxKIDsPerCall)}
	}
	kids := make([]custodian.KID, len(in))
	for i, b := range in {
		var err error
		if kids[i], err = custodian.KIDFromBytes(b); err != nil {
			return nil, &custodian.InvalidError{Field: fmt.Sprintf("kids[%d]", i), Err: err}
		}
		for j := range i {
			if kids[j] == kids[i] {
				return nil, &custodian.InvalidError{Field: fmt.Sprintf("kids[%d]", i), Err: fmt.Errorf("the same KID as kids[%d]", j)}
			}
		}
	}
	return kids, nil
}

// keyParts are the messages of one key in one piece of memory.
type keyParts struct {
	key      v1.ContentKey
	material v1.ContentKey_Key
	receipt  v1.Receipt
	period   v1.Period
	created  timestamppb.Timestamp
}

// encode fills the parts and returns the key.
func (p *keyParts) encode(k *custodian.ContentKey, key []byte) *v1.ContentKey {
	p.material.Key = key
	p.key.Kid = k.KID[:]
	p.key.KeyMaterial = &p.material
	p.key.Category = string(k.Category)
	p.key.ContentId = k.ContentID
	p.key.TrackType = string(k.TrackType)
	p.key.Scheme = string(k.Scheme)
	p.key.Generation = k.Generation
	p.key.Iv = k.IV
	p.created.Seconds, p.created.Nanos = k.CreateTime.Unix(), int32(k.CreateTime.Nanosecond())
	p.key.CreateTime = &p.created
	if k.HasPeriod {
		p.period.Index = k.Period
		p.period.StartTime, p.period.EndTime = timestamp(k.PeriodStart), timestamp(k.PeriodEnd)
		p.key.Period = &p.period
	}
	return &p.key
}

// attest adds the receipt of the key's audit entry.
func (p *keyParts) attest(index uint64, leafHash, checkpoint []byte) {
	p.receipt.Index = index
	p.receipt.LeafHash = leafHash
	p.receipt.Checkpoint = checkpoint
	p.key.Receipt = &p.receipt
}

func (r *retrieval) ListKeyPeriods(ctx context.Context, req *v1.ListKeyPeriodsRequest) (*v1.ListKeyPeriodsResponse, error) {
	custody, err := r.server.custody()
	if err != nil {
		return nil, err
	}
	kid, err := custodian.KIDFromBytes(req.GetKid())
	if err != nil {
		return nil, &custodian.InvalidError{Field: "kid", Err: err}
	}
	limit := int(req.GetLimit())
	if limit == 0 {
		limit = custodian.MaxKeyPeriods
	}
	c := callOf(ctx)
	keys, err := custody.KeyPeriods(ctx, c.caller, custodian.KeyPeriodsRequest{RequestID: c.requestID, KID: kid, Limit: limit, LicenceToken: req.GetLicenceToken()})
	if err != nil {
		return nil, err
	}
	resp := &v1.ListKeyPeriodsResponse{RequestId: c.requestID}
	for i := range keys {
		p := &v1.KeyPeriod{Kid: keys[i].KID[:]}
		if keys[i].HasPeriod {
			p.Period = &v1.Period{Index: keys[i].Period, StartTime: timestamp(keys[i].PeriodStart), EndTime: timestamp(keys[i].PeriodEnd)}
		}
		resp.Periods = append(resp.Periods, p)
	}
	return resp, nil
}
