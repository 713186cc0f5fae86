package rpc

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// auditService is the AuditService.
type auditService struct {
	v1.UnimplementedAuditServiceServer
	server *Server
}

func (s *auditService) GetCheckpoint(ctx context.Context, _ *v1.GetCheckpointRequest) (*v1.GetCheckpointResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	signed, key, err := custody.AuditCheckpoint(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	return &v1.GetCheckpointResponse{Checkpoint: signed, SigningKey: &v1.SigningKey{PublicKey: key.PublicKey, Label: key.Label, Id: key.ID[:],
		TokenSerial: key.TokenSerial, Attributes: custodian.SignerAttributes, CreateTime: timestamp(key.CreateTime)}}, nil
}

func (s *auditService) GetInclusionProof(ctx context.Context, req *v1.GetInclusionProofRequest) (*v1.GetInclusionProofResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	p, err := custody.AuditInclusion(ctx, callOf(ctx).caller, req.GetIndex(), req.GetSize())
	if err != nil {
		return nil, err
	}
	entry, err := p.Entry.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return &v1.GetInclusionProofResponse{Entry: entry, Hashes: encodeHashes(p.Hashes), Checkpoint: p.Checkpoint}, nil
}

func (s *auditService) GetConsistencyProof(ctx context.Context, req *v1.GetConsistencyProofRequest) (*v1.GetConsistencyProofResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	hashes, signed, err := custody.AuditConsistency(ctx, callOf(ctx).caller, req.GetOldSize(), req.GetSize())
	if err != nil {
		return nil, err
	}
	return &v1.GetConsistencyProofResponse{Hashes: encodeHashes(hashes), Checkpoint: signed}, nil
}

func (s *auditService) ListEntries(ctx context.Context, req *v1.ListEntriesRequest) (*v1.ListEntriesResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	q, err := decodeAuditQuery(req)
	if err != nil {
		return nil, err
	}
	entries, next, err := custody.AuditEntries(ctx, callOf(ctx).caller, q)
	if err != nil {
		return nil, err
	}
	encoded, err := encodeEntries(entries)
	resp := &v1.ListEntriesResponse{Entries: encoded, NextIndex: next}
	if pruned := custody.AuditPrunedBefore(); q.From < pruned {
		resp.PrunedBeforeIndex = pruned
	}
	return resp, err
}

func encodeEntries(entries []custodian.AuditEntry) ([][]byte, error) {
	out := make([][]byte, len(entries))
	for i := range entries {
		var err error
		if out[i], err = entries[i].MarshalBinary(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (s *auditService) FollowEntries(req *v1.FollowEntriesRequest, stream grpc.ServerStreamingServer[v1.FollowEntriesResponse]) error {
	custody, err := s.server.custody()
	if err != nil {
		return err
	}
	q, err := decodeAuditQuery(req.GetQuery())
	if err != nil {
		return err
	}
	ctx, cancel := s.server.untilDrain(stream.Context())
	defer cancel()
	err = custody.FollowAudit(ctx, callOf(ctx).caller, q, func(entries []custodian.AuditEntry) error {
		encoded, err := encodeEntries(entries)
		if err != nil {
			return err
		}
		if err := stream.Send(&v1.FollowEntriesResponse{Entries: encoded}); err != nil {
			return &sendError{err}
		}
		return nil
	})
	if ctx.Err() != nil && stream.Context().Err() == nil {
		return custodian.ErrStarting // the daemon stops: another one, or the next, goes on
	}
	return err
}

var outcomes = map[v1.AuditOutcome]custodian.AuditOutcome{
	v1.AuditOutcome_AUDIT_OUTCOME_UNSPECIFIED: 0,
	v1.AuditOutcome_AUDIT_OUTCOME_ALLOWED:     custodian.AuditAllowed,
	v1.AuditOutcome_AUDIT_OUTCOME_DENIED:      custodian.AuditDenied,
	v1.AuditOutcome_AUDIT_OUTCOME_FAILED:      custodian.AuditFailed,
	v1.AuditOutcome_AUDIT_OUTCOME_BEGUN:       custodian.AuditBegun,
}

func decodeAuditQuery(req *v1.ListEntriesRequest) (custodian.AuditQuery, error) {
	q := custodian.AuditQuery{From: req.GetFromIndex(), PageSize: int(req.GetPageSize()), AuditFilter: custodian.AuditFilter{
		Caller: req.GetCaller(), Action: req.GetAction(), Category: req.GetCategory(), ContentID: req.GetContentId(), KeyVersion: req.GetKeyVersion()}}
	switch {
	case q.PageSize < 0 || q.PageSize > maxPage:
		return q, &custodian.InvalidError{Field: "page_size", Err: fmt.Errorf("%d: must be 0 to %d", q.PageSize, maxPage)}
	case q.PageSize == 0:
		q.PageSize = defaultPage
	}
	q.SessionID, q.UserID = req.GetSessionId(), req.GetUserId()
	var known bool
	if q.Outcome, known = outcomes[req.GetOutcome()]; !known {
		return q, &custodian.InvalidError{Field: "outcome", Err: fmt.Errorf("%d: not known", req.GetOutcome())}
	}
	if len(req.GetKid()) > 0 {
		kid, err := custodian.KIDFromBytes(req.GetKid())
		if err != nil {
			return q, &custodian.InvalidError{Field: "kid", Err: err}
		}
		q.KID = kid[:]
	}
	for _, t := range []struct {
		field string
		from  *timestamppb.Timestamp
		to    *time.Time
	}{{"since_time", req.GetSinceTime(), &q.Since}, {"before_time", req.GetBeforeTime(), &q.Before}} {
		if t.from == nil {
			continue
		}
		if err := t.from.CheckValid(); err != nil {
			return q, &custodian.InvalidError{Field: t.field, Err: err}
		}
		*t.to = t.from.AsTime()
	}
	return q, nil
}

func encodeHashes(in [][32]byte) [][]byte {
	out := make([][]byte, len(in))
	for i := range in {
		out[i] = in[i][:]
	}
	return out
}
