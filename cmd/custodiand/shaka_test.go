package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/client"
	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/packager"
)

// A shaka is the real Shaka Packager, unmodified, in front of a daemon, with the
// development certificate of the role packager.
type shaka struct {
	*custody
	program  string
	dir      string // of the media
	url      string // of the category movies
	provider *client.Client
	aes, rsa []string // flags that sign
}

// needShaka is the program, or the test is skipped.
func needShaka(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("ffmpeg"); err != nil {
		t.Skip("no ffmpeg: scripts/setup.sh media installs it")
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join("..", "..", "scripts", "setup.sh"), "--shaka").Output()
	if err != nil {
		t.Fatal(err)
	}
	program := strings.TrimSpace(string(out))
	if _, err := os.Stat(program); err != nil {
		t.Skip("no Shaka Packager: scripts/setup.sh shaka installs it")
	}
	return program
}

var packagersLine = regexp.MustCompile(`msg="listening for packagers" packagers=\S+:(\d+)`)

// newShaka starts a daemon of c, which is initialised here, with a packager
// listener and the two signers aes and rsa. signed says that the packager must
// sign.
func newShaka(t testing.TB, c *custody, signed bool) *shaka {
	t.Helper()
	s := &shaka{custody: c, program: needShaka(t), dir: t.TempDir()}
	signers := "[]"
	if signed {
		signers = s.makeSigners()
	}
	c.edit("packagers:\n    listen: \"\"\n    signers: []", "packagers:\n    listen: 127.0.0.1:0\n    signers: "+signers, "callback_deadline: 0s", "callback_deadline: 5s")
	c.mustRun("init", "-config", c.dev.configFile())
	c.mustStart()
	s.findDoor()
	if _, err := c.dial(custodian.RoleOfficer).CreateCategory(t.Context(), &v1.CreateCategoryRequest{Name: "movies"}); err != nil {
		t.Fatal(err)
	}
	s.provider = c.dial(custodian.RoleProvider)
	return s
}

// findDoor takes the address of the listener from the daemon's log.
func (s *shaka) findDoor() {
	s.t.Helper()
	m := packagersLine.FindAllStringSubmatch(s.logText(), -1)
	if m == nil {
		s.t.Fatalf("the daemon does not say where packagers knock:\n%s", s.logText())
	}
	s.url = "https://localhost:" + m[len(m)-1][1] + "/v1/categories/movies/widevine"
}

// makeSigners makes keys for the two kinds of signatures.
func (s *shaka) makeSigners() string {
	t := s.t
	t.Helper()
	write := func(name string, b []byte) string {
		path := filepath.Join(s.dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var key [32]byte
	var iv [16]byte
	rand.Read(key[:])
	rand.Read(iv[:])
	aes := write("signer.aes", fmt.Appendf(nil, "%x\n%x\n", key, iv))
	s.aes = []string{"--signer", "aes", "--aes_signing_key", hex.EncodeToString(key[:]), "--aes_signing_iv", hex.EncodeToString(iv[:])}
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	file := write("signer.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
	s.rsa = []string{"--signer", "rsa", "--rsa_signing_key_path", write("signer.der", x509.MarshalPKCS1PrivateKey(private))}
	who := "spiffe://" + devTrustDomain + "/packager"
	return fmt.Sprintf("[{name: aes, identities: ['%s'], aes_file: '%s'}, {name: rsa, identities: ['%s'], rsa_public_key_file: '%s'}]", who, aes, who, file)
}

// ffmpeg runs it in the folder of the media and returns its output.
func (s *shaka) ffmpeg(args ...string) []byte {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), "ffmpeg", append([]string{"-nostdin", "-hide_banner", "-loglevel", "error", "-y"}, args...)...)
	cmd.Dir = s.dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("ffmpeg %v: %v\n%s", args, err, stderr.String())
	}
	return out
}

// frames are the hashes of the decoded frames of a file; with a key, of the
// decrypted file.
func (s *shaka) frames(file string, key []byte) []string {
	s.t.Helper()
	var args []string
	if key != nil {
		args = []string{"-decryption_key", hex.EncodeToString(key)}
	}
	var hashes []string
	for line := range strings.Lines(string(s.ffmpeg(append(args, "-i", file, "-map", "0", "-f", "framemd5", "-")...))) {
		if !strings.HasPrefix(line, "#") {
			hashes = append(hashes, strings.TrimSpace(line[strings.LastIndex(line, ",")+1:]))
		}
	}
	if len(hashes) == 0 {
		s.t.Fatalf("%s has no frames", file)
	}
	return hashes
}

// encrypts are the flags of a run that gets its keys from the daemon.
func (s *shaka) encrypts(content string, scheme custodian.Scheme, signer ...string) []string {
	pki := filepath.Join(s.dev.dir, "pki")
	return append([]string{"--enable_widevine_encryption", "--key_server_url", s.url, "--content_id", hex.EncodeToString([]byte(content)),
		"--protection_scheme", string(scheme), "--protection_systems", "Widevine,PlayReady,FairPlay,CommonSystem", "--clear_lead", "0",
		"--ca_file", filepath.Join(pki, "ca.pem"), "--client_cert_file", filepath.Join(pki, "packager.pem"), "--client_cert_private_key_file", filepath.Join(pki, "packager.key")}, signer...)
}

// pack runs the packager and returns what it says, and its exit code.
func (s *shaka) pack(args ...string) (string, int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 8*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.program, args...)
	cmd.Dir = s.dir
	out, err := cmd.CombinedOutput()
	exit, failed := errors.AsType[*exec.ExitError](err)
	if err != nil && !failed {
		s.t.Fatalf("packager: %v\n%s", err, out)
	}
	if failed {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

func (s *shaka) mustPack(args ...string) {
	s.t.Helper()
	if out, code := s.pack(args...); code != 0 {
		s.t.Fatalf("packager %v: exit %d\n%s\n%s", args, code, out, s.logText())
	}
}

// keys asks for keys as the provider.
func (s *shaka) keys(kids ...[]byte) []*v1.ContentKey {
	s.t.Helper()
	res, err := s.provider.GetContentKeys(s.t.Context(), &v1.GetContentKeysRequest{Kids: kids})
	if err != nil {
		s.t.Fatalf("get keys %x: %v", kids, err)
	}
	var keys []*v1.ContentKey
	for _, r := range res.Results {
		if r.GetKey() == nil {
			s.t.Fatalf("get key: %v", r.GetError())
		}
		keys = append(keys, r.GetKey())
	}
	return keys
}

func (s *shaka) read(file string) []byte {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, file))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// boxKID is the KID that lies so many bytes behind the type of the first box of
// that type.
func boxKID(t testing.TB, b []byte, box string, behind int) []byte {
	t.Helper()
	_, after, ok := bytes.Cut(b, []byte(box))
	if !ok || len(after) < behind+16 {
		t.Fatalf("there is no whole box %s", box)
	}
	return after[behind : behind+16]
}

// withIV gives the header of a file whose keys rotate the constant IV of one
// period, if there is one: ffmpeg 5 looks for it only there.
func withIV(t testing.TB, init, iv []byte) []byte {
	t.Helper()
	if len(iv) == 0 {
		return init
	}
	// Behind the KID of tenc, Shaka Packager writes 8 zeros and their number.
	at := bytes.Index(init, []byte("tenc")) + 4 + 8 + 16
	if at < 28 || init[at] != 8 {
		t.Fatal("the box tenc is not as it was")
	}
	for _, box := range []string{"moov", "trak", "mdia", "minf", "stbl", "stsd", "encv", "sinf", "schi", "tenc"} {
		size := init[bytes.Index(init, []byte(box))-4:]
		binary.BigEndian.PutUint32(size, binary.BigEndian.Uint32(size)+8)
	}
	return slices.Concat(init[:at], []byte{16}, iv, init[at+1+8:])
}

// counted is the sum of a metric over all its labels.
func (s *shaka) counted(metric string) (sum float64) {
	s.t.Helper()
	res, err := http.Get("http://" + s.admin + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && strings.HasPrefix(name, metric) {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				s.t.Fatal(err)
			}
			sum += v
		}
	}
	return sum
}

// TestShaka: three renditions and sound, encrypted by the real packager with
// keys of the daemon, under both schemes and both kinds of signatures, and for
// all DRM systems. With the provider's keys every frame is as it was.
func TestShaka(t *testing.T) {
	needShaka(t)
	s := newShaka(t, provision(t), true)
	s.ffmpeg("-f", "lavfi", "-i", "testsrc2=size=2560x1440:rate=10:duration=2", "-f", "lavfi", "-i", "sine=frequency=440:sample_rate=48000:duration=2",
		"-filter_complex", "[0:v]split=3[a][b][c];[a]scale=640:360[sd];[b]scale=1280:720[hd]",
		"-map", "[sd]", "-c:v", "libx264", "-preset", "ultrafast", "-g", "10", "-pix_fmt", "yuv420p", "SD.mp4",
		"-map", "[hd]", "-c:v", "libx264", "-preset", "ultrafast", "-g", "10", "-pix_fmt", "yuv420p", "HD.mp4",
		"-map", "[c]", "-c:v", "libx264", "-preset", "ultrafast", "-g", "10", "-pix_fmt", "yuv420p", "UHD1.mp4",
		"-map", "1:a", "-c:a", "aac", "AUDIO.mp4")
	labels := []string{"SD", "HD", "UHD1", "AUDIO"}
	streams := func(prefix string) (d []string) {
		for _, l := range labels {
			kind := "video"
			if l == "AUDIO" {
				kind = "audio"
			}
			d = append(d, fmt.Sprintf("in=%s.mp4,stream=%s,output=%s%s.mp4", l, kind, prefix, l))
		}
		return d
	}
	// Sound is compared with what the packager makes of it in clear: it leaves
	// the edit list out, which the decoder would heed.
	s.mustPack(streams("clear-")...)
	clear := map[string][]string{"AUDIO": s.frames("clear-AUDIO.mp4", nil)}
	for _, l := range labels[:3] {
		clear[l] = s.frames(l+".mp4", nil)
	}
	for _, test := range []struct {
		scheme custodian.Scheme
		signer string
		flags  []string
	}{
		{custodian.SchemeCENC, "aes", s.aes}, {custodian.SchemeCENC, "rsa", s.rsa}, {custodian.SchemeCBCS, "aes", s.aes}, {custodian.SchemeCBCS, "rsa", s.rsa},
	} {
		t.Run(string(test.scheme)+" "+test.signer, func(t *testing.T) {
			prefix := string(test.scheme) + "-" + test.signer + "-"
			content := "film " + test.signer
			s.mustPack(slices.Concat(streams(prefix), s.encrypts(content, test.scheme, test.flags...),
				[]string{"--mpd_output", prefix + "all.mpd", "--hls_master_playlist_output", prefix + "all.m3u8", "--create_session_keys"})...)
			var kids [][]byte
			for _, l := range labels {
				kids = append(kids, boxKID(t, s.read(prefix+l+".mp4"), "tenc", 8))
			}
			mpd, hls := string(s.read(prefix+"all.mpd")), string(s.read(prefix+"all.m3u8"))
			for i, key := range s.keys(kids...) {
				l := labels[i]
				if key.TrackType != l || key.Scheme != string(test.scheme) || string(key.ContentId) != content {
					t.Errorf("%s: the key is of %s, %s, %q", l, key.TrackType, key.Scheme, key.ContentId)
				}
				if got := s.frames(prefix+l+".mp4", key.GetKey()); !slices.Equal(got, clear[l]) {
					t.Errorf("%s: %d decrypted frames are not the %d clear ones", l, len(got), len(clear[l]))
				}
				if test.scheme == custodian.SchemeCBCS && !bytes.Contains(s.read(prefix+l+".mp4"), append([]byte{16}, key.Iv...)) {
					t.Errorf("%s: the file does not have the IV that the provider gets", l)
				}
				// The packager and this package make the same PlayReady header of
				// the key, with its checksum.
				kid := custodian.KID(key.Kid)
				sum, err := packager.PlayReadyChecksum(kid, key.GetKey())
				if err != nil {
					t.Fatal(err)
				}
				object, err := packager.PlayReadyObject(test.scheme, kid, sum)
				if err != nil {
					t.Fatal(err)
				}
				for system, box := range map[string][]byte{"PlayReady": packager.PlayReadyPSSH(object),
					"Widevine": packager.WidevinePSSH(packager.WidevineData{KIDs: []custodian.KID{kid}, ContentID: []byte(content), Scheme: test.scheme})} {
					if !strings.Contains(mpd, base64.StdEncoding.EncodeToString(box)) {
						t.Errorf("%s: the manifest does not have the %s box of the key", l, system)
					}
				}
			}
			if test.scheme == custodian.SchemeCBCS && !strings.Contains(hls, "com.apple.streamingkeydelivery") {
				t.Errorf("the playlist has no FairPlay:\n%s", hls)
			}
		})
	}
	for _, scheme := range []custodian.Scheme{custodian.SchemeCENS, custodian.SchemeCBC1} { // which HLS does not have
		t.Run(string(scheme), func(t *testing.T) {
			out := string(scheme) + "-SD.mp4"
			s.mustPack(append(s.encrypts("film", scheme, s.aes...), "in=SD.mp4,stream=video,output="+out)...)
			key := s.keys(boxKID(t, s.read(out), "tenc", 8))[0]
			if key.Scheme != string(scheme) || len(key.Iv) != 0 || !slices.Equal(s.frames(out, key.GetKey()), clear["SD"]) {
				t.Errorf("the decrypted frames are not the clear ones, or the key is of %s with an IV of %d bytes", key.Scheme, len(key.Iv))
			}
		})
	}
	wrong := bytes.Repeat([]byte{1}, 16)
	cmd := exec.CommandContext(t.Context(), "ffmpeg", "-nostdin", "-loglevel", "quiet", "-decryption_key", hex.EncodeToString(wrong), "-i", "cenc-aes-SD.mp4", "-map", "0", "-f", "framemd5", "-")
	cmd.Dir = s.dir
	out, _ := cmd.Output() // it may well fail
	if frame := clear["SD"][0]; bytes.Contains(out, []byte(frame)) {
		t.Error("a wrong key gives a frame as it was")
	}
}

// TestShakaRotation: a run of 22 crypto periods. The burst of 555 keys at its
// start is answered in one piece, and each segment is under the key of its
// period.
func TestShakaRotation(t *testing.T) {
	needShaka(t)
	s := newShaka(t, provision(t), true)
	const periods = 22
	s.ffmpeg("-f", "lavfi", "-i", "testsrc2=size=320x180:rate=5:duration="+strconv.Itoa(periods), "-c:v", "libx264", "-preset", "ultrafast", "-g", "5", "-sc_threshold", "0", "-bf", "0",
		"-pix_fmt", "yuv420p", "live.mp4")
	clear := s.frames("live.mp4", nil)
	for _, scheme := range []custodian.Scheme{custodian.SchemeCENC, custodian.SchemeCBCS} {
		t.Run(string(scheme), func(t *testing.T) {
			before := s.counted("custodian_keys_issued_total")
			prefix := string(scheme) + "-"
			// The film comes at ten times its speed: the packager asks for keys of
			// the future only while it runs.
			fifo := prefix + "live.fifo"
			if err := syscall.Mkfifo(filepath.Join(s.dir, fifo), 0o600); err != nil {
				t.Fatal(err)
			}
			played := make(chan struct{})
			go func() {
				defer close(played)
				s.ffmpeg("-readrate", "10", "-i", "live.mp4", "-c", "copy", "-f", "mp4", "-movflags", "frag_keyframe+empty_moov+default_base_moof", fifo)
			}()
			s.mustPack(append(s.encrypts("channel", scheme, s.aes...), "--crypto_period_duration", "1", "--segment_duration", "1", "--generate_static_live_mpd",
				"--mpd_output", prefix+"live.mpd", "in="+fifo+",stream=video,init_segment="+prefix+"init.mp4,segment_template="+prefix+"$Number$.m4s")...)
			<-played
			if got := s.counted("custodian_keys_issued_total") - before; got < 555 {
				t.Errorf("%v keys were issued, want the burst of 555 at least", got)
			}
			if n := s.counted(`custodian_calls_total{method="widevine",reason="OK"}`); n != s.counted(`custodian_calls_total{method="widevine"`) {
				t.Errorf("only %v calls were answered", n)
			}
			kids := map[string]bool{}
			for i := range periods {
				segment := s.read(fmt.Sprintf("%s%d.m4s", prefix, i+1))
				// sgpd: version and flags, the type seig, length and count of the
				// entries; of the entry 4 bytes before the KID.
				kid := boxKID(t, segment, "sgpd", 4+4+4+4+4)
				kids[string(kid)] = true
				key := s.keys(kid)[0]
				if p := key.GetPeriod(); p.GetIndex() != uint32(i) || p.GetStartTime().AsTime().Unix() != int64(i) || p.GetEndTime().AsTime().Unix() != int64(i+1) {
					t.Errorf("segment %d: the key is of %v", i, key.GetPeriod())
				}
				whole := append(withIV(t, s.read(prefix+"init.mp4"), key.Iv), segment...)
				if err := os.WriteFile(filepath.Join(s.dir, "one.mp4"), whole, 0o600); err != nil {
					t.Fatal(err)
				}
				if got, want := s.frames("one.mp4", key.GetKey()), clear[5*i:5*i+5]; !slices.Equal(got, want) {
					t.Errorf("segment %d: the frames are not those of the clear film", i)
				}
				data := packager.WidevineData{KIDs: []custodian.KID{custodian.KID(kid)}, ContentID: []byte("channel"), Scheme: scheme,
					Period: custodian.Period{Set: true, Index: uint32(i)}, PeriodSeconds: 1}
				if !bytes.Contains(segment, packager.WidevinePSSH(data)) {
					t.Errorf("segment %d: it has not the Widevine box of its period", i)
				}
			}
			if len(kids) != periods {
				t.Errorf("%d periods have %d KIDs", periods, len(kids))
			}
		})
	}
}

// A clip is one second of film, as a stream descriptor of the packager.
func (s *shaka) clip() string {
	s.t.Helper()
	s.ffmpeg("-f", "lavfi", "-i", "testsrc2=size=320x180:rate=5:duration=1", "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "clip.mp4")
	return "in=clip.mp4,stream=video,output=out.mp4"
}

// TestShakaRefused: what the packager says, and that it writes nothing, where it
// is not let in.
func TestShakaRefused(t *testing.T) {
	needShaka(t)
	s := newShaka(t, provision(t), true)
	clip := s.clip()
	pki := filepath.Join(s.dev.dir, "pki")
	good := s.encrypts("film", custodian.SchemeCENC, s.aes...)
	with := func(pairs ...string) []string {
		args := slices.Clone(good)
		for i := 0; i < len(pairs); i += 2 {
			at := slices.Index(args, pairs[i])
			if at < 0 {
				t.Fatalf("there is no flag %s", pairs[i])
			}
			args[at+1] = pairs[i+1]
		}
		return args
	}
	foreign, err := certs.OpenAuthority(filepath.Join(t.TempDir(), "pki"), devTrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	rogue, err := foreign.IssueClient("/packager", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	status := func(name string) string {
		return strings.TrimRight(base64.StdEncoding.EncodeToString([]byte(`{"status":"`+name+`"`)), "=")[:20]
	}
	for _, test := range []struct {
		name string
		args []string
		want string // in what the packager says
	}{
		{"unknown signer", with("--signer", "nobody"), status("SIGNATURE_FAILED")},
		{"another key", with("--aes_signing_key", strings.Repeat("ab", 32)), status("SIGNATURE_FAILED")},
		{"no grant", with("--client_cert_file", filepath.Join(pki, "auditor.pem"), "--client_cert_private_key_file", filepath.Join(pki, "auditor.key"))[:len(good)-len(s.aes)], status("ACCESS_DENIED")},
		{"a certificate of another CA", with("--client_cert_file", rogue.CertFile, "--client_cert_private_key_file", rogue.KeyFile), "SSL connect error"},
		{"unknown category", with("--key_server_url", strings.Replace(s.url, "movies", "series", 1)), "response code: 404"},
	} {
		t.Run(test.name, func(t *testing.T) {
			os.Remove(filepath.Join(s.dir, "out.mp4"))
			out, code := s.pack(append(test.args, clip)...)
			if code != 1 || !strings.Contains(out, test.want) {
				t.Errorf("exit %d, want 1 and %q:\n%s", code, test.want, out)
			}
			if b, err := os.ReadFile(filepath.Join(s.dir, "out.mp4")); err == nil && len(b) > 0 {
				t.Errorf("a file of %d bytes was written", len(b))
			}
		})
	}
	for _, want := range []string{`"signature refused"`, `"connection refused"`, "is not configured"} {
		s.wantLog(want)
	}
	s.mustPack(append(good, clip)...)
}

// TestShakaAgain: packagers that run side by side get the same keys, and so does
// one that comes after the daemon was killed and started again.
func TestShakaAgain(t *testing.T) {
	needShaka(t)
	s := newShaka(t, provision(t), false)
	clip := s.clip()
	var packagers sync.WaitGroup
	for i := range 4 {
		packagers.Go(func() {
			if out, code := s.pack(append(s.encrypts("film", custodian.SchemeCBCS), strings.Replace(clip, "out.mp4", strconv.Itoa(i)+".mp4", 1))...); code != 0 {
				t.Errorf("exit %d:\n%s", code, out)
			}
		})
	}
	packagers.Wait()
	s.kill()
	s.mustStart()
	s.findDoor()
	s.mustPack(append(s.encrypts("film", custodian.SchemeCBCS), clip)...)
	want := s.read("out.mp4")
	for i := range 4 {
		got := s.read(strconv.Itoa(i) + ".mp4")
		if !bytes.Equal(boxKID(t, got, "tenc", 8), boxKID(t, want, "tenc", 8)) || !bytes.Equal(got[bytes.Index(got, []byte("mdat")):], want[bytes.Index(want, []byte("mdat")):]) {
			t.Errorf("packager %d: another KID, or the film is encrypted in another way", i)
		}
	}
}

// TestShakaPlayReady: by the PlayReady packaging server, with one key for the
// whole program.
func TestShakaPlayReady(t *testing.T) {
	needShaka(t)
	s := newShaka(t, provision(t), false)
	clip := s.clip()
	pki := filepath.Join(s.dev.dir, "pki")
	s.mustPack(clip, "--enable_playready_encryption", "--playready_server_url", strings.Replace(s.url, "/widevine", "/playready", 1), "--program_identifier", "asset-42",
		"--clear_lead", "0", "--mpd_output", "out.mpd",
		"--ca_file", filepath.Join(pki, "ca.pem"), "--client_cert_file", filepath.Join(pki, "packager.pem"), "--client_cert_private_key_file", filepath.Join(pki, "packager.key"))
	key := s.keys(boxKID(t, s.read("out.mp4"), "tenc", 8))[0]
	if key.TrackType != "ALL" || key.Scheme != "cenc" || string(key.ContentId) != "asset-42" {
		t.Errorf("the key is of %s, %s, %q", key.TrackType, key.Scheme, key.ContentId)
	}
	if got, want := s.frames("out.mp4", key.GetKey()), s.frames("clip.mp4", nil); !slices.Equal(got, want) {
		t.Error("the decrypted frames are not the clear ones")
	}
	sum, err := packager.PlayReadyChecksum(custodian.KID(key.Kid), key.GetKey())
	if err != nil {
		t.Fatal(err)
	}
	object, err := packager.PlayReadyObject(custodian.SchemeCENC, custodian.KID(key.Kid), sum)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(s.read("out.mpd")), base64.StdEncoding.EncodeToString(packager.PlayReadyPSSH(object))) {
		t.Error("the manifest does not have the PlayReady box of the key")
	}
}

// TestShakaTokenAway: the token fails while the packager asks. It is back before
// the packager's patience ends, and the packager has noticed nothing.
func TestShakaTokenAway(t *testing.T) {
	t.Parallel() // it waits, and takes little of the CPUs
	needShaka(t)
	c, f := provisionWithFaults(t)
	s := newShaka(t, c, false)
	clip := s.clip()
	s.mustPack(append(s.encrypts("before", custodian.SchemeCENC), clip)...)
	f.Fail("C_GenerateRandom", ckrDeviceError, 1<<30)
	began := time.Now()
	back := time.AfterFunc(5*time.Second, f.Reset)
	defer back.Stop()
	out, code := s.pack(append(s.encrypts("meanwhile", custodian.SchemeCENC), clip)...)
	if code != 0 {
		t.Fatalf("exit %d:\n%s\n%s", code, out, s.logText())
	}
	if took := time.Since(began); took < 5*time.Second {
		t.Errorf("it took %s: the token was not away", took)
	}
	kid := boxKID(t, s.read("out.mp4"), "tenc", 8)
	if got, want := s.frames("out.mp4", s.keys(kid)[0].GetKey()), s.frames("clip.mp4", nil); !slices.Equal(got, want) {
		t.Error("the decrypted frames are not the clear ones")
	}
}

// TestLongShakaTokenAway: the token is away for two minutes. A packager that
// starts meanwhile ends before a minute is over, with a reason; one that rotates
// its keys goes on asking, and finishes when the token is back.
func TestLongShakaTokenAway(t *testing.T) {
	if os.Getenv("CUSTODIAN_LONG") == "" {
		t.Skip("two minutes: make long runs it")
	}
	needShaka(t)
	c, f := provisionWithFaults(t)
	s := newShaka(t, c, false)
	clip := s.clip()
	s.mustPack(append(s.encrypts("channel", custodian.SchemeCENC), clip)...)
	f.Fail("C_GenerateRandom", ckrDeviceError, 1<<30)
	away := time.Now()
	back := time.AfterFunc(2*time.Minute, f.Reset)
	defer back.Stop()
	live := make(chan string)
	go func() {
		out, code := s.pack(append(s.encrypts("channel", custodian.SchemeCENC), "--crypto_period_duration", "1", "--segment_duration", "1",
			"in=clip.mp4,stream=video,init_segment=init.mp4,segment_template=$Number$.m4s")...)
		if code == 0 {
			out = ""
		}
		live <- out
	}()
	// The keys that it starts with exist. It has them before the other packager
	// makes the daemon find out that its token is away.
	time.Sleep(5 * time.Second)
	began := time.Now()
	out, code := s.pack(append(s.encrypts("new", custodian.SchemeCENC), clip)...)
	if took := time.Since(began); code != 1 || !strings.Contains(out, "response code: 503") || took < 50*time.Second || took > time.Minute {
		t.Errorf("exit %d after %s, want 1 with a 503 after 55 s:\n%s", code, took, out)
	}
	if out := <-live; out != "" {
		t.Errorf("the packager that rotates its keys ended with an error:\n%s", out)
	}
	if took := time.Since(away); took < 2*time.Minute {
		t.Errorf("it ended after %s: the token was not away for it", took)
	}
}
