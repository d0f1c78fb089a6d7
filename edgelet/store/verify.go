package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// Constants of the file format of bbolt, version 2. It is written in the machine's
// byte order, which is little endian on everything that we build for.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10

	elementBucket = 0x01 // flag of a leaf element whose value is a bucket

	pageHeader   = 16 // id 8, flags 2, count 2, overflow 4
	elementSize  = 16 // of leaf and of branch pages
	bucketHeader = 16 // root page 8, sequence 8
	metaSize     = 64 // without the header of its page

	noFreelist = 1<<64 - 1

	minPageSize = 1 << 10
	maxPageSize = 1 << 16
	maxDepth    = 32           // branch pages above each other; at 4 KiB pages a tree of 100 GB has 5
	maxRun      = 4 * MaxValue // bytes of a page with its overflow: bbolt puts at least two values in one
)

// A place is where a damaged value was found.
type place struct{ bucket, key string }

// A verdict is what verify found in a readable file.
type verdict struct {
	values  int     // how many there are
	damaged []place // those whose checksum is wrong
	page    int     // size of a page in bytes

	// If one of the two meta pages is not valid, or does not lead to a whole tree, the
	// last commit may be missing. Then bad is the offset of that page, which must be
	// made invalid so that bbolt uses the other one. Else it is -1.
	bad int64
}

// verify reads a whole bbolt file and reports whether bbolt can be trusted with
// it: every page that the tree reaches is inside the file, of the right kind,
// reached once, and packed with keys in order. It reads each page at most once for
// each of the two meta pages, holds few in memory, and never panics. The error wraps
// ErrCorrupt unless reading itself failed.
func verify(r io.ReaderAt, size int64) (verdict, error) {
	metas, err := readMetas(r, size)
	if err != nil {
		return verdict{}, err
	}
	var first error
	for i, m := range metas {
		v := verifier{r: r, size: size, meta: m}
		err := v.run()
		if err == nil {
			found := verdict{values: v.values, damaged: v.damaged, page: int(m.pageSize), bad: -1}
			if i > 0 || len(metas) == 1 {
				found.bad = m.pageSize - m.offset // they are at 0 and pageSize
			}
			return found, nil
		}
		if !errors.Is(err, ErrCorrupt) {
			return verdict{}, err
		}
		if first == nil {
			first = err
		}
	}
	return verdict{}, first
}

// meta is a meta page whose checksum is right.
type meta struct {
	offset                       int64
	pageSize                     int64
	root, freelist, pages, txnum uint64
}

// readMetas returns the valid meta pages, the newest first.
func readMetas(r io.ReaderAt, size int64) ([]meta, error) {
	var metas []meta
	pageSize := int64(0)
	if m, err := readMeta(r, size, 0); err == nil {
		metas, pageSize = append(metas, m), m.pageSize
	} else if !errors.Is(err, ErrCorrupt) {
		return nil, err
	}
	// Without the first one, the place of the second is a guess.
	for at := int64(minPageSize); at <= maxPageSize; at <<= 1 {
		if pageSize != 0 && at != pageSize {
			continue
		}
		m, err := readMeta(r, size, at)
		if err == nil && m.pageSize == at {
			metas = append(metas, m)
			break
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return nil, err
		}
	}
	switch {
	case len(metas) == 0:
		return nil, corruptf("no valid meta page")
	case len(metas) == 2 && metas[1].txnum > metas[0].txnum:
		metas[0], metas[1] = metas[1], metas[0]
	}
	return metas, nil
}

func readMeta(r io.ReaderAt, size, at int64) (meta, error) {
	var buf [pageHeader + metaSize]byte
	if at+int64(len(buf)) > size {
		return meta{}, corruptf("file ends within a meta page")
	}
	if err := readAt(r, buf[:], at); err != nil {
		return meta{}, err
	}
	b := buf[pageHeader:]
	sum := fnv.New64a()
	sum.Write(b[:metaSize-8])
	le := binary.LittleEndian
	id, flags := uint64(min(at, 1)), le.Uint16(buf[8:])
	if le.Uint64(buf[:]) != id || flags != flagMeta || le.Uint32(b) != boltMagic || le.Uint32(b[4:]) != boltVersion || le.Uint64(b[56:]) != sum.Sum64() {
		return meta{}, corruptf("meta page at %d is invalid", at)
	}
	m := meta{
		offset: at, pageSize: int64(le.Uint32(b[8:])),
		root: le.Uint64(b[16:]), freelist: le.Uint64(b[32:]),
		pages: le.Uint64(b[40:]), txnum: le.Uint64(b[48:]),
	}
	if m.pageSize < minPageSize || m.pageSize > maxPageSize || m.pageSize&(m.pageSize-1) != 0 {
		return meta{}, corruptf("page size %d", m.pageSize)
	}
	return m, nil
}

// A verifier walks the tree of one meta page.
type verifier struct {
	r       io.ReaderAt
	size    int64
	meta    meta
	seen    []bool // by page
	values  int
	damaged []place
}

func (v *verifier) run() error {
	if v.meta.pages < 3 || v.meta.pages > uint64(v.size/v.meta.pageSize) {
		return corruptf("%d pages in a file of %d bytes", v.meta.pages, v.size)
	}
	v.seen = make([]bool, v.meta.pages)
	v.seen[0], v.seen[1] = true, true
	if err := v.tree(v.meta.root, "", bounds{}, 0); err != nil {
		return err
	}
	if v.meta.freelist == noFreelist {
		return nil
	}
	return v.freelist()
}

// bounds are what the keys of a page must respect: low <= key < high; nil: none.
type bounds struct{ low, high []byte }

// tree verifies the page id and all below it, which belong to the bucket of that
// name, "" for the root.
func (v *verifier) tree(id uint64, bucket string, in bounds, depth int) error {
	if depth > maxDepth {
		return corruptf("page %d: more than %d levels", id, maxDepth)
	}
	p, err := v.page(id)
	if err != nil {
		return err
	}
	switch p.flags {
	case flagLeaf:
		return v.leaf(p, bucket, in, depth)
	case flagBranch:
		return v.branch(p, bucket, in, depth)
	}
	return corruptf("page %d: flags %#x", id, p.flags)
}

func (v *verifier) branch(p page, bucket string, in bounds, depth int) error {
	if p.count == 0 {
		return corruptf("page %d: empty branch", p.id)
	}
	elements, err := p.elements()
	if err != nil {
		return err
	}
	if err := ordered(p.id, elements, in); err != nil {
		return err
	}
	p.data = nil // only the keys are needed while the children are read
	for i, e := range elements {
		child := bounds{low: e.key, high: in.high}
		if i+1 < len(elements) {
			child.high = elements[i+1].key
		}
		if err := v.tree(e.child, bucket, child, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) leaf(p page, bucket string, in bounds, depth int) error {
	elements, err := p.elements()
	if err != nil {
		return err
	}
	if err := ordered(p.id, elements, in); err != nil {
		return err
	}
	for _, e := range elements {
		switch v.values++; {
		case e.flags == elementBucket:
			v.values--
			if err := v.bucket(e, bucket, depth); err != nil {
				return err
			}
		case e.flags != 0:
			return corruptf("page %d: element flags %#x", p.id, e.flags)
		case bucket == "":
			return corruptf("page %d: value outside of a bucket", p.id)
		case !intact(bucket, string(e.key), e.value):
			v.damaged = append(v.damaged, place{bucket, string(e.key)})
		}
	}
	return nil
}

// bucket verifies the bucket that is the value of e, in a page of its own or inline.
func (v *verifier) bucket(e element, parent string, depth int) error {
	name := string(e.key)
	if parent != "" {
		name = parent + "/" + name
	}
	if len(e.value) < bucketHeader {
		return corruptf("bucket %q: header of %d bytes", name, len(e.value))
	}
	if root := binary.LittleEndian.Uint64(e.value); root != 0 {
		return v.tree(root, name, bounds{}, depth+1)
	}
	inline := e.value[bucketHeader:]
	p, err := parsePage(inline)
	if err != nil {
		return err
	}
	if p.id != 0 || p.flags != flagLeaf || p.overflow != 0 {
		return corruptf("bucket %q: inline page %d, flags %#x", name, p.id, p.flags)
	}
	if used, err := p.used(); err != nil || used != len(inline) {
		return corruptf("bucket %q: inline page of %d bytes", name, len(inline))
	}
	return v.leaf(p, name, bounds{}, depth+1)
}

// page reads the page id with its overflow pages, and marks them as reached.
func (v *verifier) page(id uint64) (page, error) {
	if id < 2 || id >= v.meta.pages {
		return page{}, corruptf("page %d is outside", id)
	}
	buf := make([]byte, v.meta.pageSize)
	if err := readAt(v.r, buf, int64(id)*v.meta.pageSize); err != nil {
		return page{}, err
	}
	p, err := parsePage(buf)
	if err != nil {
		return page{}, err
	}
	if p.id != id {
		return page{}, corruptf("page %d says that it is %d", id, p.id)
	}
	last := id + uint64(p.overflow)
	if last >= v.meta.pages || int64(p.overflow)*v.meta.pageSize > maxRun {
		return page{}, corruptf("page %d: %d overflow pages", id, p.overflow)
	}
	for i := id; i <= last; i++ {
		if v.seen[i] {
			return page{}, corruptf("page %d is in use twice", i)
		}
		v.seen[i] = true
	}
	if p.overflow > 0 {
		buf = append(buf, make([]byte, int64(p.overflow)*v.meta.pageSize)...)
		if err := readAt(v.r, buf[v.meta.pageSize:], int64(id+1)*v.meta.pageSize); err != nil {
			return page{}, err
		}
		p.data = buf
	}
	if used, err := p.used(); err != nil {
		return page{}, err
	} else if p.flags != flagFreelist && p.overflow > 0 && used <= len(buf)-int(v.meta.pageSize) {
		return page{}, corruptf("page %d: %d overflow pages for %d bytes", id, p.overflow, used)
	}
	return p, nil
}

// freelist verifies the list of free pages. Ours are not written (they are found
// again on opening), but files that other tools have rewritten have one.
func (v *verifier) freelist() error {
	p, err := v.page(v.meta.freelist)
	if err != nil {
		return err
	}
	if p.flags != flagFreelist {
		return corruptf("page %d: flags %#x of a freelist", p.id, p.flags)
	}
	ids := p.data[pageHeader:]
	count := uint64(p.count)
	if count == 0xFFFF { // the true count does not fit and comes first
		count, ids = binary.LittleEndian.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return corruptf("freelist of %d pages in %d bytes", count, len(ids))
	}
	for ; count > 0; count-- {
		id := binary.LittleEndian.Uint64(ids)
		if id >= v.meta.pages || v.seen[id] {
			return corruptf("free page %d is in use or outside", id)
		}
		v.seen[id], ids = true, ids[8:]
	}
	return nil
}

// page is a page as it lies in the file.
type page struct {
	id           uint64
	flags, count uint16
	overflow     uint32
	data         []byte // with the header
}

func parsePage(b []byte) (page, error) {
	if len(b) < pageHeader {
		return page{}, corruptf("page of %d bytes", len(b))
	}
	le := binary.LittleEndian
	return page{le.Uint64(b), le.Uint16(b[8:]), le.Uint16(b[10:]), le.Uint32(b[12:]), b}, nil
}

// An element is an entry of a page; slices are parts of the page's data.
type element struct {
	flags      uint32 // of a leaf
	key, value []byte
	child      uint64 // page, of a branch
}

// elements parses the entries of a leaf or branch page. bbolt packs keys and values
// without gaps in the order of the entries; anything else is corrupt, so that a
// changed count or length does not go unseen.
func (p page) elements() ([]element, error) {
	elements := make([]element, p.count)
	end := pageHeader + elementSize*int(p.count)
	if end > len(p.data) {
		return nil, corruptf("page %d: %d elements", p.id, p.count)
	}
	for i := range elements {
		at := pageHeader + elementSize*i
		key, value, rest, err := p.entry(i, end)
		if err != nil {
			return nil, err
		}
		e := &elements[i]
		e.key, e.value, end = key, value, rest
		if p.flags == flagBranch {
			e.child = binary.LittleEndian.Uint64(p.data[at+8:])
		} else {
			e.flags = binary.LittleEndian.Uint32(p.data[at:])
		}
		if len(e.key) == 0 {
			return nil, corruptf("page %d: element %d has no key", p.id, i)
		}
	}
	return elements, nil
}

// entry returns key and value of entry i, which must begin at start, and where
// they end.
func (p page) entry(i, start int) (key, value []byte, end int, err error) {
	at := pageHeader + elementSize*i
	fields := p.data[at : at+elementSize]
	le := binary.LittleEndian
	pos, ksize, vsize := le.Uint32(fields), le.Uint32(fields[4:]), uint32(0)
	if p.flags == flagLeaf {
		pos, ksize, vsize = le.Uint32(fields[4:]), le.Uint32(fields[8:]), le.Uint32(fields[12:])
	}
	room := uint64(len(p.data) - start)
	if uint64(at)+uint64(pos) != uint64(start) || uint64(ksize)+uint64(vsize) > room {
		return nil, nil, 0, corruptf("page %d: element %d lies at %d+%d", p.id, i, at, pos)
	}
	mid := start + int(ksize)
	end = mid + int(vsize)
	return p.data[start:mid], p.data[mid:end], end, nil
}

// used is how many bytes of a leaf or branch page are in use, 0 for other pages.
func (p page) used() (int, error) {
	if p.flags != flagLeaf && p.flags != flagBranch {
		return 0, nil
	}
	end := pageHeader + elementSize*int(p.count)
	if end > len(p.data) {
		return 0, corruptf("page %d: %d elements", p.id, p.count)
	}
	for i := range int(p.count) {
		var err error
		if _, _, end, err = p.entry(i, end); err != nil {
			return 0, err
		}
	}
	return end, nil
}

// ordered reports keys that are not strictly ascending within their bounds.
func ordered(id uint64, elements []element, in bounds) error {
	previous := in.low
	for i, e := range elements {
		c := bytes.Compare(previous, e.key)
		if previous != nil && (c > 0 || c == 0 && i > 0) || in.high != nil && bytes.Compare(e.key, in.high) >= 0 {
			return corruptf("page %d: key %d is out of order", id, i)
		}
		previous = e.key
	}
	return nil
}

func readAt(r io.ReaderAt, buf []byte, at int64) error {
	_, err := r.ReadAt(buf, at)
	if errors.Is(err, io.EOF) {
		return corruptf("file ends before %d", at+int64(len(buf)))
	}
	if err != nil {
		return fmt.Errorf("read at %d: %w", at, err)
	}
	return nil
}

func corruptf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}
