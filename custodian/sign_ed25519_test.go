package custodian_test

import (
	"crypto/ed25519"
	"errors"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// With the Ed25519 profile and a name, every checkpoint is one that an
// independent implementation of the note format takes.
func TestEd25519Profile(t *testing.T) {
	w := bareWorld(t)
	w.cfg.AuditName = "keys.video.example/audit"
	w.openParts()
	if err := custodian.Init(t.Context(), w.cfg, custodian.InitSpec{AuditSigning: custodian.SignEd25519}); err != nil {
		t.Fatal(err)
	}
	w.reopen()
	w.category("movies")
	signed := w.issue("movies", "film-1", "SD")[0].Receipt.Checkpoint

	public, ok := w.auditSigner().Public().(ed25519.PublicKey)
	if !ok {
		t.Fatalf("the token's key is a %T", w.auditSigner().Public())
	}
	origin := checkpoint.NamedOrigin("keys.video.example/audit", w.log.ID())
	vkey, err := note.NewEd25519VerifierKey(origin, public)
	if err != nil {
		t.Fatal(err)
	}
	v, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil || len(n.Sigs) != 1 || !strings.HasPrefix(n.Text, origin+"\n") {
		t.Errorf("note = %+v, %v", n, err)
	}
	if r, err := audit.Verify(t.Context(), w.auditDir(), audit.VerifyOptions{Check: func(signed []byte) error {
		_, err := checkpoint.Verify(signed, public)
		return err
	}}); err != nil || r.Checkpoints == 0 {
		t.Errorf("report = %+v, %v", r, err)
	}

	// A log keeps its name.
	w.cfg.AuditName = "another"
	if err := w.open(); !errors.Is(err, custodian.ErrAuditBlocked) || !strings.Contains(err.Error(), "a log keeps its name") {
		t.Errorf("under another name: error = %v", err)
	}
	w.cfg.AuditName = "keys.video.example/audit"
	w.reopen()
	w.issue("movies", "film-2", "SD")
}
