// Package dict gives numbers to the byte strings that entries have in common: object ids and shapes. Both
// directions are kept in the store, and a bounded part of them in memory.
package dict

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
)

// Getter is what a dictionary reads from: *pebble.DB.
type Getter interface {
	Get(key []byte) ([]byte, io.Closer, error)
}

// ErrMissing is returned for a number that has no text: the store is damaged.
var ErrMissing = errors.New("number is not in the dictionary")

// Objects maps object ids to numbers and back. Lookups may be concurrent; Intern, Flush and Done belong to
// one goroutine.
type Objects struct {
	db   Getter
	a, b maphash.Seed

	mu      sync.Mutex
	next    uint32
	byHash  []hashSlot // in sets of ways
	byNum   []slot     // direct-mapped by number
	pending []string   // interned since the last Done: numbers next-len … next-1
	fresh   map[string]uint32
	damaged damage
	known   sieve
}

// damage remembers what could not be read: each try costs Pebble the search for a flipped bit.
type damage map[uint32]error

const maxDamage = 4096

func (d *damage) noteLocked(num uint32, err error) {
	if *d == nil || len(*d) >= maxDamage {
		*d = damage{}
	}
	(*d)[num] = err
}

type slot struct {
	text string
	num  uint32
}

type hashSlot struct {
	hash head.ObjectHash
	num  uint32
}

// Hash is what stands for an object id in memory.
func (d *Objects) Hash(text []byte) head.ObjectHash {
	return head.ObjectHash{A: maphash.Bytes(d.a, text), B: maphash.Bytes(d.b, text)}
}

// NewObjects makes the dictionary; next is the first free number (from 1), slots how many ids are kept in
// memory (rounded up to a power of two; about 100 bytes each).
func NewObjects(db Getter, next uint32, slots int) *Objects {
	n := 1024
	for n < slots {
		n *= 2
	}
	return &Objects{db: db, a: maphash.MakeSeed(), b: maphash.MakeSeed(), next: next, byHash: make([]hashSlot, n), byNum: make([]slot, n), fresh: map[string]uint32{}}
}

// Next is the first free number.
func (d *Objects) Next() uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.next
}

// ways is how many places an id has in byText.
const ways = 4

// setLocked is the places of a hash.
func (d *Objects) setLocked(h uint64) []hashSlot {
	i := h & uint64(len(d.byHash)/ways-1) * ways
	return d.byHash[i : i+ways]
}

// putLocked remembers an id; of those in the same places the one that was put first goes.
func (d *Objects) putLocked(h head.ObjectHash, text string, num uint32) {
	set := d.setLocked(h.A)
	if set[0].num != num {
		copy(set[1:], set)
		set[0] = hashSlot{h, num}
	}
	d.byNum[num&uint32(len(d.byNum)-1)] = slot{text, num}
}

// Known returns the numbers of object ids from memory, 0 for those that are not there.
func (d *Objects) Known(dst []uint32, hashes []head.ObjectHash) []uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, h := range hashes {
		num := uint32(0)
		for _, s := range d.setLocked(h.A) {
			if s.hash == h && s.num != 0 {
				num = s.num
				break
			}
		}
		dst = append(dst, num)
	}
	return dst
}

// Find returns the number of an object id; ok is false when no packed entry carries it.
func (d *Objects) Find(text []byte) (num uint32, ok bool, err error) {
	h := d.Hash(text)
	d.mu.Lock()
	for _, s := range d.setLocked(h.A) {
		if s.num != 0 && s.hash == h {
			d.mu.Unlock()
			return s.num, true, nil
		}
	}
	num, ok = d.fresh[string(text)]
	lacks := d.known.lacks(h)
	d.mu.Unlock()
	if ok || lacks {
		return num, ok, nil
	}
	v, closer, err := d.db.Get(keys.BytesKey(keys.Object, text))
	if errors.Is(err, pebble.ErrNotFound) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer closer.Close()
	if len(v) != 4 {
		return 0, false, fmt.Errorf("object number of %d bytes", len(v))
	}
	num = binary.BigEndian.Uint32(v)
	d.mu.Lock()
	d.putLocked(h, string(text), num)
	d.mu.Unlock()
	return num, true, nil
}

// Intern returns the number of an object id and makes one where there is none.
func (d *Objects) Intern(text []byte) (uint32, error) {
	num, ok, err := d.Find(text)
	if ok || err != nil {
		return num, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	num = d.next
	if num == 1<<32-1 {
		return 0, errors.New("four thousand million object ids have been used")
	}
	d.next++
	s := string(text)
	d.fresh[s] = num
	d.pending = append(d.pending, s)
	h := d.Hash(text)
	d.known.add(h)
	d.putLocked(h, s, num)
	return num, nil
}

// Flush writes what Intern made since the last Done into b.
func (d *Objects) Flush(b *pebble.Batch) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return flush(b, keys.Object, keys.Name, d.pending, d.next)
}

func flush(b *pebble.Batch, fwd, rev byte, pending []string, next uint32) error {
	first := next - uint32(len(pending))
	for i, s := range pending {
		num := first + uint32(i)
		v := binary.BigEndian.AppendUint32(nil, num)
		if err := b.Set(keys.BytesKey(fwd, []byte(s)), v, nil); err != nil {
			return err
		}
		if err := b.Set(keys.NumberKey(rev, num), []byte(s), nil); err != nil {
			return err
		}
	}
	return nil
}

// Done says that the batch of Flush has been committed.
func (d *Objects) Done() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pending = d.pending[:0]
	clear(d.fresh)
}

// Name returns the object id of a number.
func (d *Objects) Name(num uint32) (string, error) {
	d.mu.Lock()
	s := d.byNum[num&uint32(len(d.byNum)-1)]
	bad := d.damaged[num]
	d.mu.Unlock()
	if s.num == num && num != 0 {
		return s.text, nil
	}
	if bad != nil {
		return "", bad
	}
	v, closer, err := d.db.Get(keys.NumberKey(keys.Name, num))
	if errors.Is(err, pebble.ErrNotFound) {
		err = fmt.Errorf("object %d: %w", num, ErrMissing)
	}
	if err != nil {
		d.mu.Lock()
		d.damaged.noteLocked(num, err)
		d.mu.Unlock()
		return "", err
	}
	h := d.Hash(v)
	text := string(v)
	_ = closer.Close()
	d.mu.Lock()
	d.putLocked(h, text, num)
	d.mu.Unlock()
	return text, nil
}

// Forget drops ids from memory after they have been deleted from the store.
func (d *Objects) Forget(nums []uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, num := range nums {
		i := num & uint32(len(d.byNum)-1)
		if s := d.byNum[i]; s.num == num {
			d.byNum[i] = slot{}
		}
	}
	gone := make(map[uint32]bool, len(nums))
	for _, n := range nums {
		gone[n] = true
	}
	for i, s := range d.byHash {
		if gone[s.num] {
			d.byHash[i] = hashSlot{}
		}
	}
}

// Limits of the shape dictionary.
const (
	maxShapesInMemory = 8192
	maxCandidates     = 1 << 16
	// MaxShapes bounds the dictionary: text beyond it is stored whole. A host's software has some
	// thousand shapes; who makes up messages at will shall not fill the dictionary.
	MaxShapes = 1 << 18
	// worth is how often a shape must have been seen to get a number.
	worth = 4
)

// Shapes is the dictionary of shapes. Shape may be called concurrently; Intern, Flush and Done belong to one
// goroutine.
type Shapes struct {
	db   Getter
	seed maphash.Seed

	mu      sync.Mutex
	next    uint32
	byText  map[string]*block.Shape
	byNum   map[uint32]*block.Shape
	texts   map[uint32]string
	pending []string
	fresh   map[uint32]bool
	seen    map[uint64]uint8 // hash of a text that has no number → times seen
	damaged damage
}

// NewShapes makes the dictionary; next is the first free number, from 1.
func NewShapes(db Getter, next uint32) *Shapes {
	return &Shapes{db: db, seed: maphash.MakeSeed(), next: next, byText: map[string]*block.Shape{}, byNum: map[uint32]*block.Shape{},
		texts: map[uint32]string{}, fresh: map[uint32]bool{}, seen: map[uint64]uint8{}}
}

// Next is the first free number.
func (d *Shapes) Next() uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.next
}

func (d *Shapes) putLocked(text string, s *block.Shape) {
	if len(d.byNum) >= maxShapesInMemory {
		for num := range d.byNum {
			if !d.fresh[num] {
				delete(d.byText, d.texts[num])
				delete(d.texts, num)
				delete(d.byNum, num)
				break
			}
		}
	}
	d.byText[text], d.byNum[s.Num], d.texts[s.Num] = s, s, text
}

// Intern returns the shape of a text; nil when the text is too rare to be one.
func (d *Shapes) Intern(text []byte) (*block.Shape, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s := d.byText[string(text)]; s != nil {
		return s, nil
	}
	h := maphash.Bytes(d.seed, text)
	n := d.seen[h] + 1
	if n < worth {
		if len(d.seen) >= maxCandidates {
			clear(d.seen)
		}
		d.seen[h] = n
		return nil, nil
	}
	delete(d.seen, h)
	v, closer, err := d.db.Get(keys.BytesKey(keys.Shape, text))
	switch {
	case err == nil:
		bad := len(v) != 4
		num := uint32(0)
		if !bad {
			num = binary.BigEndian.Uint32(v)
		}
		_ = closer.Close()
		if bad {
			return nil, errors.New("a shape's number is malformed")
		}
		s, err := block.ParseShape(num, string(text))
		if err != nil {
			return nil, err
		}
		d.putLocked(string(text), s)
		return s, nil
	case !errors.Is(err, pebble.ErrNotFound):
		return nil, err
	case d.next >= MaxShapes:
		return nil, nil
	}
	s, err := block.ParseShape(d.next, string(text))
	if err != nil {
		return nil, err
	}
	d.next++
	d.fresh[s.Num] = true
	d.pending = append(d.pending, string(text))
	d.putLocked(string(text), s)
	return s, nil
}

// Flush writes what Intern made since the last Done into b.
func (d *Shapes) Flush(b *pebble.Batch) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return flush(b, keys.Shape, keys.Text, d.pending, d.next)
}

// Done says that the batch of Flush has been committed.
func (d *Shapes) Done() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pending = d.pending[:0]
	clear(d.fresh)
}

// Shape returns the shape of a number.
func (d *Shapes) Shape(num uint32) (*block.Shape, error) {
	d.mu.Lock()
	s, bad := d.byNum[num], d.damaged[num]
	d.mu.Unlock()
	if s != nil {
		return s, nil
	}
	if bad != nil {
		return nil, bad
	}
	v, closer, err := d.db.Get(keys.NumberKey(keys.Text, num))
	if errors.Is(err, pebble.ErrNotFound) {
		err = fmt.Errorf("shape %d: %w", num, ErrMissing)
	}
	if err != nil {
		d.mu.Lock()
		d.damaged.noteLocked(num, err)
		d.mu.Unlock()
		return nil, err
	}
	text := string(v)
	_ = closer.Close()
	if s, err = block.ParseShape(num, text); err != nil {
		return nil, fmt.Errorf("shape %d: %w", num, err)
	}
	d.mu.Lock()
	d.putLocked(text, s)
	d.mu.Unlock()
	return s, nil
}
