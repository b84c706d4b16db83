package rawlog

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func readFile(fs vfs.FS, path string) ([]byte, error) {
	f, err := fs.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func parseHead(b []byte, num uint64) (prev uint64, prevEnd int64, err error) {
	if len(b) < fileHead || binary.LittleEndian.Uint64(b) != fileMagic || binary.LittleEndian.Uint64(b[8:]) != num ||
		binary.LittleEndian.Uint32(b[32:]) != crc32.Checksum(b[:32], crcTable) {
		return 0, 0, errors.New("no head")
	}
	return binary.LittleEndian.Uint64(b[16:]), int64(binary.LittleEndian.Uint64(b[24:])), nil
}

// parseRecord reads the record at off; n is its length with padding, 0 when there is none.
func parseRecord(b []byte, off int64, num uint64) (payload []byte, synced, n int64) {
	if off+recordHead > int64(len(b)) {
		return nil, 0, 0
	}
	r := b[off:]
	size := int64(binary.LittleEndian.Uint32(r[8:]))
	if binary.LittleEndian.Uint32(r[4:]) != recordMagic || size > maxRecord || recordHead+size > int64(len(r)) {
		return nil, 0, 0
	}
	if binary.LittleEndian.Uint32(r) != sum(num, r[4:recordHead], r[recordHead:recordHead+size]) {
		return nil, 0, 0
	}
	return r[recordHead : recordHead+size : recordHead+size], int64(binary.LittleEndian.Uint64(r[16:])), recordHead + (size+7)&^7
}

func sum(num uint64, head, payload []byte) uint32 {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], num)
	return crc32.Update(crc32.Update(crc32.Checksum(n[:], crcTable), crcTable, head), crcTable, payload)
}

// claims looks behind off for a record that was written when off was durable already.
func claims(b []byte, off int64, num uint64) (at int64, ok bool) {
	for at = off + 8; at+recordHead <= int64(len(b)); at += 8 {
		if binary.LittleEndian.Uint32(b[at+4:]) != recordMagic {
			continue
		}
		if _, synced, n := parseRecord(b, at, num); n > 0 && synced > off {
			return at, true
		}
	}
	return 0, false
}

// Payload: parts, each level 1, first 8, count 4, length 4, data.
const partHead = 17

func eachPart(b []byte, fn func(Part) error) error {
	for len(b) > 0 {
		if len(b) < partHead {
			return errors.New("malformed record")
		}
		p := Part{Level: b[0], First: binary.LittleEndian.Uint64(b[1:]), Count: int(binary.LittleEndian.Uint32(b[9:]))}
		n := uint64(binary.LittleEndian.Uint32(b[13:]))
		b = b[partHead:]
		if n > uint64(len(b)) {
			return errors.New("malformed record")
		}
		p.Data, b = b[:n:n], b[n:]
		if err := fn(p); err != nil {
			return err
		}
	}
	return nil
}
