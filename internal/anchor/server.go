package anchor

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/keycustody/custodian/internal/checkpoint"
)

// A Server is a witness, https://c2sp.org/tlog-witness, for the logs whose keys
// lie in its folder: LOG.pem, where the origin of the log ends in /LOG. The
// newest checkpoint of each, with its cosignature, is LOG.checkpoint.
type Server struct {
	Dir  string
	Name string // of the cosigner
	Key  ed25519.PrivateKey

	mu sync.Mutex // one request after the other: what is compared is what is replaced
}

// VerifierKey is what configures an anchor to ask for the cosignature.
func (s *Server) VerifierKey() string {
	public := s.Key.Public().(ed25519.PublicKey)
	return fmt.Sprintf("%s+%08x+%s", s.Name, cosignatureID(s.Name, public), base64.StdEncoding.EncodeToString(append([]byte{cosignatureType}, public...)))
}

// maxRequest is more than 63 hashes and a checkpoint.
const maxRequest = 16 << 10

// An addRequest is the body of add-checkpoint.
type addRequest struct {
	old    uint64
	proof  [][32]byte
	signed []byte
}

func parseRequest(body []byte) (addRequest, error) {
	head, signed, found := bytes.Cut(body, []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	size, isOld := strings.CutPrefix(lines[0], "old ")
	old, err := strconv.ParseUint(size, 10, 63)
	if !found || !isOld || err != nil || strconv.FormatUint(old, 10) != size || len(lines) > 64 {
		return addRequest{}, errors.New("the request is malformed")
	}
	r := addRequest{old: old, signed: signed}
	for _, line := range lines[1:] {
		hash, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(hash) != 32 {
			return addRequest{}, errors.New("a line of the proof is no hash")
		}
		r.proof = append(r.proof, [32]byte(hash))
	}
	return r, nil
}

// ServeHTTP answers POST /add-checkpoint.
func (s *Server) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path != "/add-checkpoint" {
		http.NotFound(w, req)
		return
	}
	if req.Method != http.MethodPost {
		http.Error(w, "only POST", http.StatusMethodNotAllowed)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxRequest))
	if err != nil {
		http.Error(w, "the request is too long, or was cut off", http.StatusBadRequest)
		return
	}
	r, err := parseRequest(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	status, contentType, answer := s.add(r)
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	w.Write(answer)
}

func (s *Server) add(r addRequest) (status int, contentType string, answer []byte) {
	const plain = "text/plain; charset=utf-8"
	refuse := func(status int, err error) (int, string, []byte) { return status, plain, []byte(err.Error() + "\n") }
	claimed, err := checkpoint.Parse(r.signed)
	if err != nil {
		return refuse(http.StatusBadRequest, err)
	}
	log := logOf(claimed.Origin)
	if len(log) != 32 || strings.Trim(log, "0123456789abcdef") != "" {
		return refuse(http.StatusNotFound, errors.New("the log is not known"))
	}
	pem, err := os.ReadFile(filepath.Join(s.Dir, log+".pem"))
	if err != nil {
		return refuse(http.StatusNotFound, errors.New("the log is not known"))
	}
	key, err := checkpoint.ParseKey(pem)
	if err != nil {
		return refuse(http.StatusInternalServerError, err)
	}
	c, err := checkpoint.Verify(r.signed, key)
	if err != nil {
		return refuse(http.StatusForbidden, err)
	}
	if r.old > c.Size {
		return refuse(http.StatusBadRequest, errors.New("the old size is above that of the checkpoint"))
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	old, err := s.latest(log, c.Origin)
	if err != nil {
		return refuse(http.StatusInternalServerError, err)
	}
	if r.old != old.Size || old.Size == c.Size && old.Root != c.Root {
		return http.StatusConflict, "text/x.tlog.size", fmt.Appendf(nil, "%d\n", old.Size)
	}
	if err := c.CheckConsistency(old, r.proof); err != nil {
		return refuse(http.StatusUnprocessableEntity, err)
	}
	line := s.cosign(c, time.Now())
	if err := replace(filepath.Join(s.Dir, log+checkpointSuffix), append(bytes.Clone(r.signed), line...)); err != nil {
		return refuse(http.StatusInternalServerError, err)
	}
	return http.StatusOK, plain, line
}

// latest is the newest checkpoint of a log, or one of no entries.
func (s *Server) latest(log, origin string) (checkpoint.Checkpoint, error) {
	signed, err := os.ReadFile(filepath.Join(s.Dir, log+checkpointSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return checkpoint.Checkpoint{Origin: origin}, nil
	}
	if err != nil {
		return checkpoint.Checkpoint{}, err
	}
	return checkpoint.Parse(signed)
}

// cosign returns the signature line of a checkpoint. What is signed are its
// three lines: those that may follow, our logs do not have.
func (s *Server) cosign(c checkpoint.Checkpoint, now time.Time) []byte {
	seconds := uint64(now.Unix())
	sig := binary.BigEndian.AppendUint32(nil, cosignatureID(s.Name, s.Key.Public().(ed25519.PublicKey)))
	sig = binary.BigEndian.AppendUint64(sig, seconds)
	sig = append(sig, ed25519.Sign(s.Key, cosignatureText(seconds, []byte(c.Text())))...)
	return fmt.Appendf(nil, "— %s %s\n", s.Name, base64.StdEncoding.EncodeToString(sig))
}

// replace puts b durably in place of a file, as a whole.
func replace(path string, b []byte) error {
	work := path + ".new"
	f, err := os.OpenFile(work, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(work, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
