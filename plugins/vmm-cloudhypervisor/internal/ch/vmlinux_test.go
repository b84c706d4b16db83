package ch

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// vmlinux takes the ELF kernel out of a bzImage (Documentation/arch/x86/boot.rst) whose payload is LZ4 in the
// legacy frame format, as Debian's is.
func vmlinux(t *testing.T, bzImage string) string {
	t.Helper()
	b, err := os.ReadFile(bzImage)
	if err != nil {
		t.Fatal(err)
	}
	const (
		setupSects    = 0x1f1
		payloadOffset = 0x248
		payloadLength = 0x24c
		legacyMagic   = 0x184C2102
	)
	start := (int(b[setupSects])+1)*512 + int(binary.LittleEndian.Uint32(b[payloadOffset:]))
	p := b[start : start+int(binary.LittleEndian.Uint32(b[payloadLength:]))]
	if binary.LittleEndian.Uint32(p) != legacyMagic {
		t.Skipf("the kernel's payload is not LZ4 but begins with %x, so no vmlinux can be taken out of it", p[:4])
	}
	size := int(binary.LittleEndian.Uint32(p[len(p)-4:])) // the build appends it
	var out []byte
	for p = p[4:]; len(out) < size; {
		n := int(binary.LittleEndian.Uint32(p))
		if out, err = unlz4(out, p[4:4+n]); err != nil {
			t.Fatal(err)
		}
		p = p[4+n:]
	}
	name := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(name, out, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// unlz4 appends what a block holds (lz4_Block_format.md).
func unlz4(out, b []byte) ([]byte, error) {
	base := len(out)
	length := func(n int) (int, bool) {
		for more := n == 15; more; {
			if len(b) == 0 {
				return 0, false
			}
			n += int(b[0])
			more, b = b[0] == 255, b[1:]
		}
		return n, true
	}
	for len(b) > 0 {
		token := int(b[0])
		b = b[1:]
		n, ok := length(token >> 4)
		if !ok || n > len(b) {
			break
		}
		out, b = append(out, b[:n]...), b[n:]
		if len(b) == 0 {
			return out, nil
		}
		if len(b) < 2 {
			break
		}
		back := int(binary.LittleEndian.Uint16(b))
		b = b[2:]
		n, ok = length(token & 15)
		if !ok || back == 0 || back > len(out)-base {
			break
		}
		for range n + 4 {
			out = append(out, out[len(out)-back])
		}
	}
	return nil, errors.New("damaged LZ4")
}
