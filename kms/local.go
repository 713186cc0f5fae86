package kms

import (
	"bytes"
	"context"
	"fmt"

	"github.com/keycustody/custodian/custodian"
)

// local is the provider without a second party: the blob that the HSM wrapped
// rests as it is. It lets the product run on one machine with nothing else
// than a token.
//
// It cannot bind a blob to its context, nor notice a changed one. With it, a
// KEK is bound to its record by the record's MAC and by the KEK's canary
// only, and whoever holds the token and its PIN needs nobody else. Status
// says so: OuterLayer is false.
type local struct {
	name    string
	contact contact
}

func openLocal(c Config) *local {
	return &local{name: c.Name, contact: contact{now: c.Now, reachable: true}}
}

func (l *local) Name() string { return l.name }

func (l *local) Wrap(ctx context.Context, blob, context []byte) (custodian.OuterWrap, error) {
	if err := refuse(l.name, blob, context); err != nil {
		return custodian.OuterWrap{}, err
	}
	if err := l.begin(ctx); err != nil {
		return custodian.OuterWrap{}, err
	}
	return custodian.OuterWrap{Provider: l.name, Blob: bytes.Clone(blob)}, nil
}

func (l *local) Unwrap(ctx context.Context, w custodian.OuterWrap, context []byte) ([]byte, error) {
	if err := refuseWrap(l.name, w, context); err != nil {
		return nil, err
	}
	if err := l.begin(ctx); err != nil {
		return nil, err
	}
	return bytes.Clone(w.Blob), nil
}

// begin counts a call and ends it where its context has ended.
func (l *local) begin(ctx context.Context) (err error) {
	if cause := context.Cause(ctx); cause != nil {
		err = fmt.Errorf("kms %s: %w: %w", l.name, custodian.ErrProviderUnavailable, cause)
	}
	l.contact.done(err)
	return err
}

func (l *local) Status() custodian.ProviderStatus {
	s := l.contact.describe(custodian.ProviderStatus{Name: l.name, Kind: KindLocal})
	s.Reachable = true // there is nothing to reach
	return s
}

func (l *local) Close() error { return nil }
