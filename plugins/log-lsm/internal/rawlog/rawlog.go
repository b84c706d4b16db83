// Package rawlog is the log of entries that are acknowledged but not packed yet: a directory of files that are
// only appended to, synced before an append is answered, and read again only at start.
//
// Pebble has such a log, but what is written to it also goes through memtables and tables, though it lives
// only until it is packed: several times the cost of everything else. A write that fails here is one
// error, not the end of the process.
//
// A file is
//
//	magic 8, number 8, number of the file before 8, end of the file before 8, CRC-32C of that 4, zero 4
//	records: CRC-32C 4, magic 4, payload length 4, zero 4, synced 8, payload, zeros up to a multiple of 8
//
// all little-endian. The CRC of a record is over the file's number, the rest of the record's head and its
// payload, so that records of a file's earlier life (files are used again) are not taken for new ones.
// "synced" is up to where the file was known to be durable when the record was written. Reading ends at the
// first record that is not valid: after a power cut, that is where the unacknowledged begins. Should a later
// record claim that this place was durable, or the next file that the file went on, it is damage.
package rawlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

const (
	fileMagic   = 0x31676f6c7772766d // "mvrwlog1"
	recordMagic = 0x3163726d         // "mrc1"
	fileHead    = 40
	recordHead  = 24
	suffix      = ".raw"

	// FileSize is when a file is full. Small files let space come back soon; each costs two syncs.
	FileSize = 16 << 20
	// maxRecord bounds what a damaged length can make us read.
	maxRecord = 1 << 30
	// spares is how many files are kept for use again: writing over a file needs no change of its metadata,
	// so that a sync is one write less.
	spares = 2
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// Log is an open log. Append and Release belong to one goroutine each; Sync may be called by another.
type Log struct {
	fs     vfs.FS
	dir    string
	levels int

	mu     sync.Mutex // guards what follows; not held while syncing
	files  []file     // oldest first; the last is being written
	spare  []string
	next   uint64
	off    int64 // in the last file
	synced int64 // of the last file

	cur     vfs.File
	syncing sync.Mutex // held while cur is synced; rotation takes it
	buf     []byte
}

type file struct {
	num  uint64
	size int64
	end  []uint64 // by level: arrival number behind the last entry here
}

// Part is the entries of one level in a record.
type Part struct {
	Level byte
	First uint64 // arrival number of the first
	Count int
	Data  []byte
}

// Damage is an acknowledged part of the log that cannot be read.
type Damage struct {
	File string
	At   int64
	Text string
}

func (d Damage) String() string { return fmt.Sprintf("%s at %d: %s", d.File, d.At, d.Text) }

// Open reads the log in a directory, made if absent, and begins a new file unless readOnly. fn is called for
// each part, in the order in which they were written; what it is given is its own.
func Open(fs vfs.FS, dir string, levels int, readOnly bool, fn func(Part) error) (*Log, []Damage, error) {
	l := &Log{fs: fs, dir: dir, levels: levels}
	if !readOnly {
		err := fs.MkdirAll(dir, 0o700)
		var parent vfs.File
		if err == nil {
			parent, err = fs.OpenDir(fs.PathDir(dir))
		}
		if err == nil {
			err = errors.Join(parent.Sync(), parent.Close())
		}
		if err != nil {
			return nil, nil, err
		}
	}
	names, err := fs.List(dir)
	if err != nil {
		if readOnly {
			return l, nil, nil
		}
		return nil, nil, err
	}
	slices.Sort(names)
	var damages []Damage
	type read struct {
		name      string
		num, prev uint64
		prevEnd   int64
		end       int64
	}
	var last *read
	for _, name := range names {
		var num uint64
		if _, err := fmt.Sscanf(name, "%016x"+suffix, &num); err != nil || name != fileName(num) {
			if strings.HasSuffix(name, suffix) && !readOnly {
				_ = fs.Remove(fs.PathJoin(dir, name))
			}
			continue
		}
		l.next = max(l.next, num+1)
		b, err := readFile(fs, fs.PathJoin(dir, name))
		if err != nil {
			return nil, damages, err
		}
		r := read{name: name, num: num}
		if r.prev, r.prevEnd, err = parseHead(b, num); err != nil {
			// Not yet begun when the power went: nothing in it has been acknowledged. Were there a later
			// file, it would say that this one went on.
			if !readOnly {
				l.spare = append(l.spare, name)
			}
			continue
		}
		if last != nil && r.prev == last.num && r.prevEnd > last.end {
			damages = append(damages, Damage{last.name, last.end, fmt.Sprintf("%d bytes of acknowledged entries cannot be read", r.prevEnd-last.end)})
		}
		f := file{num: num, end: make([]uint64, levels)}
		r.end = fileHead
		for {
			payload, synced, n := parseRecord(b, r.end, num)
			if n == 0 {
				break
			}
			_ = synced
			if err := eachPart(payload, func(p Part) error {
				if int(p.Level) >= levels {
					return fmt.Errorf("level %d", p.Level)
				}
				f.end[p.Level] = max(f.end[p.Level], p.First+uint64(p.Count))
				return fn(p)
			}); err != nil {
				return nil, damages, fmt.Errorf("%s at %d: %w", name, r.end, err)
			}
			r.end += n
		}
		if at, ok := claims(b, r.end, num); ok {
			damages = append(damages, Damage{name, r.end, fmt.Sprintf("a record cannot be read, though it was durable when the one at %d was written", at)})
			// What comes behind is given all the same.
			for at := at; ; {
				payload, _, n := parseRecord(b, at, num)
				if n == 0 {
					break
				}
				_ = eachPart(payload, func(p Part) error {
					if int(p.Level) < levels {
						f.end[p.Level] = max(f.end[p.Level], p.First+uint64(p.Count))
						return fn(p)
					}
					return nil
				})
				at += n
				r.end = at
			}
		}
		f.size = r.end
		l.files = append(l.files, f)
		last = &r
	}
	if readOnly {
		return l, damages, nil
	}
	prev, prevEnd := uint64(0), int64(0)
	if last != nil {
		prev, prevEnd = last.num, last.end
	}
	if err := l.begin(prev, prevEnd); err != nil {
		return nil, damages, err
	}
	return l, damages, nil
}

func fileName(num uint64) string { return fmt.Sprintf("%016x"+suffix, num) }

// begin makes the next file current. The one before is durable already.
func (l *Log) begin(prev uint64, prevEnd int64) error {
	l.mu.Lock()
	num := l.next
	l.next++
	spare := ""
	if len(l.spare) > 0 {
		spare = l.spare[len(l.spare)-1]
		l.spare = l.spare[:len(l.spare)-1]
	}
	l.mu.Unlock()
	path := l.fs.PathJoin(l.dir, fileName(num))
	var f vfs.File
	var err error
	if spare != "" {
		f, err = l.fs.ReuseForWrite(l.fs.PathJoin(l.dir, spare), path, vfs.WriteCategoryUnspecified)
	} else if f, err = l.fs.Create(path, vfs.WriteCategoryUnspecified); err == nil {
		// Only a hint: where it fails, writes find out.
		_ = f.Preallocate(0, FileSize)
	}
	if err != nil {
		return err
	}
	h := binary.LittleEndian.AppendUint64(nil, fileMagic)
	h = binary.LittleEndian.AppendUint64(h, num)
	h = binary.LittleEndian.AppendUint64(h, prev)
	h = binary.LittleEndian.AppendUint64(h, uint64(prevEnd))
	h = binary.LittleEndian.AppendUint32(h, crc32.Checksum(h, crcTable))
	h = append(h, 0, 0, 0, 0)
	if _, err = f.WriteAt(h, 0); err == nil {
		err = f.Sync()
	}
	if err == nil {
		var d vfs.File
		if d, err = l.fs.OpenDir(l.dir); err == nil {
			err = errors.Join(d.Sync(), d.Close())
		}
	}
	if err != nil {
		_ = f.Close()
		_ = l.fs.Remove(path)
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cur, l.off, l.synced = f, fileHead, fileHead
	l.files = append(l.files, file{num: num, size: fileHead, end: make([]uint64, l.levels)})
	return nil
}

// Append writes one record; it is durable after the next Sync. After an error nothing of it counts, and a
// later Append may succeed.
func (l *Log) Append(parts []Part) error {
	l.mu.Lock()
	full := l.off >= FileSize || l.cur == nil
	l.mu.Unlock()
	if full {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	size := 0
	for _, p := range parts {
		size += partHead + len(p.Data)
	}
	l.mu.Lock()
	f := &l.files[len(l.files)-1]
	off, synced, num, cur := l.off, l.synced, f.num, l.cur
	l.mu.Unlock()
	b := append(l.buf[:0], make([]byte, recordHead)...)
	for _, p := range parts {
		b = append(b, p.Level)
		b = binary.LittleEndian.AppendUint64(b, p.First)
		b = binary.LittleEndian.AppendUint32(b, uint32(p.Count))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(p.Data)))
		b = append(b, p.Data...)
	}
	binary.LittleEndian.PutUint32(b[4:], recordMagic)
	binary.LittleEndian.PutUint32(b[8:], uint32(size))
	binary.LittleEndian.PutUint64(b[16:], uint64(synced))
	binary.LittleEndian.PutUint32(b, sum(num, b[4:recordHead], b[recordHead:]))
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	l.buf = b
	if cap(l.buf) > 8<<20 {
		l.buf = nil
	}
	if _, err := cur.WriteAt(b, off); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.off = off + int64(len(b))
	f = &l.files[len(l.files)-1]
	f.size = l.off
	for _, p := range parts {
		f.end[p.Level] = max(f.end[p.Level], p.First+uint64(p.Count))
	}
	return nil
}

// rotate begins a new file. What stands in the old one is durable first, so that Sync need only know the
// last.
func (l *Log) rotate() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if l.cur != nil {
		if err := l.cur.SyncData(); err != nil {
			return err
		}
	}
	l.mu.Lock()
	old, prev, end := l.cur, uint64(0), int64(0)
	if n := len(l.files); n > 0 {
		prev, end = l.files[n-1].num, l.files[n-1].size
	}
	l.mu.Unlock()
	if err := l.begin(prev, end); err != nil {
		return err
	}
	if old != nil {
		_ = old.Close()
	}
	return nil
}

// Sync makes everything durable that was appended before the call.
func (l *Log) Sync() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.mu.Lock()
	if l.cur == nil {
		l.mu.Unlock()
		return nil
	}
	cur, off, num := l.cur, l.off, l.files[len(l.files)-1].num
	l.mu.Unlock()
	if err := cur.SyncData(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.files[len(l.files)-1].num == num {
		l.synced = max(l.synced, off)
	}
	return nil
}

// Release removes the files whose entries are all before these arrival numbers, by level.
func (l *Log) Release(packed []uint64) error {
	var gone []string
	l.mu.Lock()
	for len(l.files) > 1 {
		for level, end := range l.files[0].end {
			if end > packed[level] {
				l.mu.Unlock()
				return l.remove(gone)
			}
		}
		gone = append(gone, fileName(l.files[0].num))
		l.files = l.files[1:]
	}
	l.mu.Unlock()
	return l.remove(gone)
}

// Trim gives back the space of spare files, and when the caller knows that all entries are packed and
// durable elsewhere, of the whole log. It belongs to the goroutine that appends.
func (l *Log) Trim(empty bool) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.mu.Lock()
	gone := l.spare
	l.spare = nil
	cur := l.cur
	if empty && cur != nil && l.off > fileHead {
		for _, f := range l.files {
			gone = append(gone, fileName(f.num))
		}
		l.files, l.cur = nil, nil
	} else {
		cur = nil
	}
	l.mu.Unlock()
	var err error
	if cur != nil {
		err = cur.Close()
	}
	for _, n := range gone {
		err = errors.Join(err, l.fs.Remove(l.fs.PathJoin(l.dir, n)))
	}
	return err
}

func (l *Log) remove(names []string) error {
	var err error
	for _, n := range names {
		l.mu.Lock()
		keep := len(l.spare) < spares
		if keep {
			l.spare = append(l.spare, n)
		}
		l.mu.Unlock()
		if !keep {
			err = errors.Join(err, l.fs.Remove(l.fs.PathJoin(l.dir, n)))
		}
	}
	return err
}

// FileInfo is a file of the log and how many bytes of it are written.
type FileInfo struct {
	Name string
	Size int64
}

// Files lists what is in use. The bytes named do not change until Release.
func (l *Log) Files() []FileInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []FileInfo
	for _, f := range l.files {
		out = append(out, FileInfo{fileName(f.num), f.size})
	}
	return out
}

// Oldest is the arrival numbers, by level, behind the entries of the oldest file that holds any when all
// files together have at least size bytes; nil otherwise.
func (l *Log) Oldest(size int64) []uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	total := int64(0)
	for _, f := range l.files {
		total += f.size
	}
	if total < size || len(l.files) < 2 {
		return nil
	}
	return slices.Clone(l.files[0].end)
}

// Size is the bytes in use.
func (l *Log) Size() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	total := int64(0)
	for _, f := range l.files {
		total += f.size
	}
	return uint64(total)
}

// Close syncs and closes the log.
func (l *Log) Close() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if l.cur == nil {
		return nil
	}
	err := errors.Join(l.cur.SyncData(), l.cur.Close())
	l.cur = nil
	return err
}
