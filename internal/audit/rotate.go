package audit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"
)

// A sealedSegment is one that is not written any more.
type sealedSegment struct {
	number     uint32
	first, end uint64    // index of its first entry, and of the next segment's
	root       tlog.Hash // after it
	size       int64     // of the file
	state      fileState
	pruned     bool
}

func (s *sealedSegment) stat(f *os.File) error {
	err := s.state.read(f)
	s.size = s.state.size
	return err
}

// A fileState tells whether a file is still the one that it was.
type fileState struct {
	dev, ino uint64
	size     int64
	changed  unix.Timespec // its mtime
}

func (s *fileState) set(st *unix.Stat_t) {
	*s = fileState{uint64(st.Dev), st.Ino, st.Size, st.Mtim}
}

func (s *fileState) read(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	s.set(&st)
	return nil
}

// rotate begins a new segment where a batch of need bytes does not fit in this
// one. Where that is not possible the log goes on in this one, and tries again
// within a second: what cannot be had is room, and no entry is in danger. Only
// where it is not known what is on disk is the log blocked.
//
// The order makes a crash at any point harmless: the new segment is on disk
// before the old one is sealed, and the old one is sealed and cut to its length
// before a batch is written to the new one.
func (l *Log) rotate(need int64) {
	full := l.end+need+sealSize > l.size && l.tree.size > l.segment.first
	if !full || l.latched != nil || l.cannot != nil || l.full != nil {
		return
	}
	h := segmentHead{id: l.id, number: l.segment.number + 1, first: l.tree.size, edge: l.tree.edge, signed: l.signed}
	start := h.encode()
	h.body = int64(len(start))
	h.edge = nil // add changes it
	room := h.body + l.reserve + growth
	if l.cannot = l.allowed(room - (l.alloc - l.end - sealSize)); l.cannot != nil {
		return
	}
	path := filepath.Join(l.dir, segmentName(h.number))
	f, err := writeNew(path, start, room, l.wrap)
	if err != nil {
		l.cannot = errors.Join(err, removeIfThere(path+".new"))
		l.log.Warn("audit log: a new segment cannot be begun; the old one goes on", "segment", h.number, "error", l.cannot)
		return
	}
	if err := l.turn(path, f, h, room); err != nil {
		f.Close()
		l.latch(fmt.Errorf("begin segment %d: %w", h.number, err))
	}
}

// turn makes the file, which is complete but for its name, the one to write to.
func (l *Log) turn(path string, f *os.File, h segmentHead, room int64) error {
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	if err := syncDir(l.dir); err != nil {
		return err
	}
	old, err := sealSegment(l.os, l.file, l.end, l.id, l.segment, l.tree.size, l.tree.root())
	if err != nil {
		return err
	}
	l.os.Close() // whatever it says, the file is synced
	l.before = append(l.before, old)
	l.bytes += old.size
	l.path, l.os, l.file, l.segment = path, f, l.wrap(f), h
	l.end, l.alloc = h.body, room
	return l.seen.read(f)
}

// sealSegment ends the segment in a file, whose last batch ends at end.
func sealSegment(f *os.File, file File, end int64, id logID, h segmentHead, entries uint64, root tlog.Hash) (sealedSegment, error) {
	s := sealedSegment{number: h.number, first: h.first, end: entries, root: root}
	if _, err := file.WriteAt(sealOf(id, h.number, entries, root), end); err != nil {
		return s, fmt.Errorf("seal segment %d: %w", h.number, err)
	}
	if err := file.Sync(); err != nil {
		return s, fmt.Errorf("seal segment %d: %w", h.number, err)
	}
	// The room behind it is given back.
	if err := f.Truncate(end + sealSize); err != nil {
		return s, fmt.Errorf("seal segment %d: %w", h.number, err)
	}
	if err := file.Sync(); err != nil {
		return s, fmt.Errorf("seal segment %d: %w", h.number, err)
	}
	return s, s.stat(f)
}

// sealBefore ends a rotation that was interrupted: the segment before the last
// one ends at end.
func (l *Log) sealBefore(end int64) error {
	last := &l.before[len(l.before)-1]
	f, err := os.OpenFile(filepath.Join(l.dir, segmentName(last.number)), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	l.bytes -= last.size
	*last, err = sealSegment(f, l.wrap(f), end, l.id, segmentHead{number: last.number, first: last.first}, last.end, last.root)
	l.bytes += last.size
	return err
}

// sealedPerCommit is how many segments are looked at with each batch.
const sealedPerCommit = 64

// checkUntouched reports a file that somebody else has written to since we did.
func (l *Log) checkUntouched() error {
	var is fileState
	if err := is.read(l.os); err != nil {
		return err
	}
	switch {
	case is.size < l.seen.size:
		return fmt.Errorf("the file was cut to %d bytes", is.size)
	case is.size > l.seen.size:
		return fmt.Errorf("somebody else has appended %d bytes to the file", is.size-l.seen.size)
	case is != l.seen:
		return errors.New("somebody else has written to the file")
	}
	return nil
}

// checkFiles reports a file of the log that was taken away, cut, replaced or
// written to behind our back. It looks at the one that is written, and at some
// of the others in turn.
func (l *Log) checkFiles() error {
	was := l.seen
	if err := l.seen.read(l.os); err != nil {
		return err
	}
	if l.seen.size < was.size {
		return fmt.Errorf("the file was cut to %d bytes", l.seen.size)
	}
	if l.seen.size > was.size {
		return fmt.Errorf("somebody else has appended %d bytes to the file", l.seen.size-was.size)
	}
	var named unix.Stat_t
	if err := unix.Lstat(l.path, &named); err != nil {
		return fmt.Errorf("the file is gone: %w", err)
	}
	if uint64(named.Dev) != l.seen.dev || named.Ino != l.seen.ino {
		return errors.New("another file is in its place")
	}
	for range min(sealedPerCommit, len(l.before)) {
		if err := l.checkSealed(&l.before[l.sealedAt%len(l.before)]); err != nil {
			return err
		}
		l.sealedAt++
	}
	return nil
}

// checkSealed reports a sealed segment that is not what it was. It may have been
// pruned.
func (l *Log) checkSealed(s *sealedSegment) error {
	path := filepath.Join(l.dir, segmentName(s.number))
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("segment %d is gone: %w", s.number, err)
	}
	var is fileState
	if is.set(&st); is == s.state {
		return nil
	}
	f, h, err := openSegment(l.dir, s.number)
	if err != nil {
		return err
	}
	defer f.Close()
	r := h.pruned
	if s.pruned || r == nil || h.id != l.id || h.first != s.first || h.first+r.entries != s.end || r.root != s.root {
		return fmt.Errorf("segment %d, %s, was changed", s.number, path)
	}
	l.bytes -= s.size
	if err := s.stat(f); err != nil {
		return err
	}
	l.bytes += s.size
	s.pruned, l.pruned = true, l.pruned+s.end-s.first
	l.log.Warn("audit log: a segment was pruned", "segment", s.number, "first", s.first, "entries", s.end-s.first)
	return nil
}
