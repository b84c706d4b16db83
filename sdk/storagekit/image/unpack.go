package image

import (
	"encoding/binary"
	"errors"

	"github.com/klauspost/compress/zstd"
)

// unpacker decompresses clusters. It belongs to one goroutine.
type unpacker struct {
	kind    compression
	inflate inflater
	zstd    *zstd.Decoder
}

// errPacked is any damage of a compressed cluster; which one is of no use to anybody.
var errPacked = errors.New("damaged compressed data")

func newUnpacker(kind compression, clusterSize int64) (*unpacker, error) {
	u := &unpacker{kind: kind}
	if kind == compressionZstd {
		var err error
		// A frame is decoded into a buffer of one cluster; the window is never larger than that.
		u.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(false),
			zstd.WithDecoderMaxMemory(uint64(max(clusterSize, 1<<20))), zstd.IgnoreChecksum(false))
		if err != nil {
			return nil, err
		}
	}
	return u, nil
}

func (u *unpacker) close() {
	if u.zstd != nil {
		u.zstd.Close()
	}
}

// unpack fills dst, which is one cluster, from src, which may have rubbish behind the data: its length is
// known to 512 bytes only.
func (u *unpacker) unpack(dst, src []byte) error {
	if u.kind == compressionZlib {
		n, err := u.inflate.inflate(dst, src)
		if err != nil || n != len(dst) {
			return errPacked
		}
		return nil
	}
	for filled := 0; filled < len(dst); {
		n, err := zstdFrame(src)
		if err != nil {
			return err
		}
		out, err := u.zstd.DecodeAll(src[:n], dst[filled:filled:len(dst)])
		// DecodeAll appends: a frame that does not fit into dst has gone elsewhere and is too long.
		if err != nil || len(out) > len(dst)-filled || (len(out) == 0 && n == 0) {
			return errPacked
		}
		filled += len(out)
		src = src[n:]
	}
	return nil
}

// zstdFrame is the length of the frame that src begins with (RFC 8878, section 3.1.1).
func zstdFrame(src []byte) (int, error) {
	if len(src) < 6 || binary.LittleEndian.Uint32(src) != 0xfd2fb528 {
		return 0, errPacked
	}
	d := src[4]
	pos := 5
	single := d&0x20 != 0
	if !single {
		pos++ // window descriptor
	}
	pos += [4]int{0, 1, 2, 4}[d&3]
	switch d >> 6 {
	case 0:
		if single {
			pos++
		}
	case 1:
		pos += 2
	case 2:
		pos += 4
	case 3:
		pos += 8
	}
	for {
		if pos+3 > len(src) {
			return 0, errPacked
		}
		h := uint32(src[pos]) | uint32(src[pos+1])<<8 | uint32(src[pos+2])<<16
		pos += 3
		size := int(h >> 3)
		switch h >> 1 & 3 {
		case 1:
			size = 1 // RLE: one byte stands for size bytes
		case 3:
			return 0, errPacked
		}
		pos += size
		if pos > len(src) {
			return 0, errPacked
		}
		if h&1 != 0 {
			break
		}
	}
	if d&4 != 0 {
		pos += 4 // checksum
	}
	if pos > len(src) {
		return 0, errPacked
	}
	return pos, nil
}
