package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
)

// Kind is what the first bytes say an image is.
type Kind uint8

// Kinds that can be imported.
const (
	Raw Kind = iota + 1
	Qcow2
	Gzip
	Xz
	Zstd
)

// String names the kind as shown in Import.SourceFormat.
func (k Kind) String() string {
	switch k {
	case Raw:
		return "raw"
	case Qcow2:
		return "qcow2"
	case Gzip:
		return "gzip"
	case Xz:
		return "xz"
	case Zstd:
		return "zstd"
	}
	return "unknown"
}

func (k Kind) compressed() bool { return k == Gzip || k == Xz || k == Zstd }

// signature is a format by its magic number. what is set for formats that are refused.
type signature struct {
	off   int
	magic string
	kind  Kind
	what  string
}

const toRaw = "convert it first: qemu-img convert -O qcow2 IN OUT.qcow2"

// Magic numbers: from each format's own specification (see the package comment); VMDK from VMware's Virtual
// Disk Format 5.0, VHDX from MS-VHDX 2.2.1, VHD from the Virtual Hard Disk Image Format, VDI and QED from
// QEMU's block drivers' documentation, tar from POSIX pax, zip from APPNOTE.
var signatures = [...]signature{
	{0, "QFI\xfb", Qcow2, ""},
	{0, "\x1f\x8b\x08", Gzip, ""},
	{0, "\xfd7zXZ\x00", Xz, ""},
	{0, "\x28\xb5\x2f\xfd", Zstd, ""},
	{0, "KDMV", 0, "a VMDK image"},
	{0, "COWD", 0, "a VMDK image"},
	{0, "# Disk DescriptorFile", 0, "a VMDK descriptor"},
	{0, "vhdxfile", 0, "a VHDX image"},
	{0, "conectix", 0, "a VHD image"},
	{64, "\x7f\x10\xda\xbe", 0, "a VDI image"},
	{0, "QED\x00", 0, "a QED image"},
	{0, "WithoutFreeSpace", 0, "a Parallels image"},
	{0, "WithouFreSpacExt", 0, "a Parallels image"},
	{0, "QFI", 0, "a qcow image of a version before 2"},
	{0, "BZh", 0, "compressed by bzip2"},
	{0, "\x04\x22\x4d\x18", 0, "compressed by lz4"},
	{0, "LRZI", 0, "compressed by lrzip"},
	{0, "LZIP", 0, "compressed by lzip"},
	{0, "\x89LZO\x00", 0, "compressed by lzop"},
	{0, "7z\xbc\xaf\x27\x1c", 0, "a 7-Zip archive"},
	{0, "PK\x03\x04", 0, "a zip archive"},
	{0, "Rar!", 0, "a RAR archive"},
	{257, "ustar", 0, "a tar archive"},
}

// Detect tells what an image is from its first bytes. Raw is what has no magic number of anything else.
func Detect(r io.ReaderAt) (Kind, error) {
	head := make([]byte, 512)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	head = head[:n]
	if n == 0 {
		return 0, refuse("check the file or URL", "the image is empty")
	}
	for _, s := range signatures {
		if len(head) < s.off || !bytes.HasPrefix(head[s.off:], []byte(s.magic)) {
			continue
		}
		if s.kind != 0 {
			return s.kind, nil
		}
		remedy := toRaw
		switch {
		case bytes.Contains([]byte(s.what), []byte("compressed")):
			remedy = "decompress it first, or compress it with zstd, xz or gzip"
		case bytes.Contains([]byte(s.what), []byte("archive")):
			remedy = "unpack the archive first and import the disk image in it"
		}
		return 0, refuse(remedy, "the image is %s, which mvirt does not import", s.what)
	}
	// zstd's skippable frames (RFC 8878, section 3.1.2) may come first.
	if len(head) >= 4 {
		if m := binary.LittleEndian.Uint32(head); m&0xfffffff0 == 0x184d2a50 {
			return Zstd, nil
		}
	}
	text := bytes.ToLower(bytes.TrimSpace(head[:min(n, 128)]))
	if bytes.HasPrefix(text, []byte("<!doctype html")) || bytes.HasPrefix(text, []byte("<html")) {
		return 0, refuse("check the URL: it leads to a web page", "the image is an HTML page")
	}
	return Raw, nil
}
