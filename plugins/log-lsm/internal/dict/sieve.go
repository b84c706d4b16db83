package dict

import (
	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
)

// sieve tells of most object ids that are new that they are (a Bloom filter over all that have a number): to ask
// Pebble for a key that is not there costs more than all else that is done for an id.
type sieve struct {
	bits  []uint64
	n     int
	ready bool // all ids that were in the store at start are in
}

// A sieve of 2 MiB is right for a million ids: of new ones it lets 0.1 % through to Pebble. With more ids it is
// given up.
const (
	sieveLog    = 24
	sieveMost   = 1 << 20
	sieveProbes = 6
)

func (s *sieve) add(h head.ObjectHash) {
	if s.n++; s.n > sieveMost {
		s.bits, s.ready = nil, false
		return
	}
	if s.bits == nil {
		s.bits = make([]uint64, 1<<sieveLog/64)
	}
	for i := range uint64(sieveProbes) {
		x := (h.A + i*(h.B|1)) >> (64 - sieveLog)
		s.bits[x/64] |= 1 << (x % 64)
	}
}

// lacks says that an id is not in for certain.
func (s *sieve) lacks(h head.ObjectHash) bool {
	if !s.ready {
		return false
	}
	if s.bits == nil {
		return true // nothing was ever added
	}
	for i := range uint64(sieveProbes) {
		x := (h.A + i*(h.B|1)) >> (64 - sieveLog)
		if s.bits[x/64]&(1<<(x%64)) == 0 {
			return true
		}
	}
	return false
}

// Fill reads which ids the store has, so that new ones are known to be new without asking it. it is over all keys
// of keys.Object and was made before the first Intern; it stays the caller's. Until Fill is done, and
// when it fails or stop is closed, the store is asked.
func (d *Objects) Fill(it *pebble.Iterator, stop <-chan struct{}) {
	ok := it.First()
	for ok {
		select {
		case <-stop:
			return
		default:
		}
		// Not all under one lock: queries go on meanwhile.
		d.mu.Lock()
		for i := 0; ok && i < 256; i++ {
			d.known.add(d.Hash(it.Key()[1:]))
			ok = it.Next()
		}
		full := d.known.n > sieveMost
		d.mu.Unlock()
		if full {
			return
		}
	}
	if it.Error() != nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.known.ready = d.known.n <= sieveMost
}
