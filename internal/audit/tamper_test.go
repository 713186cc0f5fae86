package audit_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A victim is a signed log in several segments, to be tampered with.
type victim struct {
	key      *testKey
	id       [16]byte
	segments []victimSegment
	newest   checkpoint.Checkpoint // as somebody has kept it elsewhere

	// good are the checkpoints that were verified already: the tests look at
	// the same ones again and again.
	good *sync.Map
}

type victimSegment struct {
	name    string
	first   uint64
	file    []byte // without the room behind the last batch
	batches []victimBatch
}

type victimBatch struct {
	from, to   int    // in the file
	first, end uint64 // entries
}

// newVictim writes a log of n entries in batches of up to batch entries.
func newVictim(t testing.TB, k *testKey, n, batch int, segment int64) *victim {
	t.Helper()
	dir := filepath.Join(fastDir(t), "audit")
	l := create(t, dir, audit.Options{SegmentSize: segment, Reserve: 64 << 10})
	signWith(t, l, k)
	v := &victim{key: k, id: l.ID(), good: new(sync.Map)}
	var last audit.Receipt
	for i := 0; i < n; {
		entries := make([]audit.Entry, 0, batch)
		for range min(i%batch+1, n-i) {
			entries = append(entries, release(i))
			i++
		}
		receipts := appendTo(t, l, entries...)
		last = receipts[len(receipts)-1]
	}
	shut(t, l)
	var err error
	if v.newest, err = checkpoint.Parse(last.Checkpoint); err != nil {
		t.Fatal(err)
	}
	names := segmentFiles(t, dir)
	for i := range names {
		// audit.log is the first segment and sorts last.
		v.segments = append(v.segments, readSegment(readFile(t, dir, names[(i+len(names)-1)%len(names)])))
		v.segments[i].name = names[(i+len(names)-1)%len(names)]
	}
	return v
}

// readSegment finds the batches in a segment, by the package's documentation.
func readSegment(b []byte) victimSegment {
	s := victimSegment{first: binary.BigEndian.Uint64(b[32:])}
	at := 64 + (int(binary.BigEndian.Uint32(b[40:]))+7)&^7
	for bytes.HasPrefix(b[at:], []byte("batch/2\n")) {
		to := at + int(frameOf(b, int64(at)))
		first := binary.BigEndian.Uint64(b[at+16:])
		s.batches = append(s.batches, victimBatch{at, to, first, first + uint64(binary.BigEndian.Uint32(b[at+12:]))})
		at = to
	}
	if bytes.HasPrefix(b[at:], []byte("batch/s\n")) {
		at += 64 + 8
	}
	s.file = b[:at]
	return s
}

func (v *victim) check(signed []byte) error {
	sum := sha256.Sum256(signed)
	if _, ok := v.good.Load(sum); ok {
		return nil
	}
	err := v.key.check(signed)
	if err == nil {
		v.good.Store(sum, nil)
	}
	return err
}

// write makes dir the log.
func (v *victim) write(t testing.TB, dir string) {
	for i := range v.segments {
		v.put(t, dir, i, v.segments[i].file)
	}
}

func (v *victim) put(t testing.TB, dir string, segment int, file []byte) {
	if err := os.WriteFile(filepath.Join(dir, v.segments[segment].name), file, 0o600); err != nil {
		t.Error(err)
	}
}

// verify checks the log in dir from a segment on, as one does who has kept the
// newest checkpoint.
func (v *victim) verify(dir string, segment int) error {
	_, err := audit.Verify(context.Background(), dir, audit.VerifyOptions{From: v.segments[segment].first, Check: v.check, Since: &v.newest})
	return err
}

// An attack is what somebody makes of the file of a segment.
type attack struct {
	name string
	file []byte
	at   uint64 // the first entry that is not what it was
	end  bool   // it takes the end of the log away, which the kept checkpoint shows
}

// attacks on a batch, and on its entries. other is a log with the same key and
// the same sizes of batches.
func (v *victim) attacks(other, forger *victim, segment, batch int, r *rand.Rand) []attack {
	s, b := &v.segments[segment], v.segments[segment].batches[batch]
	before, frame, after := s.file[:b.from], s.file[b.from:b.to], s.file[b.to:]
	theirs, theirRest := other.batch(b.first)
	last := segment == len(v.segments)-1
	newest := last && batch == len(s.batches)-1
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	inside := 64 + 8 + r.IntN(len(frame)-64-8-8)
	flipped := bytes.Clone(s.file)
	flipped[b.from+r.IntN(len(frame))] ^= byte(1 << r.IntN(8))
	attacks := []attack{
		{"a bit flipped", flipped, b.first, false},
		{"batch dropped", join(before, after), b.first, newest},
		{"batch never arrived", join(before, make([]byte, len(frame)), after), b.first, newest},
		{"batch twice", join(before, frame, frame, after), b.end, false},
		{"cut before the batch", before, b.first, last},
		{"cut in an entry", s.file[:b.from+inside], b.first, last},
		{"older copy", join(before, make([]byte, 4096)), b.first, last},
		{"batch of another log", join(before, v.reseal(theirs), after), b.first, false},
		{"rest of another log", join(before, v.reseal(theirs), theirRest), b.first, false},
		{"checkpoint of another key", join(before, v.reseal(forge(frame, forger.key)), after), b.first, false},
	}
	if batch+1 < len(s.batches) {
		next := s.batches[batch+1]
		attacks = append(attacks, attack{"batches swapped", join(before, s.file[next.from:next.to], frame, s.file[next.to:]), b.first, false})
	}
	entries, rest := split(frame)
	edit := func(name string, edited ...[]byte) {
		attacks = append(attacks, attack{name, join(before, v.reseal(rebuildFrame(frame, edited, rest)), after), b.first, false})
	}
	i := r.IntN(len(entries))
	edit("entry twice", append(append(append([][]byte{}, entries[:i]...), entries[i]), entries[i:]...)...)
	if len(entries) > 1 {
		edit("entry dropped", append(append([][]byte{}, entries[:i]...), entries[i+1:]...)...)
		j := (i + 1) % len(entries)
		swapped := append([][]byte{}, entries...)
		swapped[i], swapped[j] = swapped[j], swapped[i]
		edit("entries swapped", swapped...)
	}
	edited := append([][]byte{}, entries...)
	edited[i] = bytes.Replace(edited[i], []byte("req-0"), []byte("req-9"), 1)
	edit("entry edited", edited...)
	return attacks
}

// batch returns the batch that begins with an entry, and what follows it in its
// segment.
func (v *victim) batch(first uint64) (frame, rest []byte) {
	for _, s := range v.segments {
		for _, b := range s.batches {
			if b.first == first {
				return s.file[b.from:b.to], s.file[b.to:]
			}
		}
	}
	panic("the logs have different batches")
}

// split takes the entries, each with its length, out of a batch.
func split(frame []byte) (entries [][]byte, rest []byte) {
	payload := frame[64 : 64+binary.BigEndian.Uint32(frame[8:])]
	for range binary.BigEndian.Uint32(frame[12:]) {
		size, n := binary.Uvarint(payload)
		entries = append(entries, payload[:n+int(size)])
		payload = payload[n+int(size):]
	}
	return entries, payload
}

// rebuildFrame makes a batch of other entries, with the same root and checkpoint.
func rebuildFrame(frame []byte, entries [][]byte, rest []byte) []byte {
	payload := append(bytes.Join(entries, nil), rest...)
	b := bytes.Clone(frame[:64])
	binary.BigEndian.PutUint32(b[8:], uint32(len(payload)))
	binary.BigEndian.PutUint32(b[12:], uint32(len(entries)))
	b = append(b, payload...)
	b = append(b, make([]byte, -len(payload)&7)...)
	return append(b, "\nbatch.\n"...)
}

// forge puts a checkpoint of the same tree, but signed by k, into a batch.
func forge(frame []byte, k *testKey) []byte {
	entries, rest := split(frame)
	c, err := checkpoint.Parse(rest[:len(rest)-2])
	if err != nil {
		panic(err)
	}
	s, err := checkpoint.NewSigner(c.Origin, k.key)
	if err != nil {
		panic(err)
	}
	signed, err := c.Sign(s)
	if err != nil {
		panic(err)
	}
	return rebuildFrame(frame, entries, binary.BigEndian.AppendUint16(signed, uint16(len(signed))))
}

// reseal makes the checksums of one batch those of this log.
func (v *victim) reseal(frame []byte) []byte {
	b := bytes.Clone(frame)
	padded := (int(binary.BigEndian.Uint32(b[8:])) + 7) &^ 7
	binary.BigEndian.PutUint32(b[56:], crc32.Checksum(b[64:64+padded], castagnoli))
	binary.BigEndian.PutUint32(b[60:], crc32.Update(crc32.Checksum(v.id[:], castagnoli), castagnoli, b[:60]))
	return b
}

// judge says what is wrong with how an attack on a segment was found.
func judge(err error, a attack, segment int) string {
	var damage *audit.DamageError
	switch {
	case err == nil:
		return "it verifies"
	case errors.As(err, &damage) && (int(damage.Segment) != segment && int(damage.Segment) != segment+1 || damage.Index != a.at || damage.Path == ""):
		return fmt.Sprintf("%v, want it at entry %d", err, a.at)
	case damage == nil && !(a.end && errors.Is(err, checkpoint.ErrProof)):
		return fmt.Sprintf("%v, want a DamageError", err)
	}
	return ""
}

// Every byte of a log of 300 entries in three segments counts, and the error
// names the segment and the batch.
func TestEveryByte(t *testing.T) {
	v := newVictim(t, newTestKey(t), 300, 40, 23<<10)
	if len(v.segments) != 3 {
		t.Fatalf("%d segments, want 3", len(v.segments))
	}
	type place struct{ segment, at int }
	places := make(chan place)
	var wg sync.WaitGroup
	total := 0
	for range 64 {
		dir := fastDir(t)
		v.write(t, dir)
		wg.Go(func() {
			for p := range places {
				v.flip(t, dir, p.segment, p.at)
			}
		})
	}
	for i := range v.segments {
		for at := range v.segments[i].file {
			places <- place{i, at}
			total++
		}
	}
	close(places)
	wg.Wait()
	t.Logf("%d bytes", total)
}

// flip changes the byte at that place, and back.
func (v *victim) flip(t *testing.T, dir string, segment, at int) {
	s := &v.segments[segment]
	f, err := os.OpenFile(filepath.Join(dir, s.name), os.O_RDWR, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	set := func(c byte) {
		if _, err := f.WriteAt([]byte{c}, int64(at)); err != nil {
			t.Error(err)
		}
	}
	defer set(s.file[at])
	set(s.file[at] ^ [...]byte{0x01, 0x80, 0xff, 0x20}[at%4])

	want := audit.DamageError{Segment: uint32(segment)} // of the file's beginning
	for _, b := range s.batches {
		if at >= b.from {
			want.Offset, want.Index = int64(b.from), b.first
		}
		if at >= b.to { // of the next batch, or the seal
			want.Offset, want.Index = int64(b.to), b.end
		}
	}
	err = v.verify(dir, segment)
	var damage *audit.DamageError
	if !errors.As(err, &damage) {
		t.Errorf("segment %d, byte %d changed: Verify says %v", segment, at, err)
		return
	}
	if got := *damage; got.Segment != want.Segment || got.Offset != want.Offset || want.Offset > 0 && got.Index != want.Index {
		t.Errorf("segment %d, byte %d changed: %v, want segment %d, offset %d, entry %d", segment, at, err, want.Segment, want.Offset, want.Index)
	}
	if at%61 != 0 {
		return
	}
	if _, err := audit.Open(dir, small); !errors.As(err, &damage) {
		t.Errorf("segment %d, byte %d changed: Open says %v", segment, at, err)
	}
}

// Batches and entries are dropped, repeated, swapped, cut and put in from
// another log, and checkpoints forged, everywhere.
func TestTampered(t *testing.T) {
	k := newTestKey(t)
	v, other, forger := newVictim(t, k, 300, 16, 26<<10), newVictim(t, k, 300, 16, 26<<10), &victim{key: newTestKey(t)}
	dir := fastDir(t)
	v.write(t, dir)
	if err := v.verify(dir, 0); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	var wg sync.WaitGroup
	for i := range v.segments {
		for j := range v.segments[i].batches {
			attacks := v.attacks(other, forger, i, j, r)
			wg.Go(func() {
				dir := fastDir(t)
				v.write(t, dir)
				for _, a := range attacks {
					v.put(t, dir, i, a.file)
					if wrong := judge(v.verify(dir, i), a, i); wrong != "" {
						t.Errorf("segment %d, batch %d, %s: %s", i, j, a.name, wrong)
					}
				}
			})
		}
	}
	wg.Wait()

	put := func(i int, file []byte) func(dir string) { return func(dir string) { v.put(t, dir, i, file) } }
	remove := func(i int) func(dir string) {
		return func(dir string) {
			if err := os.Remove(filepath.Join(dir, v.segments[i].name)); err != nil {
				t.Error(err)
			}
		}
	}
	for _, tt := range []struct {
		name    string
		do      func(dir string)
		segment int // in which it is found, -1 where the kept checkpoint shows it
		at      uint64
	}{
		{"first segment removed", remove(0), -2, 0},
		{"second segment removed", remove(1), 0, v.segments[1].first},
		{"last segment removed", remove(2), 1, v.segments[2].first},
		{"two segments swapped", func(dir string) { put(1, v.segments[2].file)(dir); put(2, v.segments[1].file)(dir) }, 1, 0},
		{"segment twice", put(2, v.segments[1].file), 2, 0},
		{"first segment of another log", put(0, other.segments[0].file), -1, 0},
		{"second segment of another log", put(1, other.segments[1].file), 1, v.segments[1].first},
		{"last segment of another log", put(2, other.segments[2].file), 2, v.segments[2].first},
		{"all of another log", func(dir string) { other.write(t, dir) }, -1, 0},
		{"sealed segment appended to", put(1, append(bytes.Clone(v.segments[1].file), 0)), 1, v.segments[2].first},
		{"sealed segment with a batch behind", put(1, append(bytes.Clone(v.segments[1].file), frameOfNext(v, 1)...)), 1, v.segments[2].first},
		{"segment from the future", func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "audit-00000007.log"), v.segments[2].file, 0o600); err != nil {
				t.Error(err)
			}
		}, 2, 300},
	} {
		dir := fastDir(t)
		v.write(t, dir)
		tt.do(dir)
		err := v.verify(dir, 0)
		var damage *audit.DamageError
		switch {
		case tt.segment == -2 && errors.Is(err, os.ErrNotExist):
		case tt.segment == -1 && errors.Is(err, checkpoint.ErrProof):
		case tt.segment >= 0 && errors.As(err, &damage) && int(damage.Segment) == tt.segment && damage.Index == tt.at:
		default:
			t.Errorf("%s: %v, want it in segment %d at entry %d", tt.name, err, tt.segment, tt.at)
		}
		if l, err := audit.Open(dir, small); err == nil {
			l.Close()
			if tt.name != "all of another log" {
				t.Errorf("%s: Open takes it", tt.name)
			}
		}
	}
}

// frameOfNext is the first batch of the segment behind.
func frameOfNext(v *victim, segment int) []byte {
	b := v.segments[segment+1].batches[0]
	return v.segments[segment+1].file[b.from:b.to]
}

// A log is cut, or stops to arrive, at every byte of its last batch, which is
// the only one of a new segment; the acknowledged entries are kept.
func TestTornFirstBatch(t *testing.T) {
	k := newTestKey(t)
	dir := filepath.Join(fastDir(t), "audit")
	l := create(t, dir, small)
	signWith(t, l, k)
	n := 0
	for l.Stats().Segments < 3 {
		appendTo(t, l, release(n), release(n+1))
		n += 2
	}
	shut(t, l)
	whole := uint64(n - 2)
	last := readSegment(readFile(t, dir, "audit-00000002.log"))
	if len(last.batches) != 1 || last.first != whole {
		t.Fatalf("the last segment has %d batches from entry %d", len(last.batches), last.first)
	}
	b := last.batches[0]
	cuts := make(chan int)
	var wg sync.WaitGroup
	for range 8 {
		dir2 := filepath.Join(fastDir(t), "audit")
		copyLog(t, dir, dir2)
		wg.Go(func() {
			for cut := range cuts {
				checkTornFirst(t, dir2, k, last.file, cut, whole, cut == b.to)
			}
		})
	}
	for cut := b.from; cut <= b.to; cut++ {
		cuts <- cut
	}
	close(cuts)
	wg.Wait()
}

// checkTornFirst makes what was there of file, up to cut, the last segment of the
// log in dir, which has whole entries before it.
func checkTornFirst(t *testing.T, dir string, k *testKey, file []byte, cut int, whole uint64, complete bool) {
	want := whole
	if complete {
		want += 2
	}
	path := filepath.Join(dir, "audit-00000002.log")
	zeroed := append(bytes.Clone(file[:cut]), make([]byte, len(file)-cut+1000)...)
	for _, b := range [][]byte{zeroed, file[:cut]} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Error(err)
			return
		}
		if r, err := verifySigned(dir, k); err != nil || r.Entries != want {
			t.Errorf("cut at %d: report = %+v, %v, want %d entries", cut, r, err, want)
		}
	}
	l, err := audit.Open(dir, small)
	if err != nil || l.Size() != want {
		t.Errorf("cut at %d: %v, want %d entries", cut, err, want)
		return
	}
	defer l.Close()
	if cut%8 != 0 {
		return
	}
	if err := l.SignWith(k.signer(t, l.ID())); err != nil {
		t.Error(err)
	}
	receipts, err := l.Append(context.Background(), []audit.Entry{release(1)})
	if err != nil || receipts[0].Index != want {
		t.Errorf("cut at %d: next entry is %+v, %v, want index %d", cut, receipts, err, want)
	}
	if r, err := verifySigned(dir, k); err != nil || r.Entries != want+1 || r.Torn != 0 {
		t.Errorf("cut at %d: report = %+v, %v", cut, r, err)
	}
}

// A rotation is cut off at every byte of the seal, while the new segment is
// empty: the next start ends it. With a batch in the new segment it is damage.
func TestTornSeal(t *testing.T) {
	const seal = 72
	v := newVictim(t, newTestKey(t), 60, 5, 4<<10)
	n := len(v.segments)
	before, last := &v.segments[n-2], &v.segments[n-1]
	empty := last.file[:last.batches[0].from]
	dir := fastDir(t)
	v.write(t, dir)
	for cut := range seal + 1 {
		whole := before.file[:len(before.file)-seal+cut]
		for _, file := range [][]byte{whole, append(bytes.Clone(whole), make([]byte, 4096)...)} {
			v.put(t, dir, n-2, file)
			v.put(t, dir, n-1, last.file)
			var damage *audit.DamageError
			if len(file) != len(before.file) || cut < seal { // else it is what it was
				if _, err := audit.Open(dir, small); !errors.As(err, &damage) || int(damage.Segment) != n-2 || damage.Index != last.first {
					t.Errorf("cut at %d, with a batch behind: error = %v, want damage at the seal", cut, err)
				}
			}
			v.put(t, dir, n-1, empty)
			r, err := verifySigned(dir, v.key)
			if err != nil || r.Entries != last.first || r.Torn != 0 {
				t.Errorf("cut at %d: report = %+v, %v, want %d entries", cut, r, err, last.first)
			}
			l := open(t, dir, small)
			signWith(t, l, v.key)
			if got := appendTo(t, l, release(0))[0].Index; got != last.first {
				t.Errorf("cut at %d: index = %d, want %d", cut, got, last.first)
			}
			shut(t, l)
			if got := readFile(t, dir, before.name); !bytes.Equal(got, before.file) {
				t.Errorf("cut at %d: the segment before is not what it was", cut)
			}
		}
	}
}

// 1,000 random places of a log of 100,000 entries in some 30 segments, each with
// every attack.
func TestLongTampered(t *testing.T) {
	if os.Getenv("CUSTODIAN_LONG") == "" {
		t.Skip("takes minutes; CUSTODIAN_LONG=1 runs it")
	}
	start := time.Now()
	k := newTestKey(t)
	const n, batch, segment = 100_000, 64, 1 << 20
	v, other, forger := newVictim(t, k, n, batch, segment), newVictim(t, k, n, batch, segment), &victim{key: newTestKey(t)}
	all := fastDir(t)
	v.write(t, all)
	if err := v.verify(all, 0); err != nil {
		t.Fatal(err)
	}
	type job struct {
		segment, batch int
		attacks        []attack
	}
	jobs := make(chan job)
	var done sync.WaitGroup
	var mu sync.Mutex
	counts := map[string]int{}
	for range 8 {
		dir := fastDir(t)
		v.write(t, dir)
		done.Go(func() {
			for j := range jobs {
				for _, a := range j.attacks {
					v.put(t, dir, j.segment, a.file)
					if wrong := judge(v.verify(dir, j.segment), a, j.segment); wrong != "" {
						t.Errorf("segment %d, batch %d, %s: %s", j.segment, j.batch, a.name, wrong)
					}
					mu.Lock()
					counts[a.name]++
					mu.Unlock()
				}
				v.put(t, dir, j.segment, v.segments[j.segment].file)
			}
		})
	}
	r := rand.New(rand.NewPCG(3, uint64(time.Now().UnixNano())))
	for range 1000 {
		i := r.IntN(len(v.segments))
		j := r.IntN(len(v.segments[i].batches))
		jobs <- job{i, j, v.attacks(other, forger, i, j, r)}
	}
	close(jobs)
	done.Wait()
	t.Logf("%d segments, attacks that were found: %v, in %s", len(v.segments), counts, time.Since(start).Round(time.Second))
}
