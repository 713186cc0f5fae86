package audit

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// run is the committer: the only goroutine that writes. While it syncs one
// batch, the next one gathers.
func (l *Log) run() {
	defer close(l.done)
	second := time.NewTicker(time.Second)
	defer second.Stop()
	var p pace
	for {
		select {
		case <-l.wake:
			// Let those whom the last batch woke up come along.
			runtime.Gosched()
			p.rest(l.closing)
			batch := l.take()
			p.began(len(batch))
			l.commit(batch)
		case <-second.C:
			l.flush()
			l.lookForRoom()
			l.lookForSigner()
		case <-l.closing:
			for batch := l.take(); len(batch) > 0; batch = l.take() {
				l.commit(batch)
			}
			l.flush()
			return
		}
	}
}

// A pace keeps a busy log from making many small batches. What a batch costs
// besides its entries, a signature of the token and a sync, is the same for two
// as for a hundred; so where many come at once, the next batch begins no sooner
// than busyInterval after the last one. A call that comes alone never waits.
type pace struct {
	last time.Time // when the last batch began
	busy bool      // it was one of many requests
}

const (
	busyRequests = 8
	busyInterval = 3 * time.Millisecond
)

func (p *pace) began(requests int) { p.last, p.busy = time.Now(), requests >= busyRequests }

// rest waits until the next batch may begin, or closing is closed.
func (p *pace) rest(closing <-chan struct{}) {
	wait := busyInterval - time.Since(p.last)
	if !p.busy || wait <= 0 {
		return
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-closing:
	}
}

// take returns the next batch of waiting requests.
func (l *Log) take() []*request {
	l.mu.Lock()
	defer l.mu.Unlock()
	size, n := 0, 0
	for n < len(l.queue) && (n == 0 || size+len(l.queue[n].entries) <= maxGather) {
		size += len(l.queue[n].entries)
		n++
	}
	batch := l.queue[:n:n]
	l.queue = append(l.spare[:0], l.queue[n:]...)
	l.spare = nil
	l.waiting -= size
	if len(l.queue) > 0 {
		l.signal()
	}
	return batch
}

// signal makes run look at the queue.
func (l *Log) signal() {
	select {
	case l.wake <- struct{}{}:
	default: // it is about to
	}
}

// flush writes the counted denials.
func (l *Log) flush() {
	now := l.now()
	for entries := l.denials.take(now); len(entries) > 0; {
		part := entries[:min(len(entries), flushEntries)]
		entries = entries[len(part):]
		r := l.request(len(part))
		for i := range part {
			r.add(&part[i], now)
		}
		l.commit([]*request{r})
		if r.err != nil {
			l.denials.putBack(part)
		}
	}
}

// commit writes one batch with what there is room for, and answers everybody.
func (l *Log) commit(batch []*request) {
	defer l.at("")
	l.at(StepRoom)
	admitted := l.admit(batch)
	if len(admitted) > 0 {
		signed, err := l.store(admitted)
		for _, r := range admitted {
			r.signed = signed
			r.answer(err)
		}
		if cap(l.frame) > maxGather {
			l.frame = nil
		}
	}
	clear(batch)
	l.mu.Lock()
	l.spare = batch
	l.mu.Unlock()
}

// store makes a batch of the requests, signs its root and writes it, and returns
// its checkpoint. What cannot be signed has not happened: the next batch may
// try. What could not be written blocks the log.
func (l *Log) store(batch []*request) ([]byte, error) {
	l.undo.size, l.undo.edge = l.tree.size, append(l.undo.edge[:0], l.tree.edge...)
	h := l.build(batch)
	l.at(StepSign)
	signed, err := l.sign(h.root)
	if err != nil {
		l.tree, l.undo = l.undo, l.tree
		return nil, err
	}
	l.finish(h, signed)
	if err := l.write(); err != nil {
		return nil, l.latch(err)
	}
	l.end += int64(len(l.frame))
	l.publish(h.root, signed)
	return signed, nil
}

// answer tells Append how it went. The request is not the committer's any more.
func (r *request) answer(err error) {
	r.err = err
	r.done <- struct{}{}
}

// admit takes those requests that are still wanted and that there is room for,
// and answers the others. What it returns is in the place of batch.
func (l *Log) admit(batch []*request) []*request {
	total := 0
	for _, r := range batch {
		total += len(r.entries)
	}
	l.rotate(frameSize(total) + l.checkpointRoom())
	l.grow(frameSize(total) + l.checkpointRoom())
	l.tellRoom() // before those hear of it who are refused
	admitted, size := batch[:0], 0
	for _, r := range batch {
		if !r.state.CompareAndSwap(waiting, taken) {
			continue
		}
		if err := l.refusal(size+len(r.entries), r.priority); err != nil {
			r.answer(err)
			continue
		}
		size += len(r.entries)
		admitted = append(admitted, r)
	}
	return admitted
}

// refusal says why a batch with a payload of size bytes may not be written now.
func (l *Log) refusal(size int, priority bool) error {
	if l.latched != nil { // only this goroutine sets it
		return l.latched
	}
	room := l.alloc - l.end - frameSize(size) - l.checkpointRoom()
	if !priority {
		room -= l.reserve
	}
	if room >= 0 {
		return nil
	}
	return fmt.Errorf("%w: %w: %w", ErrBlocked, ErrFull, l.full)
}

// publish makes a batch known that is on disk.
func (l *Log) publish(root tlog.Hash, signed []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.root = root
	if signed != nil {
		l.signed = signed
	}
	l.stats.Entries = l.tree.size
	l.place = DamageError{Path: l.path, Segment: l.segment.number, Offset: l.end, Index: l.tree.size}
	l.tellSize()
	l.stats.Batches++
}

// latch blocks the log until it is opened again.
func (l *Log) latch(cause error) error {
	err := fmt.Errorf("%w until it is opened again: %w", ErrBlocked, cause)
	l.log.Error("audit log: blocked until it is opened again", "error", cause)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.latched = err
	return err
}

// build begins the frame of a batch and adds its entries to the tree.
func (l *Log) build(batch []*request) batchHeader {
	h := batchHeader{first: l.tree.size}
	frame := append(l.frame[:0], make([]byte, headerSize)...)
	for _, r := range batch {
		r.first = l.tree.size
		payload := len(frame)
		frame = append(frame, r.entries...)
		for rest := frame[payload:]; len(rest) > 0; {
			var entry []byte
			entry, rest, _ = nextEntry(rest) // add made it
			binary.BigEndian.PutUint64(entry[1:], l.tree.size)
			leaf := tlog.RecordHash(entry)
			l.tree.add(leaf)
			r.leaves = append(r.leaves, leaf)
		}
		h.count += r.n
	}
	h.root = l.tree.root()
	l.frame = frame
	return h
}

// finish ends the frame that build began, with the checkpoint if there is one.
func (l *Log) finish(h batchHeader, signed []byte) {
	frame := l.frame
	if h.signed = signed != nil; h.signed {
		frame = appendCheckpoint(frame, signed)
		l.sealed = true
	}
	h.payload = len(frame) - headerSize
	frame = append(frame, zeros[:h.padded()-h.payload]...)
	h.sum = crc32.Checksum(frame[headerSize:], crcTable)
	frame = append(frame, batchTrailer...)
	h.encode(frame, l.id)
	l.frame = frame
}

// write returns nil when the frame is on disk, in the file that is the log.
func (l *Log) write() error {
	if err := l.checkUntouched(); err != nil {
		return err
	}
	l.at(StepWrite)
	n, err := l.file.WriteAt(l.frame, l.end)
	if err == nil && n < len(l.frame) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write at offset %d: %w", l.end, err)
	}
	l.at(StepSync)
	if err := l.file.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	l.at(StepWrite)
	return l.checkFiles()
}
