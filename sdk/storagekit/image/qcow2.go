package image

import (
	"encoding/binary"
	"errors"
	"io"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Limits of the qcow2 format itself, as QEMU's block/qcow2.h has them.
const (
	qcowMinClusterBits = 9
	qcowMaxClusterBits = 21
	qcowMaxL1Bytes     = 32 << 20
)

// Bits of the incompatible features field (qcow2.txt, "Header").
const (
	featDirty       = 1 << 0
	featCorrupt     = 1 << 1
	featDataFile    = 1 << 2
	featCompression = 1 << 3
	featExtendedL2  = 1 << 4
)

const (
	l2Compressed   = 1 << 62
	l2Zero         = 1 << 0
	offsetMask     = 0x00fffffffffffe00
	l1ReservedMask = ^uint64(offsetMask | 1<<63)
	l2ReservedMask = ^uint64(offsetMask | 1<<63 | 1<<62 | 1)
)

type compression uint8

const (
	compressionZlib compression = 0
	compressionZstd compression = 1
)

// qcow2 is an opened image: header and L1 table, checked.
type qcow2 struct {
	src         Source
	version     uint32
	clusterBits uint
	clusterSize int64
	size        int64 // of the virtual disk
	l1          []uint64
	compression compression
}

// openQcow2 reads and checks the header and the L1 table. Everything that would make a reader look outside
// the image, or need more than the image, is refused here.
func openQcow2(src Source, lim Limits) (*qcow2, error) {
	var h [112]byte
	n, err := src.ReadAt(h[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if n < 72 {
		return nil, truncated("the qcow2 header", 0, int64(n))
	}
	be := binary.BigEndian
	q := &qcow2{src: src, version: be.Uint32(h[4:])}
	if q.version != 2 && q.version != 3 {
		return nil, refuse(toRaw, "the image is qcow2 of version %d; versions 2 and 3 are known", q.version)
	}
	if q.version == 3 {
		if err := q.openV3(h[:n]); err != nil {
			return nil, err
		}
	}
	if off, size := be.Uint64(h[8:]), be.Uint32(h[16:]); off != 0 || size != 0 {
		return nil, refuse("flatten it first: qemu-img convert -O qcow2 IN OUT.qcow2",
			"the image has a backing file, which mvirt never follows")
	}
	if m := be.Uint32(h[32:]); m != 0 {
		return nil, refuse("decrypt it first: qemu-img convert", "the image is encrypted (method %d)", m)
	}
	q.clusterBits = uint(be.Uint32(h[20:]))
	if q.clusterBits < qcowMinClusterBits || q.clusterBits > qcowMaxClusterBits {
		return nil, refuse("the file is damaged: fetch it again", "the image's cluster bits are %d, not 9 to 21", q.clusterBits)
	}
	q.clusterSize = 1 << q.clusterBits
	size := be.Uint64(h[24:])
	if size == 0 {
		return nil, refuse("check the file", "the image's disk has no size")
	}
	if size > uint64(lim.MaxVirtualSize) {
		return nil, tooLarge(size, lim.MaxVirtualSize)
	}
	q.size = int64(size)
	return q, q.readL1(be.Uint32(h[36:]), be.Uint64(h[40:]))
}

func tooLarge(size uint64, limit int64) error {
	return errs.New(errs.Invalid, "the image says that its disk has %d bytes; the limit is %d", size, limit).
		Because("IMAGE_TOO_LARGE").Do("check the image, or raise --max-image-size")
}

func (q *qcow2) openV3(h []byte) error {
	if len(h) < 104 {
		return truncated("the qcow2 header", 0, int64(len(h)))
	}
	be := binary.BigEndian
	length := be.Uint32(h[100:])
	if length < 104 || length%8 != 0 {
		return refuse("the file is damaged: fetch it again", "the image's header length is %d", length)
	}
	if o := be.Uint32(h[96:]); o > 6 {
		return refuse("the file is damaged: fetch it again", "the image's refcount order is %d, not 0 to 6", o)
	}
	f := be.Uint64(h[72:])
	switch {
	case f&featCorrupt != 0:
		return refuse("repair it with qemu-img check -r all, or fetch it again", "the image is marked as corrupt")
	case f&featDataFile != 0:
		return refuse("flatten it first: qemu-img convert -O qcow2 IN OUT.qcow2",
			"the image keeps its data in an external file, which mvirt never follows")
	case f&featExtendedL2 != 0:
		return refuse("convert it first: qemu-img convert -O qcow2 -o extended_l2=off IN OUT.qcow2",
			"the image uses extended L2 entries")
	case f&^(featDirty|featCompression) != 0:
		return refuse("convert it first: qemu-img convert -O qcow2 IN OUT.qcow2",
			"the image uses features that mvirt does not know (%#x)", f)
	}
	if f&featCompression != 0 {
		if length < 112 || len(h) < 112 {
			return refuse("the file is damaged: fetch it again", "the image names a compression but its header is too short")
		}
		if h[104] > uint8(compressionZstd) {
			return refuse("convert it first: qemu-img convert -O qcow2 IN OUT.qcow2", "the image's compression %d is not known", h[104])
		}
		q.compression = compression(h[104])
	}
	return nil
}

// clustersPerL2 is the number of entries in one L2 table, which fills one cluster.
func (q *qcow2) clustersPerL2() int64 { return q.clusterSize / 8 }

func (q *qcow2) readL1(entries uint32, off uint64) error {
	span := q.clustersPerL2() * q.clusterSize // bytes of disk under one L1 entry; at most 2^39
	need := (q.size + span - 1) / span
	if int64(entries) < need || int64(entries)*8 > qcowMaxL1Bytes {
		return refuse("the file is damaged: fetch it again",
			"the image's L1 table has %d entries; its size of %d bytes needs %d, and 4194304 are allowed", entries, q.size, need)
	}
	if off == 0 || off&uint64(q.clusterSize-1) != 0 || off > 1<<62 {
		return refuse("the file is damaged: fetch it again", "the image's L1 table is at byte %d, which cannot be", off)
	}
	raw := make([]byte, need*8)
	if err := q.readFull(raw, int64(off), "the L1 table"); err != nil {
		return err
	}
	q.l1 = make([]uint64, need)
	for i := range q.l1 {
		e := binary.BigEndian.Uint64(raw[i*8:])
		if e&l1ReservedMask != 0 || e&offsetMask&uint64(q.clusterSize-1) != 0 {
			return refuse("the file is damaged: fetch it again", "L1 entry %d is %#x, which cannot be", i, e)
		}
		q.l1[i] = e & offsetMask
	}
	return nil
}

// readL2 reads the L2 table of L1 entry i into buf, one cluster long. It tells false when there is none.
func (q *qcow2) readL2(i int, buf []byte) (bool, error) {
	if q.l1[i] == 0 {
		return false, nil
	}
	return true, q.readFull(buf, int64(q.l1[i]), "an L2 table")
}

// extent is a run of disk bytes that come from one place.
type extent struct {
	kind   extentKind
	guest  int64 // offset on the disk
	length int64 // on the disk
	host   int64 // offset in the image
	packed int64 // length in the image, of a compressed cluster
}

type extentKind uint8

const (
	extentZero extentKind = iota
	extentData
	extentPacked
)

// entry decodes the L2 entry of the cluster at guest.
func (q *qcow2) entry(e uint64, guest int64) (extent, error) {
	x := extent{guest: guest, length: min(q.clusterSize, q.size-guest)}
	if e&l2Compressed != 0 {
		// Bits 0 to x-1 are the offset, the rest up to 61 the number of further sectors (qcow2.txt,
		// "Compressed Clusters Descriptor").
		shift := 62 - (q.clusterBits - 8)
		x.kind = extentPacked
		x.host = int64(e & (1<<shift - 1))
		sectors := int64(e>>shift&(1<<(q.clusterBits-8)-1)) + 1
		x.packed = sectors*512 - x.host&511
		return x, nil
	}
	off := e & offsetMask
	if e&l2ReservedMask != 0 || off&uint64(q.clusterSize-1) != 0 || (q.version < 3 && e&l2Zero != 0) {
		return x, refuse("the file is damaged: fetch it again", "the L2 entry of disk byte %d is %#x, which cannot be", guest, e)
	}
	if off == 0 || e&l2Zero != 0 {
		return x, nil
	}
	x.kind, x.host = extentData, int64(off)
	return x, nil
}

func (q *qcow2) readFull(b []byte, off int64, what string) error {
	n, err := q.src.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return truncated(what, off, off+int64(n))
	}
	return err
}
