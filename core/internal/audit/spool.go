package audit

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// Format of a segment, version 1. All integers are little-endian.
//
//	"mvirt-audit-1\n\0\0"                     16 bytes
//	record…: length u32, CRC-32C of payload u32, payload: the entry as JSON
//
// A segment's name is the sequence number of its first entry, 16 hex digits, and ".spool". The file
// "cursor" holds, in decimal, the sequence number of the last entry delivered; it only saves deliveries.
const (
	segmentMagic = "mvirt-audit-1\n\x00\x00"
	segmentExt   = ".spool"
	cursorName   = "cursor"
	segmentSize  = 1 << 20   // a new segment is begun behind this many bytes, or an eighth of the limit
	maxRecord    = 512 << 10 // of payload; a trimmed entry stays below
	reserve      = 1 << 20   // Admit refuses this far before the limit, so that what has begun can be recorded
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type record struct {
	seq   uint64
	entry log.Entry
}

type segment struct {
	first uint64
	count uint64
	size  int64
	path  string
}

// spool is an append-only queue on disk. Appends that come together share one fsync.
type spool struct {
	dir   string
	limit uint64
	sync  func(*os.File) error

	in   chan *pending
	quit chan struct{}
	wg   sync.WaitGroup

	mu       sync.Mutex
	segments []segment // oldest first; the last is written to
	bytes    uint64    // of all segments
	nextSeq  uint64    // of the next entry written
	pend     uint64    // sequence number of the oldest entry not delivered
	offset   int64     // of entry pend in its segment, 0: not known
	file     *os.File  // the last segment, used by the writer only
	closed   bool
}

type pending struct {
	payload []byte
	done    chan error
}

// openSpool reads what is there. A torn end, as a power cut leaves it, is cut off; damage elsewhere costs the
// rest of its segment, which lost tells in words.
func openSpool(dir string, limit uint64, sync func(*os.File) error) (s *spool, lost []string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, errs.Wrap(errs.Unknown, err, "directory of the audit spool")
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"+segmentExt))
	if err != nil {
		return nil, nil, err
	}
	slices.Sort(names)
	s = &spool{dir: dir, limit: limit, sync: sync, in: make(chan *pending, 64), quit: make(chan struct{}), nextSeq: 1}
	for i, path := range names {
		first, err := strconv.ParseUint(strings.TrimSuffix(filepath.Base(path), segmentExt), 16, 64)
		if err != nil || first == 0 {
			return nil, nil, errs.New(errs.Corrupt, "%s does not belong into the audit spool", path).Do("move it away")
		}
		count, size, whole, damage, err := scanSegment(path)
		if err != nil {
			return nil, nil, err
		}
		if whole != size {
			// What stands behind the last good record was never acknowledged if it is a torn write at the end;
			// the file is cut either way, so that what is appended next can be read.
			if err := os.Truncate(path, size); err != nil {
				return nil, nil, err
			}
			if damage || i < len(names)-1 {
				lost = append(lost, fmt.Sprintf("%d bytes of segment %s were damaged and are lost", whole-size, filepath.Base(path)))
			}
		}
		s.segments = append(s.segments, segment{first: first, count: count, size: size, path: path})
		s.bytes += uint64(size)
		s.nextSeq = max(s.nextSeq, first+count)
	}
	s.pend = 1
	if len(s.segments) > 0 {
		s.pend = s.segments[0].first
	} else {
		s.pend = s.nextSeq
	}
	if raw, err := os.ReadFile(filepath.Join(dir, cursorName)); err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64); err == nil {
			if len(s.segments) == 0 {
				s.nextSeq = max(s.nextSeq, n+1)
			}
			if n+1 > s.pend && n < s.nextSeq {
				s.pend = n + 1
			}
			s.pend = min(max(s.pend, 1), s.nextSeq)
			if len(s.segments) == 0 {
				s.pend = s.nextSeq
			}
		}
	}
	s.skipGapsLocked()
	if err := s.dropLocked(); err != nil {
		return nil, nil, err
	}
	if err := s.rotateLocked(); err != nil {
		return nil, nil, err
	}
	s.wg.Go(s.write)
	return s, lost, nil
}

// scanSegment counts the good records from the start. whole is the file's size; damage tells that what
// follows the good part is not just an incomplete record.
func scanSegment(path string) (count uint64, size, whole int64, damage bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, 0, false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, 0, 0, false, err
	}
	whole = st.Size()
	br := bufio.NewReaderSize(f, 256<<10)
	head := make([]byte, len(segmentMagic))
	if _, err := io.ReadFull(br, head); err != nil || string(head) != segmentMagic {
		if strings.HasPrefix(segmentMagic, strings.TrimRight(string(head), "\x00")) {
			return 0, 0, whole, whole > int64(len(segmentMagic)), nil // a power cut before the header was written
		}
		if strings.HasPrefix(string(head), "mvirt-audit-") {
			return 0, 0, 0, false, errs.New(errs.Precondition, "%s has another format than this mvirtd knows", path).Do("run the mvirtd that wrote it")
		}
		return 0, 0, whole, true, nil
	}
	size = int64(len(segmentMagic))
	for {
		payload, err := readRecord(br)
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
			return count, size, whole, false, nil
		}
		if err != nil {
			return count, size, whole, errors.Is(err, errDamaged) && size+8+maxRecord < whole, nil
		}
		count++
		size += 8 + int64(len(payload))
	}
}

var errDamaged = errors.New("damaged record")

func readRecord(r io.Reader) ([]byte, error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[:4])
	if n == 0 || n > maxRecord {
		return nil, errDamaged
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		return nil, io.ErrUnexpectedEOF
	}
	if crc32.Checksum(payload, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		return nil, errDamaged
	}
	return payload, nil
}

func (s *spool) append(ctx context.Context, e log.Entry) error {
	payload, err := json.Marshal(e)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "audit entry")
	}
	if len(payload) > maxRecord {
		return errs.New(errs.Internal, "audit entry of %d bytes", len(payload))
	}
	p := &pending{payload: payload, done: make(chan error, 1)}
	select {
	case s.in <- p:
	case <-s.quit:
		return errs.New(errs.Unavailable, "mvirtd is stopping")
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-p.done:
		return err
	case <-s.quit:
		select { // the writer answers all that it took before it ended
		case err := <-p.done:
			return err
		default:
			return errs.New(errs.Unavailable, "mvirtd is stopping")
		}
	}
}

// write is the only writer of segments.
func (s *spool) write() {
	for {
		var batch []*pending
		select {
		case p := <-s.in:
			batch = append(batch, p)
		case <-s.quit:
			return
		}
	more:
		for len(batch) < cap(s.in) {
			select {
			case p := <-s.in:
				batch = append(batch, p)
			default:
				break more
			}
		}
		err := s.writeBatch(batch)
		for _, p := range batch {
			p.done <- err
		}
	}
}

func (s *spool) writeBatch(batch []*pending) error {
	var buf []byte
	for _, p := range batch {
		buf = binary.LittleEndian.AppendUint32(buf, uint32(len(p.payload)))
		buf = binary.LittleEndian.AppendUint32(buf, crc32.Checksum(p.payload, castagnoli))
		buf = append(buf, p.payload...)
	}
	s.mu.Lock()
	last := &s.segments[len(s.segments)-1]
	full := last.size >= int64(min(segmentSize, s.limit/8)) && last.count > 0
	if s.bytes+uint64(len(buf)) > s.limit {
		s.mu.Unlock()
		return errs.New(errs.Exhausted, "the audit spool is full (%d bytes)", s.limit).Because("AUDIT_FULL").Do("get the log plugin to work again: mvirt plugin show log")
	}
	if full {
		if err := s.rotateLocked(); err != nil {
			s.mu.Unlock()
			return err
		}
		last = &s.segments[len(s.segments)-1]
	}
	f, at := s.file, last.size
	s.mu.Unlock()

	_, err := f.WriteAt(buf, at)
	if err == nil {
		err = s.sync(f)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		// After a failed fsync the pages' state is unknown: this segment is not written to any more.
		_ = f.Truncate(at)
		if rerr := s.rotateLocked(); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return errs.Wrap(errs.Unknown, err, "write the audit spool")
	}
	last = &s.segments[len(s.segments)-1]
	last.size += int64(len(buf))
	last.count += uint64(len(batch))
	s.bytes += uint64(len(buf))
	s.nextSeq += uint64(len(batch))
	return nil
}

// rotateLocked begins a new segment, unless the last one is empty and open.
func (s *spool) rotateLocked() error {
	path := filepath.Join(s.dir, fmt.Sprintf("%016x%s", s.nextSeq, segmentExt))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return errs.Wrap(errs.Unknown, err, "new segment of the audit spool")
	}
	if _, err = f.WriteAt([]byte(segmentMagic), 0); err == nil {
		err = errors.Join(s.sync(f), s.syncDir())
	}
	if err != nil {
		f.Close()
		return errs.Wrap(errs.Unknown, err, "new segment of the audit spool")
	}
	if s.file != nil {
		s.file.Close()
	}
	s.file = f
	if n := len(s.segments); n > 0 && s.segments[n-1].path == path {
		s.bytes -= uint64(s.segments[n-1].size)
		s.segments = s.segments[:n-1]
	}
	s.segments = append(s.segments, segment{first: s.nextSeq, size: int64(len(segmentMagic)), path: path})
	s.bytes += uint64(len(segmentMagic))
	return nil
}

// skipGapsLocked moves pend over numbers that no segment holds: what was lost to damage.
func (s *spool) skipGapsLocked() {
	for _, g := range s.segments {
		if s.pend < g.first && g.count > 0 {
			s.pend, s.offset = g.first, 0
			return
		}
		if s.pend < g.first+g.count {
			return
		}
	}
	s.pend, s.offset = max(s.pend, s.nextSeq), 0
}

// next reads entries from the oldest not delivered on; none: all are.
func (s *spool) next(most int, mostBytes int64) ([]record, error) {
	s.mu.Lock()
	s.skipGapsLocked()
	pend, offset := s.pend, s.offset
	var seg segment
	for _, g := range s.segments {
		if pend >= g.first && pend < g.first+g.count {
			seg = g
		}
	}
	s.mu.Unlock()
	if seg.path == "" {
		return nil, nil
	}
	f, err := os.Open(seg.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	seq := pend
	if offset == 0 {
		seq, offset = seg.first, int64(len(segmentMagic))
	}
	br := bufio.NewReaderSize(io.NewSectionReader(f, offset, seg.size-offset), 64<<10)
	var out []record
	for bytes := int64(0); seq < seg.first+seg.count && len(out) < most && bytes < mostBytes; seq++ {
		payload, err := readRecord(br)
		if err != nil {
			return nil, errs.Wrap(errs.Corrupt, err, "entry %d of the audit spool", seq)
		}
		offset += 8 + int64(len(payload))
		if seq < pend {
			continue
		}
		bytes += int64(len(payload))
		r := record{seq: seq}
		if err := json.Unmarshal(payload, &r.entry); err != nil {
			return nil, errs.Wrap(errs.Corrupt, err, "entry %d of the audit spool", seq)
		}
		out = append(out, r)
	}
	return out, nil
}

// done forgets all entries up to seq.
func (s *spool) done(seq uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seq < s.pend {
		return nil
	}
	s.pend, s.offset = seq+1, 0
	err := s.dropLocked()
	// Not synced: losing it means delivering some entries again.
	tmp := filepath.Join(s.dir, cursorName+".tmp")
	if werr := os.WriteFile(tmp, []byte(strconv.FormatUint(seq, 10)+"\n"), 0o600); werr != nil {
		return errors.Join(err, werr)
	}
	return errors.Join(err, os.Rename(tmp, filepath.Join(s.dir, cursorName)))
}

// dropLocked removes segments whose entries are all delivered; never the one that is written to.
func (s *spool) dropLocked() error {
	for len(s.segments) > 0 {
		g := s.segments[0]
		if len(s.segments) == 1 && s.file != nil || g.first+g.count > s.pend {
			return nil
		}
		if err := os.Remove(g.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		s.bytes -= uint64(g.size)
		s.segments = s.segments[1:]
	}
	return nil
}

func (s *spool) last() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nextSeq - 1
}

func (s *spool) firstPending() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pend
}

func (s *spool) hasRoom() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes+min(reserve, s.limit/2) <= s.limit
}

func (s *spool) close() error {
	s.mu.Lock()
	already := s.closed
	s.closed = true
	s.mu.Unlock()
	if already {
		return nil
	}
	close(s.quit)
	s.wg.Wait()
	return s.file.Close()
}

func (s *spool) syncDir() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return s.sync(d)
}
