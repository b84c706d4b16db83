// Package posixacl gives one user id access to one file, directory or device node by an entry in its POSIX
// access control list, and takes it away again, without setfacl.
//
// The list is the value of the extended attribute system.posix_acl_access: a version number, then entries of
// tag, permissions and id, little-endian (linux/posix_acl_xattr.h, acl(5)). An entry survives chown and what
// udev does to a device node, which is why volumes are handed out by it.
package posixacl

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	attr    = "system.posix_acl_access"
	version = 2
	noID    = 0xffffffff
)

// Tags of entries (linux/posix_acl.h).
const (
	userObj  = 0x01
	user     = 0x02
	groupObj = 0x04
	group    = 0x08
	mask     = 0x10
	other    = 0x20
)

// Permissions.
const (
	Read    = 4
	Write   = 2
	Execute = 1
)

type entry struct {
	tag, perm uint16
	id        uint32
}

// Grant makes uid's entry of path have perm. It changes nothing when it has already.
func Grant(path string, uid uint32, perm uint16) error {
	l, err := get(path)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(l, func(e entry) bool { return e.tag == user && e.id == uid })
	switch {
	case at >= 0 && l[at].perm == perm && effective(l)&perm == perm:
		return nil
	case at >= 0:
		l[at].perm = perm
	default:
		l = append(l, entry{user, perm, uid})
	}
	return set(path, withMask(l))
}

// Revoke removes uid's entry of path. A path that is gone, or has no such entry, is well.
func Revoke(path string, uid uint32) error {
	l, err := get(path)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	n := len(l)
	l = slices.DeleteFunc(l, func(e entry) bool { return e.tag == user && e.id == uid })
	if len(l) == n {
		return nil
	}
	if slices.ContainsFunc(l, func(e entry) bool { return e.tag == user || e.tag == group }) {
		return set(path, withMask(l))
	}
	// Nobody is named any more: back to a plain mode, so that nothing is left of us.
	l = slices.DeleteFunc(l, func(e entry) bool { return e.tag == mask })
	return set(path, l)
}

// Of returns the permissions that uid has by an entry of its own, and whether there is one.
func Of(path string, uid uint32) (perm uint16, found bool, err error) {
	l, err := get(path)
	if err != nil {
		return 0, false, err
	}
	for _, e := range l {
		if e.tag == user && e.id == uid {
			return e.perm & effective(l), true, nil
		}
	}
	return 0, false, nil
}

// effective is what the mask lets named entries have.
func effective(l []entry) uint16 {
	for _, e := range l {
		if e.tag == mask {
			return e.perm
		}
	}
	return 7
}

// withMask sets the mask to what the entries under it ask for, as setfacl does.
func withMask(l []entry) []entry {
	var m uint16
	at := -1
	for i, e := range l {
		switch e.tag {
		case user, groupObj, group:
			m |= e.perm
		case mask:
			at = i
		}
	}
	if at >= 0 {
		l[at].perm = m
		return l
	}
	return append(l, entry{mask, m, noID})
}

// get reads the list, or makes the one that the mode stands for.
func get(path string) ([]entry, error) {
	buf := make([]byte, 4+8*64)
	for {
		n, err := unix.Lgetxattr(path, attr, buf)
		switch {
		case errors.Is(err, unix.ERANGE):
			buf = make([]byte, 2*len(buf))
			continue
		case errors.Is(err, unix.ENODATA):
			return fromMode(path)
		case errors.Is(err, unix.EOPNOTSUPP):
			return nil, fmt.Errorf("%s: the file system has no POSIX ACLs: %w", path, err)
		case err != nil:
			return nil, fmt.Errorf("read the ACL of %s: %w", path, err)
		}
		return decode(path, buf[:n])
	}
}

func decode(path string, b []byte) ([]entry, error) {
	if len(b) < 4 || (len(b)-4)%8 != 0 || binary.LittleEndian.Uint32(b) != version {
		return nil, fmt.Errorf("the ACL of %s has a form that is not known", path)
	}
	var l []entry
	for b = b[4:]; len(b) > 0; b = b[8:] {
		l = append(l, entry{binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])})
	}
	return l, nil
}

func encode(l []entry) []byte {
	slices.SortFunc(l, func(a, b entry) int { return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.id, b.id)) })
	b := binary.LittleEndian.AppendUint32(nil, version)
	for _, e := range l {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

func fromMode(path string) ([]entry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	m := uint16(st.Mode)
	return []entry{{userObj, m >> 6 & 7, noID}, {groupObj, m >> 3 & 7, noID}, {other, m & 7, noID}}, nil
}

// set writes the list. One that says no more than a mode is kept by the kernel as the mode alone.
func set(path string, l []entry) error {
	if err := unix.Lsetxattr(path, attr, encode(l), 0); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("%s: the file system has no POSIX ACLs: %w", path, err)
		}
		return fmt.Errorf("change the ACL of %s: %w", path, err)
	}
	return nil
}
