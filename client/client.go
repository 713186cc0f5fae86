// Package client calls Custodian over mutual TLS: keys for packagers and DRM
// providers, categories, metadata, status and backup for officers, auditors and
// operators.
//
// It decides when a refused call is tried again, which is where the daemon says
// so and no more, and turns refusals into [Error]. It keeps no key: what a
// response holds is the caller's to wipe.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
)

// Config says where the daemon is and who calls. The address and the three
// files are needed.
type Config struct {
	// Address is the daemon's host:port.
	Address string
	// CertFile and KeyFile are the client's certificate chain and private key, in
	// PEM. They are read again for each connection, so that a new certificate
	// takes effect without a restart.
	CertFile string
	KeyFile  string
	// CAFile holds the CA certificates that the daemon is verified with, in PEM.
	CAFile string
	// ServerName is the name that the daemon's certificate must have; empty for
	// the host of Address.
	ServerName string
	// Attempts is how often a call is made at most, the first one included: 4 if
	// zero. 1 tries nothing again.
	Attempts int
	// RecipientKeys open the content keys that the daemon seals to them. With
	// any, a content key that is not sealed to one of them fails its call.
	RecipientKeys []RecipientKey
	// Log receives a line when a changed certificate file is bad. Nothing is
	// logged if nil.
	Log *slog.Logger
}

// A Client is a connection to a daemon, made anew whenever it breaks. It is safe
// for concurrent use. The error of each call is an *Error, but for Backup's where
// its writer fails, and where a sealed key does not open (ErrSealed).
type Client struct {
	conn      *grpc.ClientConn
	retrieval v1.KeyRetrievalServiceClient
	issuance  v1.KeyIssuanceServiceClient
	transfer  v1.KeyTransferServiceClient
	custody   v1.CustodyServiceClient
	audit     v1.AuditServiceClient
	rotation  v1.RotationServiceClient
	ceremony  v1.CeremonyServiceClient
	revoke    v1.RevocationServiceClient
	health    healthv1.HealthClient
	keys      recipients
}

// Dial connects and makes sure that the daemon accepts the certificate. It does
// not ask whether the daemon serves keys yet: Ready does. Its error wraps an
// *Error where the daemon, or the way there, refused; a fault of the address or
// of one of the three files is none.
func Dial(ctx context.Context, c Config) (*Client, error) {
	tls, err := certs.NewClient(certs.ClientOptions{CertFile: c.CertFile, KeyFile: c.KeyFile, CAFile: c.CAFile, ServerName: c.ServerName, Log: c.Log})
	if err != nil {
		return nil, err
	}
	if c.Attempts <= 0 {
		c.Attempts = 4
	}
	retries := retries{attempts: c.Attempts}
	conn, err := grpc.NewClient(c.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(tls.TLSConfig())),
		grpc.WithUnaryInterceptor(retries.unary),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),      // keys take no way that the environment names
		grpc.WithDisableRetry(), // the interceptor knows the rules
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", c.Address, err)
	}
	cl := &Client{conn: conn, retrieval: v1.NewKeyRetrievalServiceClient(conn), issuance: v1.NewKeyIssuanceServiceClient(conn), transfer: v1.NewKeyTransferServiceClient(conn),
		custody: v1.NewCustodyServiceClient(conn), audit: v1.NewAuditServiceClient(conn), rotation: v1.NewRotationServiceClient(conn), ceremony: v1.NewCeremonyServiceClient(conn), revoke: v1.NewRevocationServiceClient(conn), health: healthv1.NewHealthClient(conn),
		keys: newRecipients(c.RecipientKeys)}
	if _, err := cl.Ready(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("dial %s: %w", c.Address, err)
	}
	return cl, nil
}

// Close ends the connection, and with it the calls under way.
func (c *Client) Close() error { return c.conn.Close() }

// Ready says whether the daemon serves keys now.
func (c *Client) Ready(ctx context.Context) (bool, error) {
	resp, err := c.health.Check(ctx, &healthv1.HealthCheckRequest{})
	return resp.GetStatus() == healthv1.HealthCheckResponse_SERVING, wrap(err)
}

// GetContentKeys releases content keys by KID, for a DRM provider. Each result
// has the key or a KeyError; where no key is released, the error is the first
// result's.
func (c *Client) GetContentKeys(ctx context.Context, req *v1.GetContentKeysRequest) (*v1.GetContentKeysResponse, error) {
	req = named(c.keys, req, func(r *v1.GetContentKeysRequest, id string) { r.RequestId = id })
	resp, err := answer(c.retrieval.GetContentKeys(ctx, req))
	for _, r := range resp.GetResults() {
		if err := c.keys.open(r.GetKey(), req.GetRequestId()); err != nil {
			return nil, err
		}
	}
	return resp, err
}

// ListKeyPeriods names the key with a KID and those of the crypto periods after
// its own, for a DRM provider that fetches keys before viewers ask.
func (c *Client) ListKeyPeriods(ctx context.Context, req *v1.ListKeyPeriodsRequest) (*v1.ListKeyPeriodsResponse, error) {
	return answer(c.retrieval.ListKeyPeriods(ctx, req))
}

// IssueContentKeys returns the keys of a content item and makes those that do
// not exist, for a packager. The same request gives the same keys.
func (c *Client) IssueContentKeys(ctx context.Context, req *v1.IssueContentKeysRequest) (*v1.IssueContentKeysResponse, error) {
	req = named(c.keys, req, func(r *v1.IssueContentKeysRequest, id string) { r.RequestId = id })
	resp, err := answer(c.issuance.IssueContentKeys(ctx, req))
	for _, k := range resp.GetKeys() {
		if err := c.keys.open(k.GetKey(), req.GetRequestId()); err != nil {
			return nil, err
		}
	}
	return resp, err
}

// ImportContentKeys stores keys of one content item that exist already. The
// keys in the request are the caller's to wipe.
func (c *Client) ImportContentKeys(ctx context.Context, req *v1.ImportContentKeysRequest) (*v1.ImportContentKeysResponse, error) {
	return answer(c.transfer.ImportContentKeys(ctx, req))
}

// ExportContentKeys returns the keys of one content item, encrypted to a
// recipient of the daemon's configuration.
func (c *Client) ExportContentKeys(ctx context.Context, req *v1.ExportContentKeysRequest) (*v1.ExportContentKeysResponse, error) {
	return answer(c.transfer.ExportContentKeys(ctx, req))
}

// CreateCategory makes a content category.
func (c *Client) CreateCategory(ctx context.Context, req *v1.CreateCategoryRequest) (*v1.Category, error) {
	resp, err := c.custody.CreateCategory(ctx, req)
	return resp.GetCategory(), wrap(err)
}

// SetCategoryMode freezes a category, or opens it again.
func (c *Client) SetCategoryMode(ctx context.Context, req *v1.SetCategoryModeRequest) (*v1.Category, error) {
	resp, err := c.custody.SetCategoryMode(ctx, req)
	return resp.GetCategory(), wrap(err)
}

// FreezeCaller stops a caller.
func (c *Client) FreezeCaller(ctx context.Context, req *v1.FreezeCallerRequest) (*v1.FrozenCaller, error) {
	resp, err := c.custody.FreezeCaller(ctx, req)
	return resp.GetCaller(), wrap(err)
}

// LiftCaller lets a caller call again.
func (c *Client) LiftCaller(ctx context.Context, req *v1.LiftCallerRequest) (*v1.FrozenCaller, error) {
	resp, err := c.custody.LiftCaller(ctx, req)
	return resp.GetCaller(), wrap(err)
}

// ListFrozenCallers returns the callers that are frozen, by identity.
func (c *Client) ListFrozenCallers(ctx context.Context) ([]*v1.FrozenCaller, error) {
	resp, err := c.custody.ListFrozenCallers(ctx, &v1.ListFrozenCallersRequest{})
	return resp.GetCallers(), wrap(err)
}

// ListCategories returns the categories that the caller may see, by name.
func (c *Client) ListCategories(ctx context.Context) ([]*v1.Category, error) {
	resp, err := c.custody.ListCategories(ctx, &v1.ListCategoriesRequest{})
	return resp.GetCategories(), wrap(err)
}

// ListKeyVersions returns the versions of a category's key-encryption key,
// oldest first.
func (c *Client) ListKeyVersions(ctx context.Context, category string) ([]*v1.KeyVersion, error) {
	resp, err := c.custody.ListKeyVersions(ctx, &v1.ListKeyVersionsRequest{Category: category})
	return resp.GetKeyVersions(), wrap(err)
}

// ListContentKeys returns one page of the metadata of a category's content keys.
func (c *Client) ListContentKeys(ctx context.Context, req *v1.ListContentKeysRequest) (*v1.ListContentKeysResponse, error) {
	return answer(c.custody.ListContentKeys(ctx, req))
}

// DescribeContentKey returns the metadata of one content key.
func (c *Client) DescribeContentKey(ctx context.Context, kid []byte) (*v1.ContentKeyInfo, error) {
	resp, err := c.custody.DescribeContentKey(ctx, &v1.DescribeContentKeyRequest{Kid: kid})
	return resp.GetContentKey(), wrap(err)
}

// Status describes the daemon.
func (c *Client) Status(ctx context.Context) (*v1.Status, error) {
	resp, err := c.custody.GetStatus(ctx, &v1.GetStatusRequest{})
	return resp.GetStatus(), wrap(err)
}

// Backup writes a backup of the store to w, encrypted to the age X25519 public
// key of the request. After an error, what w has is not a backup. An error of w
// is wrapped, and no *Error.
func (c *Client) Backup(ctx context.Context, req *v1.BackupRequest, w io.Writer) error {
	// A write error ends the stream.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.custody.Backup(ctx, req)
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
		if _, err := w.Write(resp.GetChunk()); err != nil {
			return fmt.Errorf("write backup: %w", err)
		}
	}
}

// answer wraps the error of a call.
func answer[T any](resp *T, err error) (*T, error) {
	if err != nil {
		return nil, wrap(err)
	}
	return resp, nil
}
