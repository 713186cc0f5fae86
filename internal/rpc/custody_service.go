package rpc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// Sizes of a page of content keys, in entries, and of a piece of a backup, in
// bytes.
const (
	defaultPage = 100
	maxPage     = 1000
	maxChunk    = 64 << 10
)

// custodyService is the CustodyService.
type custodyService struct {
	v1.UnimplementedCustodyServiceServer
	server *Server
}

func (s *custodyService) CreateCategory(ctx context.Context, req *v1.CreateCategoryRequest) (*v1.CreateCategoryResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	window, err := decodeDuration(req.GetReissueWindow(), "reissue_window")
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	category, err := custody.CreateCategory(ctx, c.caller, custodian.CreateCategoryRequest{RequestID: c.requestID,
		Name: custodian.CategoryName(req.GetName()), Providers: req.GetProviders(), ReissueWindow: window, Live: req.GetLive()})
	if err != nil {
		return nil, err
	}
	return &v1.CreateCategoryResponse{Category: encodeCategory(category)}, nil
}

func (s *custodyService) SetCategoryMode(ctx context.Context, req *v1.SetCategoryModeRequest) (*v1.SetCategoryModeResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	mode, err := decodeMode(req.GetMode())
	if err != nil {
		return nil, err
	}
	c := callOf(ctx)
	category, err := custody.SetCategoryMode(ctx, c.caller, custodian.SetModeRequest{RequestID: c.requestID,
		Name: custodian.CategoryName(req.GetCategory()), Mode: mode, Cause: req.GetCause()})
	if err != nil {
		return nil, err
	}
	return &v1.SetCategoryModeResponse{Category: encodeCategory(category)}, nil
}

func (s *custodyService) ListCategories(ctx context.Context, _ *v1.ListCategoriesRequest) (*v1.ListCategoriesResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	categories, err := custody.Categories(ctx, callOf(ctx).caller)
	if err != nil {
		return nil, err
	}
	resp := &v1.ListCategoriesResponse{}
	for _, c := range categories {
		resp.Categories = append(resp.Categories, encodeCategory(c))
	}
	return resp, nil
}

func (s *custodyService) ListKeyVersions(ctx context.Context, req *v1.ListKeyVersionsRequest) (*v1.ListKeyVersionsResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	versions, err := custody.KeyVersions(ctx, callOf(ctx).caller, custodian.CategoryName(req.GetCategory()))
	if err != nil {
		return nil, err
	}
	resp := &v1.ListKeyVersionsResponse{}
	for _, k := range versions {
		resp.KeyVersions = append(resp.KeyVersions, encodeKEK(k))
	}
	return resp, nil
}

func (s *custodyService) ListContentKeys(ctx context.Context, req *v1.ListContentKeysRequest) (*v1.ListContentKeysResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	size := int(req.GetPageSize())
	switch {
	case size < 0 || size > maxPage:
		return nil, &custodian.InvalidError{Field: "page_size", Err: fmt.Errorf("%d: must be 0 to %d", size, maxPage)}
	case size == 0:
		size = defaultPage
	}
	keys, next, err := custody.ListContentKeys(ctx, callOf(ctx).caller, custodian.ListRequest{
		Category: custodian.CategoryName(req.GetCategory()), ContentID: req.GetContentId(), PageSize: size, PageToken: req.GetPageToken()})
	if err != nil {
		return nil, err
	}
	resp := &v1.ListContentKeysResponse{NextPageToken: next}
	for i := range keys {
		resp.ContentKeys = append(resp.ContentKeys, encodeInfo(&keys[i]))
	}
	return resp, nil
}

func (s *custodyService) DescribeContentKey(ctx context.Context, req *v1.DescribeContentKeyRequest) (*v1.DescribeContentKeyResponse, error) {
	custody, err := s.server.custody()
	if err != nil {
		return nil, err
	}
	kid, err := custodian.KIDFromBytes(req.GetKid())
	if err != nil {
		return nil, &custodian.InvalidError{Field: "kid", Err: err}
	}
	key, err := custody.DescribeContentKey(ctx, callOf(ctx).caller, kid)
	if err != nil {
		return nil, err
	}
	return &v1.DescribeContentKeyResponse{ContentKey: encodeInfo(&key)}, nil
}

func (s *custodyService) Backup(req *v1.BackupRequest, stream grpc.ServerStreamingServer[v1.BackupResponse]) error {
	custody, err := s.server.custody()
	if err != nil {
		return err
	}
	c := callOf(stream.Context())
	if err := c.name(req.GetRequestId()); err != nil {
		return err
	}
	if req.GetRecipient() == "" {
		return &custodian.InvalidError{Field: "recipient", Err: errNoRecipient}
	}
	return custody.Backup(stream.Context(), c.caller, req.GetRecipient(), chunkWriter{stream})
}

var errNoRecipient = errors.New("empty; name the age public key that the backup is encrypted to")

// A chunkWriter sends what is written to it, in pieces.
type chunkWriter struct {
	stream grpc.ServerStreamingServer[v1.BackupResponse]
}

func (w chunkWriter) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n := min(len(p)-sent, maxChunk)
		if err := w.stream.Send(&v1.BackupResponse{Chunk: p[sent : sent+n]}); err != nil {
			return sent, &sendError{err}
		}
		sent += n
	}
	return sent, nil
}

// decodeDuration reads an optional duration that is not negative.
func decodeDuration(d *durationpb.Duration, field string) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, &custodian.InvalidError{Field: field, Err: err}
	}
	if d.AsDuration() < 0 {
		return 0, &custodian.InvalidError{Field: field, Err: errNegative}
	}
	return d.AsDuration(), nil
}

var (
	errNegative = errors.New("must not be negative")
	errMode     = errors.New("must be one of the modes")
)

func decodeMode(m v1.CategoryMode) (custodian.CategoryMode, error) {
	switch m {
	case v1.CategoryMode_CATEGORY_MODE_OPEN:
		return custodian.CategoryOpen, nil
	case v1.CategoryMode_CATEGORY_MODE_NO_NEW:
		return custodian.CategoryNoNew, nil
	case v1.CategoryMode_CATEGORY_MODE_REKEY_REQUIRED:
		return custodian.CategoryRekeyRequired, nil
	case v1.CategoryMode_CATEGORY_MODE_FROZEN:
		return custodian.CategoryFrozen, nil
	}
	return 0, &custodian.InvalidError{Field: "mode", Err: errMode}
}

func encodeMode(m custodian.CategoryMode) v1.CategoryMode {
	switch m {
	case custodian.CategoryOpen:
		return v1.CategoryMode_CATEGORY_MODE_OPEN
	case custodian.CategoryFrozen:
		return v1.CategoryMode_CATEGORY_MODE_FROZEN
	case custodian.CategoryNoNew:
		return v1.CategoryMode_CATEGORY_MODE_NO_NEW
	case custodian.CategoryRekeyRequired:
		return v1.CategoryMode_CATEGORY_MODE_REKEY_REQUIRED
	}
	return v1.CategoryMode_CATEGORY_MODE_UNSPECIFIED
}

var states = map[custodian.State]v1.KeyState{
	custodian.StatePreActive:   v1.KeyState_KEY_STATE_PRE_ACTIVE,
	custodian.StateActive:      v1.KeyState_KEY_STATE_ACTIVE,
	custodian.StateSuspended:   v1.KeyState_KEY_STATE_SUSPENDED,
	custodian.StateDeactivated: v1.KeyState_KEY_STATE_DEACTIVATED,
	custodian.StateCompromised: v1.KeyState_KEY_STATE_COMPROMISED,
	custodian.StateDestroyed:   v1.KeyState_KEY_STATE_DESTROYED,
}

var origins = map[custodian.Origin]v1.KeyOrigin{
	custodian.OriginGenerated: v1.KeyOrigin_KEY_ORIGIN_GENERATED,
	custodian.OriginImported:  v1.KeyOrigin_KEY_ORIGIN_IMPORTED,
}

func encodeCategory(c custodian.Category) *v1.Category {
	return &v1.Category{Name: string(c.Name), Mode: encodeMode(c.Mode), ActiveKeyVersion: c.ActiveKEK, Providers: c.Providers,
		CreateTime: timestamp(c.CreateTime), ReissueWindow: durationpb.New(c.ReissueWindow), Live: c.Live, Revision: c.Revision}
}

func encodeKEK(k custodian.KEK) *v1.KeyVersion {
	out := &v1.KeyVersion{Category: string(k.ID.Category), Version: k.ID.Version, State: states[k.State],
		CreateTime: timestamp(k.CreateTime), DeactivateTime: timestamp(k.DeactivateTime),
		MekVersion: k.Wrapped.MEKVersion, ReservedInvocations: k.Reserved, Revision: k.Revision}
	for _, w := range k.Wrapped.Outer {
		out.OuterWraps = append(out.OuterWraps, &v1.OuterWrap{Provider: w.Provider, KeyRef: w.KeyRef})
	}
	return out
}

func encodeInfo(k *custodian.ContentKeyInfo) *v1.ContentKeyInfo {
	out := &v1.ContentKeyInfo{Kid: k.KID[:], Category: string(k.Category), ContentId: k.ContentID, TrackType: string(k.TrackType),
		Scheme: string(k.Scheme), Generation: k.Generation, Iv: k.IV, State: states[k.State], Origin: origins[k.Origin],
		KeyVersion: k.KEK.Version, BirthKeyVersion: k.BirthKEK, CreateTime: timestamp(k.CreateTime), PackagedTime: timestamp(k.PackagedTime), Revision: k.Revision}
	if k.HasPeriod {
		out.PeriodIndex = &k.Period
		out.PeriodStartTime, out.PeriodEndTime = timestamp(k.PeriodStart), timestamp(k.PeriodEnd)
	}
	return out
}
