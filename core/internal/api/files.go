package api

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/fdpass"
)

// fdSocket stands beside the API socket.
const fdSocket = "fd.sock"

// fileTable holds descriptors that callers have handed over and not used yet.
type fileTable struct{ table *fdpass.Table }

// listen opens fd.sock with the mode and group of the API socket; as there, it is renamed into place.
func (t *fileTable) listen(c config.Core) (stop func(), err error) {
	path := filepath.Join(filepath.Dir(c.Socket), fdSocket)
	tmp := filepath.Join(filepath.Dir(path), "."+fdSocket+".new")
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, errs.Wrap(errs.Unknown, err, "old socket")
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return nil, errs.New(errs.Exists, "%s is there and is not a socket", path).Do("remove it")
	}
	srv, err := fdpass.Serve(tmp, t.table, nil)
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "listen on %s", path)
	}
	if err := place(tmp, path, c); err != nil {
		srv.Close()
		return nil, err
	}
	id := fileID(path)
	return func() {
		srv.Close()
		t.table.Close()
		if fileID(path) == id {
			os.Remove(path)
		}
	}, nil
}

// takeFile takes a descriptor that the same user has handed over. No token is no file.
func (s *Server) takeFile(ctx context.Context, field, token string) (*os.File, error) {
	if token == "" {
		return nil, nil
	}
	if callerOf(ctx).peer.Remote {
		return nil, errs.Field(field, "give a URL, or call on the host itself", "files are handed over on the host's own socket only")
	}
	files, err := s.files.table.Take(callerOf(ctx).peer.UID, token)
	if err != nil {
		return nil, errs.Field(field, "hand the file over on fd.sock beside the API socket; a token works once, for the same user, and for half a minute",
			"no descriptor waits under this token")
	}
	for _, f := range files[1:] {
		f.Close()
	}
	return files[0], nil
}
