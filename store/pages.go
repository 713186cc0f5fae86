package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// bbolt trusts the pages it maps: on a damaged file it panics, faults or
// recurses without end. What is read here, with plain reads and bounds
// checked, is the part of its file format that decides whether it may be let
// at a file.
//
// A file is a row of pages; a page is
//
//	id 8 | flags 2 | count 2 | overflow 4 | content
//
// in the byte order of the machine, and goes on over overflow further pages.
// Pages 0 and 1 are metas, of which the valid one with the higher transaction
// ID rules. The others are branches and leaves of B+ trees, the list of free
// pages, or free.
const (
	pageHeaderSize = 16
	elementSize    = 16
	metaSize       = 64

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10

	leafIsBucket = 0x01 // in the flags of a leaf's element

	metaMagic   = 0xED0CDAED
	metaVersion = 2
	noFreelist  = 1<<64 - 1

	minPageSize = 1 << 10
	maxPageSize = 1 << 16
	maxDepth    = 32 // a tree of minimal pages that deep would not fit in 64 bits
)

var order = binary.NativeEndian

// Errors of the page format. Open wraps them in its own.
var (
	errNotBolt  = errors.New("not a bbolt file")
	errTooShort = errors.New("the file is shorter than it says it is")
)

// A meta is bbolt's meta page: where a transaction's state begins.
type meta struct {
	pageSize int64
	root     uint64
	freelist uint64
	pages    uint64 // the high-water mark: IDs are below it
	txid     uint64
}

// readMeta returns the ruling meta of a file of size bytes. Its error is
// errNotBolt, errTooShort, one of the device, or says what is damaged.
func readMeta(f io.ReaderAt, size int64) (meta, error) {
	var (
		best  meta
		found bool
		why   error
	)
	try := func(off int64) error {
		m, err := parseMeta(f, size, off)
		switch {
		case err == nil && (!found || m.txid > best.txid):
			best, found = m, true
		case err != nil && (why == nil || errors.Is(why, errNotBolt)):
			why = err
		}
		return err
	}
	// The second meta lies where the first says; where the first is damaged,
	// at the end of a page of any possible size.
	if err := try(0); err == nil {
		_ = try(best.pageSize) // counted in found and why
	} else {
		for off := int64(minPageSize); off <= maxPageSize; off *= 2 {
			_ = try(off) // the same
		}
	}
	if !found {
		if size < 2*minPageSize && (why == nil || errors.Is(why, errNotBolt)) && size > 0 {
			return meta{}, errNotBolt
		}
		return meta{}, why
	}
	if best.pages > uint64(size/best.pageSize) {
		return meta{}, fmt.Errorf("%d pages of %d bytes in a file of %d bytes: %w", best.pages, best.pageSize, size, errTooShort)
	}
	if best.root < 2 || best.root >= best.pages || best.freelist < 2 || best.freelist >= best.pages || best.root == best.freelist {
		return meta{}, fmt.Errorf("meta page: root %d and free list %d of %d pages", best.root, best.freelist, best.pages)
	}
	return best, nil
}

func parseMeta(f io.ReaderAt, size, off int64) (meta, error) {
	if size == 0 {
		return meta{}, fmt.Errorf("the file is empty: %w", errTooShort)
	}
	b := make([]byte, pageHeaderSize+metaSize)
	if off+int64(len(b)) > size {
		return meta{}, errNotBolt
	}
	if _, err := f.ReadAt(b, off); err != nil {
		return meta{}, err
	}
	flags := order.Uint16(b[8:])
	b = b[pageHeaderSize:]
	if order.Uint32(b) != metaMagic {
		return meta{}, errNotBolt
	}
	sum := fnv.New64a()
	_, _ = sum.Write(b[:metaSize-8]) // a hash returns no error
	if sum.Sum64() != order.Uint64(b[metaSize-8:]) || flags != flagMeta {
		return meta{}, fmt.Errorf("meta page at byte %d: wrong checksum", off)
	}
	if v := order.Uint32(b[4:]); v != metaVersion {
		return meta{}, fmt.Errorf("meta page at byte %d: format version %d, want %d", off, v, metaVersion)
	}
	m := meta{
		pageSize: int64(order.Uint32(b[8:])),
		root:     order.Uint64(b[16:]),
		freelist: order.Uint64(b[32:]),
		pages:    order.Uint64(b[40:]),
		txid:     order.Uint64(b[48:]),
	}
	if m.pageSize < minPageSize || m.pageSize > maxPageSize || m.pageSize&(m.pageSize-1) != 0 {
		return meta{}, fmt.Errorf("meta page at byte %d: page size %d", off, m.pageSize)
	}
	return m, nil
}

// A page is one page with its overflow.
type page struct {
	id    uint64
	flags uint16
	count int
	n     uint64 // pages it takes up
	b     []byte // all of it
}

// A walker visits the pages of a state of the file.
type walker struct {
	f    io.ReaderAt
	meta meta
	// leaves tells to read leaves too. Without them a tree is taken to be as
	// deep everywhere as at its left edge, which bbolt keeps to.
	leaves bool
	seen   []uint64 // a bit for each page
}

func newWalker(f io.ReaderAt, m meta, leaves bool) *walker {
	return &walker{f: f, meta: m, leaves: leaves, seen: make([]uint64, (m.pages+63)/64)}
}

// claim marks n pages from id on as in use, by the first who comes.
func (w *walker) claim(id, n uint64) error {
	if id < 2 || id >= w.meta.pages || n > w.meta.pages-id {
		return fmt.Errorf("page %d and %d more: outside of %d pages", id, n-1, w.meta.pages)
	}
	for i := id; i < id+n; i++ {
		if w.seen[i/64]&(1<<(i%64)) != 0 {
			return fmt.Errorf("page %d: used twice", i)
		}
		w.seen[i/64] |= 1 << (i % 64)
	}
	return nil
}

// header reads a page's header.
func (w *walker) header(id uint64) (page, error) {
	if id < 2 || id >= w.meta.pages {
		return page{}, fmt.Errorf("page %d: outside of %d pages", id, w.meta.pages)
	}
	var b [pageHeaderSize]byte
	if _, err := w.f.ReadAt(b[:], int64(id)*w.meta.pageSize); err != nil {
		return page{}, fmt.Errorf("page %d: %w", id, err)
	}
	p := page{
		id:    id,
		flags: order.Uint16(b[8:]),
		count: int(order.Uint16(b[10:])),
		n:     uint64(order.Uint32(b[12:])) + 1,
	}
	if got := order.Uint64(b[:]); got != id {
		return page{}, fmt.Errorf("page %d: says it is page %d", id, got)
	}
	return p, nil
}

// read claims a page and reads it whole.
func (w *walker) read(id uint64) (page, error) {
	p, err := w.header(id)
	if err != nil {
		return page{}, err
	}
	if err := w.claim(id, p.n); err != nil {
		return page{}, err
	}
	p.b = make([]byte, int64(p.n)*w.meta.pageSize)
	if _, err := w.f.ReadAt(p.b, int64(id)*w.meta.pageSize); err != nil {
		return page{}, fmt.Errorf("page %d: %w", id, err)
	}
	return p, nil
}

// check visits everything: the free list, and the trees of all buckets.
func (w *walker) check() error {
	if err := w.freelist(); err != nil {
		return err
	}
	return w.tree(w.meta.root)
}

// freelist claims the free pages and the page that lists them.
func (w *walker) freelist() error {
	p, err := w.read(w.meta.freelist)
	if err != nil {
		return fmt.Errorf("free list: %w", err)
	}
	if p.flags != flagFreelist {
		return fmt.Errorf("free list: page %d has flags %#x", p.id, p.flags)
	}
	ids := p.b[pageHeaderSize:]
	count := uint64(p.count)
	if count == 0xffff {
		// So many that the first ID is their number.
		count = order.Uint64(ids)
		ids = ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return fmt.Errorf("free list: %d pages in %d bytes", count, len(ids))
	}
	last := uint64(1)
	for i := range count {
		id := order.Uint64(ids[8*i:])
		if id <= last {
			return fmt.Errorf("free list: page %d after page %d", id, last)
		}
		last = id
		if err := w.claim(id, 1); err != nil {
			return fmt.Errorf("free list: %w", err)
		}
	}
	return nil
}

// tree visits the tree of a bucket and of the buckets in it.
func (w *walker) tree(root uint64) error {
	height, err := w.height(root)
	if err != nil {
		return err
	}
	return w.node(root, height, nil, nil)
}

// height is how many levels of branches lie above the leftmost leaf.
func (w *walker) height(root uint64) (int, error) {
	for h, id := 0, root; h < maxDepth; h++ {
		p, err := w.header(id)
		if err != nil {
			return 0, err
		}
		if p.flags == flagLeaf {
			return h, nil
		}
		var b [elementSize]byte
		if p.flags != flagBranch || p.count == 0 {
			return 0, fmt.Errorf("page %d: flags %#x and %d elements in a tree", id, p.flags, p.count)
		}
		if _, err := w.f.ReadAt(b[:], int64(id)*w.meta.pageSize+pageHeaderSize); err != nil {
			return 0, fmt.Errorf("page %d: %w", id, err)
		}
		id = order.Uint64(b[8:])
	}
	return 0, fmt.Errorf("page %d: a tree of more than %d levels", root, maxDepth)
}

// node visits a page at a height above the leaves, whose keys are to lie
// from low on and before high; nil is no bound.
func (w *walker) node(id uint64, height int, low, high []byte) error {
	if height == 0 && !w.leaves && id != w.meta.root {
		return nil
	}
	p, err := w.read(id)
	if err != nil {
		return err
	}
	want := uint16(flagBranch)
	if height == 0 {
		want = flagLeaf
	}
	if p.flags != want {
		return fmt.Errorf("page %d: flags %#x, want %#x", id, p.flags, want)
	}
	if height == 0 {
		return w.leaf(id, p.b, p.count, low, high)
	}
	keys := make([][]byte, p.count)
	for i := range keys {
		e, err := element(p.b, i)
		if err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		pos, ksize := uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))
		if keys[i], err = field(e, pos, ksize); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
	}
	if err := ascending(keys, low, high); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	for i := range keys {
		end := high
		if i+1 < len(keys) {
			end = keys[i+1]
		}
		child := order.Uint64(p.b[pageHeaderSize+i*elementSize+8:])
		if err := w.node(child, height-1, keys[i], end); err != nil {
			return err
		}
	}
	return nil
}

// leaf visits the content of a leaf page, which may be one inside the value
// of a bucket too small for a page of its own.
func (w *walker) leaf(id uint64, b []byte, count int, low, high []byte) error {
	keys := make([][]byte, count)
	for i := range keys {
		e, err := element(b, i)
		if err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		pos, ksize, vsize := uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])), uint64(order.Uint32(e[12:]))
		if keys[i], err = field(e, pos, ksize); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		value, err := field(e, pos+ksize, vsize)
		if err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		switch flags := order.Uint32(e); flags {
		case 0:
		case leafIsBucket:
			if err := w.bucket(id, value); err != nil {
				return fmt.Errorf("bucket %q: %w", keys[i], err)
			}
		default:
			return fmt.Errorf("page %d: element %d has flags %#x", id, i, flags)
		}
	}
	if err := ascending(keys, low, high); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// bucket visits the tree of a bucket, or the leaf that is its value.
func (w *walker) bucket(id uint64, value []byte) error {
	if len(value) < 16 {
		return fmt.Errorf("page %d: a bucket of %d bytes", id, len(value))
	}
	if root := order.Uint64(value); root != 0 {
		return w.tree(root)
	}
	inline := value[16:]
	if len(inline) < pageHeaderSize || order.Uint16(inline[8:]) != flagLeaf {
		return fmt.Errorf("page %d: a bucket without a leaf", id)
	}
	return w.leaf(id, inline, int(order.Uint16(inline[10:])), nil, nil)
}

// element is what follows from the start of element i of a page, to its end.
func element(b []byte, i int) ([]byte, error) {
	off := pageHeaderSize + i*elementSize
	if off+elementSize > len(b) {
		return nil, fmt.Errorf("element %d: outside of the page", i)
	}
	return b[off:], nil
}

// field is size bytes at pos from the start of an element.
func field(e []byte, pos, size uint64) ([]byte, error) {
	if pos > uint64(len(e)) || size > uint64(len(e))-pos {
		return nil, fmt.Errorf("%d bytes at %d: outside of the page", size, pos)
	}
	return e[pos : pos+size], nil
}

func ascending(keys [][]byte, low, high []byte) error {
	for i, k := range keys {
		if i > 0 && bytes.Compare(keys[i-1], k) >= 0 {
			return fmt.Errorf("key %d: not after the one before it", i)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	if low != nil && bytes.Compare(keys[0], low) < 0 || high != nil && bytes.Compare(keys[len(keys)-1], high) >= 0 {
		return errors.New("keys outside of the bounds that the page above gives")
	}
	return nil
}
