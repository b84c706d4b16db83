package filecopy

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fiemapHead and fiemapExtent are struct fiemap and struct fiemap_extent of linux/fiemap.h.
type fiemapHead struct {
	start, length   uint64
	flags, mapped   uint32
	count, reserved uint32
}

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

const (
	fiocFiemap    = 0xc020660b // _IOWR('f', 11, struct fiemap)
	extentLast    = 0x1
	extentShared  = 0x2000
	extentsAtOnce = 256
)

// Unshared returns how many bytes of f no other file shares, on a file system with reflinks.
func Unshared(f *os.File) (uint64, error) {
	var req struct {
		head    fiemapHead
		extents [extentsAtOnce]fiemapExtent
	}
	var own, start uint64
	for {
		req.head = fiemapHead{start: start, length: ^uint64(0) - start, count: extentsAtOnce}
		_, _, no := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiocFiemap, uintptr(unsafe.Pointer(&req)))
		if no != 0 {
			return 0, fmt.Errorf("fiemap: %w", no)
		}
		n := min(req.head.mapped, extentsAtOnce)
		if n == 0 {
			return own, nil
		}
		for _, e := range req.extents[:n] {
			if e.flags&extentShared == 0 {
				own += e.length
			}
			if e.flags&extentLast != 0 || e.logical+e.length <= start {
				return own, nil
			}
			start = e.logical + e.length
		}
	}
}
