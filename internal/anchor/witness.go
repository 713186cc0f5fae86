package anchor

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A witness is asked by https://c2sp.org/tlog-witness, add-checkpoint: it keeps
// the newest checkpoint of every log that it knows, and takes a newer one only
// with a proof that it continues that.
type witness struct {
	url    string
	key    note.Verifier // nil: no cosignature is asked for
	client *http.Client
	size   uint64 // of the checkpoint that it has, as far as known
}

func newWitness(c Config) (*witness, error) {
	roots, err := Roots(c.CAFile)
	if err != nil {
		return nil, err
	}
	w := &witness{url: strings.TrimSuffix(c.URL, "/") + "/add-checkpoint", client: &http.Client{
		// No proxy of the environment, and what answers with another place is
		// not the one that was configured.
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	if c.Key != "" {
		w.key, err = parseWitnessKey(c.Key)
	}
	return w, err
}

func (w *witness) push(ctx context.Context, l custodian.AnchoredLog, c checkpoint.Checkpoint, signed []byte) error {
	for range 3 {
		if w.size > c.Size {
			return ahead(w.size, c.Size)
		}
		status, body, err := w.add(ctx, l, c, signed)
		if err != nil {
			return err
		}
		switch status {
		case http.StatusOK:
			if err := w.cosigned(signed, body); err != nil {
				return err
			}
			w.size = c.Size
			return nil
		case http.StatusConflict:
			theirs, err := parseSize(body)
			if w.size == c.Size && (err != nil || theirs == c.Size) {
				return fmt.Errorf("its checkpoint of %d entries has another root: %w", c.Size, custodian.ErrAnchorFork)
			}
			if err != nil {
				return err
			}
			w.size = theirs
		case http.StatusUnprocessableEntity:
			return fmt.Errorf("its checkpoint of %d entries is not the beginning of ours of %d: %w", w.size, c.Size, custodian.ErrAnchorFork)
		case http.StatusNotFound:
			return fmt.Errorf("the witness does not know the log %s: give it this origin and the key of custodianctl audit key", l.Origin)
		case http.StatusForbidden:
			return errors.New("the witness does not know the key that signed the checkpoint: give it that of custodianctl audit key")
		default:
			return fmt.Errorf("the witness answers with status %d", status)
		}
	}
	return fmt.Errorf("its log changes while we ask; it has %d entries", w.size)
}

// add makes one request.
func (w *witness) add(ctx context.Context, l custodian.AnchoredLog, c checkpoint.Checkpoint, signed []byte) (status int, answer []byte, err error) {
	body := fmt.Appendf(nil, "old %d\n", w.size)
	if 0 < w.size && w.size < c.Size {
		proof, err := l.Consistency(ctx, w.size, c)
		if err != nil {
			return 0, nil, err
		}
		for i := range proof {
			body = fmt.Appendf(body, "%s\n", base64.StdEncoding.EncodeToString(proof[i][:]))
		}
	}
	body = append(append(body, '\n'), signed...)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	res, err := w.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	if answer, err = io.ReadAll(io.LimitReader(res.Body, 64<<10)); err != nil {
		return 0, nil, err
	}
	return res.StatusCode, answer, nil
}

// parseSize reads the body of a conflict: the size of the checkpoint that the
// witness has.
func parseSize(body []byte) (uint64, error) {
	text, _ := strings.CutSuffix(string(body), "\n")
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil || strconv.FormatUint(n, 10) != text {
		return 0, errors.New("the witness answers with status 409 and no size")
	}
	return n, nil
}

// cosigned checks the witness's signature below the checkpoint, where its key
// is configured.
func (w *witness) cosigned(signed, lines []byte) error {
	if w.key == nil {
		return nil
	}
	text, _, _ := strings.Cut(string(signed), "\n\n")
	if _, err := note.Open([]byte(text+"\n\n"+string(lines)), note.VerifierList(w.key)); err != nil {
		return fmt.Errorf("the witness's cosignature: %w", err)
	}
	return nil
}

// The Ed25519 cosignatures of https://c2sp.org/tlog-cosignature: the signature
// is the time, in 8 bytes, and an Ed25519 signature of that time and the text.
const (
	cosignatureType = 0x04
	cosignatureSize = 8 + ed25519.SignatureSize
)

func cosignatureText(seconds uint64, text []byte) []byte {
	return fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", seconds, text)
}

// cosignatureID is the key ID of a cosigner.
func cosignatureID(name string, key ed25519.PublicKey) uint32 {
	sum := sha256.Sum256(append([]byte(name+"\n\x04"), key...))
	return binary.BigEndian.Uint32(sum[:])
}

// A cosigner verifies cosignatures of one key.
type cosigner struct {
	name string
	key  ed25519.PublicKey
}

func (c cosigner) Name() string    { return c.name }
func (c cosigner) KeyHash() uint32 { return cosignatureID(c.name, c.key) }

// maxAhead is how far a witness's clock may be ahead of ours.
const maxAhead = 5 * time.Minute

func (c cosigner) Verify(text, sig []byte) bool {
	if len(sig) != cosignatureSize {
		return false
	}
	seconds := binary.BigEndian.Uint64(sig)
	return seconds <= uint64(time.Now().Add(maxAhead).Unix()) && ed25519.Verify(c.key, cosignatureText(seconds, text), sig[8:])
}

// parseWitnessKey reads a verifier key, NAME+ID+BASE64 (https://c2sp.org/signed-note).
func parseWitnessKey(s string) (note.Verifier, error) {
	name, rest, _ := strings.Cut(s, "+")
	id, key, _ := strings.Cut(rest, "+")
	raw, err := base64.StdEncoding.DecodeString(key)
	if err != nil || name == "" || len(raw) != 1+ed25519.PublicKeySize || raw[0] != cosignatureType {
		return nil, errors.New("must be the verifier key of a cosigner with Ed25519, NAME+ID+BASE64, of type 0x04")
	}
	c := cosigner{name, raw[1:]}
	if want := fmt.Sprintf("%08x", c.KeyHash()); id != want {
		return nil, fmt.Errorf("its ID is %q, that of the name and the key is %s", id, want)
	}
	return c, nil
}
