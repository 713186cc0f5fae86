package audit

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// grow allocates room for a batch of need bytes with the reserve behind it, and
// more ahead if the disk, and the limit, have it. l.full says how that went.
func (l *Log) grow(need int64) {
	l.full = nil
	want := l.end + need + l.reserve
	if want <= l.alloc || l.latched != nil {
		return
	}
	for _, end := range [...]int64{want + growth, want} {
		if l.full = l.allowed(end - l.alloc); l.full != nil {
			continue
		}
		l.full = l.file.Allocate(l.alloc, end-l.alloc)
		// That was us, also where it was done in part.
		if err := l.seen.read(l.os); err != nil {
			l.full = err
		}
		if l.full == nil {
			l.alloc = end
			return
		}
	}
}

// allowed says why the log may not have more bytes.
func (l *Log) allowed(more int64) error {
	if has := l.bytes + l.alloc; l.limit > 0 && has+more > l.limit {
		return fmt.Errorf("the log has %d bytes with its reserve, and the limit is %d: prune it, or raise the limit", has, l.limit)
	}
	return nil
}

// lookForRoom tries again to get room, where there was none, and to rotate.
func (l *Log) lookForRoom() {
	l.lookAtDisk()
	l.cannot = nil
	if l.full != nil {
		l.grow(0)
	}
	l.tellRoom()
}

// lookAtDisk finds out how much room the file system has.
func (l *Log) lookAtDisk() {
	var s unix.Statfs_t
	if unix.Fstatfs(int(l.os.Fd()), &s) == nil {
		l.avail = int64(s.Bavail) * s.Bsize
	}
}

// tellSize makes the size of the log known. The caller holds mu.
func (l *Log) tellSize() {
	l.stats.Bytes = l.bytes + l.end
	l.stats.Free = l.alloc - l.end
	l.stats.Segments, l.stats.Pruned = len(l.before)+1, l.pruned
	l.stats.Limit = l.limit
	if l.limit == 0 {
		l.stats.Limit = l.bytes + l.alloc + l.avail
	}
	l.stats.Watermark = 0
	for _, mark := range [...]int{80, 95} {
		if l.stats.Bytes >= l.stats.Limit/100*int64(mark) {
			l.stats.Watermark = mark
		}
	}
}

// tellRoom makes the state of the disk known: whether there is room, and where
// there is none, whether the reserve is exhausted too.
func (l *Log) tellRoom() {
	l.mu.Lock()
	was := l.stats
	l.tellSize()
	l.stats.OnReserve = l.full != nil
	l.stats.Full = l.full != nil && l.alloc-l.end < leastRoom
	l.stats.Blocked = ""
	if l.unsigned != nil {
		l.stats.Blocked = l.unsigned.Error()
	}
	if l.stats.Full {
		l.stats.Blocked = fmt.Sprintf("%v: %v", ErrFull, l.full)
	}
	is := l.stats
	l.mu.Unlock()

	switch {
	case is.Full && !was.Full:
		l.log.Error("audit log: no room, nothing can be written", "error", is.Blocked)
	case is.OnReserve && !was.OnReserve:
		l.log.Error("audit log: no room but the reserve", "error", l.full, "bytes", is.Free)
	case was.OnReserve && !is.OnReserve:
		l.log.Info("audit log: there is room again")
	}
	switch {
	case is.Watermark > l.told && is.Watermark >= 95:
		l.log.Error("audit log: it is 95 percent full; when it is full nothing is released", "bytes", is.Bytes, "limit", is.Limit)
	case is.Watermark > l.told:
		l.log.Warn("audit log: it is 80 percent full", "bytes", is.Bytes, "limit", is.Limit)
	case is.Watermark < l.told:
		l.log.Info("audit log: it is below a watermark again", "bytes", is.Bytes, "limit", is.Limit)
	}
	l.told = is.Watermark
}
