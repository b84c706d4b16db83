package wctl

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// sunPath is how long a socket's name may be: 108 bytes with the final NUL (unix(7)).
const sunPath = 107

// WithPath calls f with a name for path that fits into a socket address: path itself, or one through an
// open directory where it is too long.
func WithPath(path string, f func(string) error) error {
	if len(path) <= sunPath {
		return f(path)
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path)))
}
