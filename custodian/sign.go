package custodian

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// signerAudit is the purpose of the key that signs the audit log's checkpoints.
const signerAudit = "audit"

// auditSigner is the record of the key that signs now.
func (s *controlSet) auditSigner() (Signer, error) {
	var latest Signer
	for _, g := range s.signers {
		if g.Purpose == signerAudit && g.State == StateActive && g.Version > latest.Version {
			latest = g
		}
	}
	if latest.Version == 0 {
		return latest, corrupt("signing key "+signerAudit, errors.New("no active version is recorded"))
	}
	return latest, nil
}

// auditOrigin is the origin of the checkpoints that are made now.
func (c *Custodian) auditOrigin() string {
	if c.auditName == "" {
		return checkpoint.Origin(c.audit.ID())
	}
	return checkpoint.NamedOrigin(c.auditName, c.audit.ID())
}

// signLog has the audit log signed by the token, with the recorded key and no
// other. The last checkpoint of the log must be one that this key has signed.
func (c *Custodian) signLog(ctx context.Context, set *controlSet) error {
	g, err := set.auditSigner()
	if err != nil {
		return err
	}
	key, err := c.hsm.Signer(ctx, g.Label, g.ID)
	if err != nil {
		return fmt.Errorf("signing key %s: %w", g.Label, err)
	}
	recorded, err := x509.ParsePKIXPublicKey(g.PublicKey)
	if err != nil {
		return corrupt("signing key "+g.Label, err)
	}
	if same, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !same.Equal(recorded) {
		return fmt.Errorf("signing key %s: the token has another pair than the one that is recorded: %w", g.Label, ErrWrongMEK)
	}
	origin := c.auditOrigin()
	signer, err := checkpoint.NewSigner(origin, key)
	if err != nil {
		return fmt.Errorf("signing key %s: %w", g.Label, err)
	}
	c.checkLogged = func(signed []byte) error {
		_, err := checkpoint.Verify(signed, recorded)
		return err
	}
	err = c.audit.SignWith(audit.Signer{
		Sign: func(size uint64, root [32]byte) ([]byte, error) {
			return checkpoint.Checkpoint{Origin: origin, Size: size, Root: root}.Sign(signer)
		},
		Check: c.checkLogged,
	})
	if err != nil {
		return fmt.Errorf("audit log: %w: %w", err, ErrLogRollback)
	}
	return nil
}
