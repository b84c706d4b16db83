package launcher

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Reasons of errors about a plugin's binary.
const (
	ReasonBinaryMissing       = "BINARY_MISSING"
	ReasonBinaryType          = "BINARY_NOT_A_FILE"
	ReasonBinaryOwner         = "BINARY_OWNER"
	ReasonBinaryWritable      = "BINARY_WRITABLE"
	ReasonBinaryNotExecutable = "BINARY_NOT_EXECUTABLE"
	ReasonBinarySHA256        = "BINARY_SHA256"
	ReasonBinaryFormat        = "BINARY_FORMAT"
)

// openBinary opens a plugin's binary and checks what it opened; the open file is what gets executed.
func openBinary(kind service.Kind, path, sum string, id identity, t trust) (*os.File, error) {
	f, st, err := openTrusted(path, t)
	if err == nil {
		err = checkBinary(f, st, path, sum, id)
		if err != nil {
			f.Close()
		}
	}
	if err == nil {
		return f, nil
	}
	table := "[plugin." + string(kind) + "]"
	e := &errs.Error{Kind: errs.Precondition, Message: "the binary of the " + string(kind) + " plugin", Err: err, Reason: errs.ReasonOf(err)}
	switch e.Reason {
	case reasonMissing:
		e.Reason, e.Remedy = ReasonBinaryMissing, "install the plugin, or correct command in "+table
	case reasonType:
		e.Reason, e.Remedy = ReasonBinaryType, "correct command in "+table
	case reasonOwner:
		e.Reason = ReasonBinaryOwner
	case reasonWritable:
		e.Reason = ReasonBinaryWritable
	}
	return nil, e
}

func checkBinary(f *os.File, st *unix.Stat_t, path, sum string, id identity) error {
	if !mayExecute(st, id) {
		return errs.New(errs.Precondition, "%s is not executable for user %d (mode %04o)", path, id.UID, st.Mode&0o7777).
			Because(ReasonBinaryNotExecutable).Do("chmod 755 " + path)
	}
	if sum == "" {
		return nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return pathErr(path, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != sum {
		return errs.New(errs.Precondition, "%s has the sha256 sum %s, not the pinned %s", path, got, sum).Because(ReasonBinarySHA256).
			Do("install the binary that was pinned, or set sha256 to the new sum if you trust it")
	}
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// mayExecute reads the mode bits; access control lists may say otherwise, then execve says so.
func mayExecute(st *unix.Stat_t, id identity) bool {
	bit := uint32(0o001)
	switch {
	case id.UID == 0:
		bit = 0o111
	case id.UID == st.Uid:
		bit = 0o100
	case id.GID == st.Gid || contains(id.Groups, st.Gid):
		bit = 0o010
	}
	return st.Mode&bit != 0
}

func contains(list []uint32, v uint32) bool {
	for _, x := range list {
		if x == v {
			return true
		}
	}
	return false
}

// isScript tells whether an executable starts with "#!": its interpreter opens the descriptor's path once
// more, so the descriptor must stay open.
func isScript(f *os.File) bool {
	var b [2]byte
	n, _ := f.ReadAt(b[:], 0)
	return n == 2 && b[0] == '#' && b[1] == '!'
}
