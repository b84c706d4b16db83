package vhost

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// maxRegions is how many memory regions a front-end may have: QEMU and cloud-hypervisor use a few, and a
// few dozen with memory hot-plug.
const maxRegions = 64

// region is a part of guest memory that is mapped here.
type region struct {
	gpa  uint64 // guest physical address: what descriptors say
	user uint64 // address in the front-end: what ring addresses say
	mem  []byte // exactly the region
	full []byte // the mapping that it lies in
	fd   int    // its file, kept for Session
}

func (r *region) unmap() {
	_ = unix.Munmap(r.full)
	unix.Close(r.fd)
}

// memory is a guest's memory.
type memory struct {
	regions []region
	last    int // where the last address was found
}

// regionLen is the size of a region in messages: guest address, size, user address, offset in the file.
const regionLen = 32

// mapRegion maps one region from its file, which it takes over. The file must hold the region now; should it
// shrink later, an access faults, which ends the NIC's connection (see the worker's loop).
func mapRegion(gpa, size, user, offset uint64, fd int) (_ region, err error) {
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return region{}, err
	}
	const limit = 1 << 46 // keeps all sums below far from overflowing
	switch {
	case size == 0 || size > limit || offset > limit || gpa+size < gpa || user+size < user:
		return region{}, fmt.Errorf("memory region at %#x, %#x bytes, cannot be", gpa, size)
	case st.Size < 0 || offset+size > uint64(st.Size):
		return region{}, fmt.Errorf("memory region of %#x bytes at offset %#x in a file of %#x", size, offset, st.Size)
	}
	full, err := unix.Mmap(fd, 0, int(offset+size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return region{}, fmt.Errorf("map guest memory: %w", err)
	}
	_ = unix.Madvise(full, unix.MADV_DONTDUMP)
	return region{gpa: gpa, user: user, mem: full[offset : offset+size : offset+size], full: full, fd: fd}, nil
}

func (r *region) overlaps(o *region) bool {
	return r.gpa < o.gpa+uint64(len(o.mem)) && o.gpa < r.gpa+uint64(len(r.mem))
}

// add adds a region.
func (m *memory) add(r region) error {
	err := errors.New("memory regions overlap")
	if len(m.regions) >= maxRegions {
		err = errors.New("too many memory regions")
	} else {
		ok := true
		for i := range m.regions {
			ok = ok && !r.overlaps(&m.regions[i])
		}
		if ok {
			m.regions = append(m.regions, r)
			return nil
		}
	}
	r.unmap()
	return err
}

// remove removes the region that begins at these addresses.
func (m *memory) remove(gpa, size, user uint64) bool {
	for i := range m.regions {
		if r := &m.regions[i]; r.gpa == gpa && uint64(len(r.mem)) == size && r.user == user {
			r.unmap()
			m.regions = append(m.regions[:i], m.regions[i+1:]...)
			m.last = 0
			return true
		}
	}
	return false
}

// clear unmaps everything.
func (m *memory) clear() {
	for i := range m.regions {
		m.regions[i].unmap()
	}
	m.regions, m.last = nil, 0
}

// at finds what a descriptor means: the memory from a guest address on, at most n bytes, shorter where a
// region ends. It is nil if there is nothing.
func (m *memory) at(gpa uint64, n uint32) []byte {
	if m.last < len(m.regions) {
		r := &m.regions[m.last]
		if off := gpa - r.gpa; gpa >= r.gpa && off < uint64(len(r.mem)) {
			return r.mem[off:min(off+uint64(n), uint64(len(r.mem)))]
		}
	}
	return m.find(gpa, n)
}

// find is at for an address in another region than the last one.
func (m *memory) find(gpa uint64, n uint32) []byte {
	for i := range m.regions {
		r := &m.regions[i]
		if off := gpa - r.gpa; gpa >= r.gpa && off < uint64(len(r.mem)) {
			m.last = i
			return r.mem[off:min(off+uint64(n), uint64(len(r.mem)))]
		}
	}
	return nil
}

// user finds n bytes at an address of the front-end, all in one region, aligned as asked.
func (m *memory) user(addr uint64, n, align int) ([]byte, error) {
	for i := range m.regions {
		r := &m.regions[i]
		off := addr - r.user
		if addr < r.user || off >= uint64(len(r.mem)) {
			continue
		}
		if uint64(n) > uint64(len(r.mem))-off {
			break
		}
		if addr%uint64(align) != 0 || off%uint64(align) != 0 {
			return nil, fmt.Errorf("ring at %#x is not aligned to %d", addr, align)
		}
		return r.mem[off : off+uint64(n)], nil
	}
	return nil, fmt.Errorf("%d bytes at %#x are not in the guest's memory", n, addr)
}
