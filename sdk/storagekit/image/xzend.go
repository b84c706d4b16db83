package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// sticky gives the first error of a reader again and again. io.ReadFull makes io.ErrUnexpectedEOF of a short
// image and passes on that of a decompressor; reading on tells them apart, if the decompressor does not say
// something else the second time, as xz does.
type sticky struct {
	r   io.Reader
	err error
}

func (s *sticky) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.r.Read(p)
	s.err = err
	return n, err
}

// xzFooter is the length of a stream's footer: CRC32, backward size, flags, "YZ" (The .xz File Format, 2.1.2).
const xzFooter = 12

// xzEnds tells whether an xz file of size bytes ends with the footer of a stream, padding aside. The package that
// decompresses takes the end of the file between two blocks for the end of the stream: an image that was cut
// there would be half an image, and nobody told.
func xzEnds(src io.ReaderAt, size int64) (bool, error) {
	var b [xzFooter]byte
	read := func(p []byte, off int64) error {
		if n, err := src.ReadAt(p, off); n < len(p) {
			return err
		}
		return nil
	}
	// Stream padding is zeros, a multiple of four bytes of them (2.2).
	for ; size >= xzFooter; size -= 4 {
		if err := read(b[:4], size-4); err != nil {
			return false, err
		}
		if !bytes.Equal(b[:4], []byte{0, 0, 0, 0}) {
			break
		}
	}
	if size < xzFooter {
		return false, nil
	}
	if err := read(b[:], size-xzFooter); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return b[10] == 'Y' && b[11] == 'Z' && crc32.ChecksumIEEE(b[4:10]) == binary.LittleEndian.Uint32(b[:]), nil
}
