package launcher

import (
	"errors"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/service"
)

// workers starts a plugin's workers: the very file that the plugin was started from, under the worker's user, with
// no capability in any set. So a plugin that is root needs no right to become others or to signal them. Workers
// may outlive their plugin and the launcher; they have sessions of their own.
type workers struct {
	kind   service.Kind
	spec   *spec
	binary *os.File
	family *family
	log    *slog.Logger
}

// keeperFor is what a plugin's conversation with the launcher is served by; nil: it has none.
func (s *starter) keeperFor(kind service.Kind, sp *spec, binary *os.File) func(*os.File) {
	switch {
	case kind == service.KindVMM && s.jails != nil:
		return s.jails.serve
	case sp.worker == nil || !s.table.root:
		return nil
	}
	fd, err := unix.FcntlInt(binary.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil // no descriptors are left, and the plugin's start will say so
	}
	w := &workers{kind: kind, spec: sp, binary: os.NewFile(uintptr(fd), binary.Name()), family: s.family, log: s.log}
	return func(f *os.File) {
		defer w.binary.Close()
		converse(f, w.log, w.answer)
	}
}

// answer does what a plugin asks of its workers.
func (w *workers) answer(r *jail.Request, files []*os.File) (*jail.Reply, *os.File, error) {
	switch r.Verb {
	case jail.VerbWorker:
		if len(files) < 1 {
			return nil, nil, errs.New(errs.Invalid, "a worker's start came without its output")
		}
		return w.start(r.Worker, files)
	case jail.VerbEndWorker:
		return &jail.Reply{}, nil, w.end(*r.Process)
	}
	return nil, nil, errs.New(errs.Denied, "the %s plugin has no hypervisors", w.kind)
}

func (w *workers) start(what *jail.Worker, files []*os.File) (*jail.Reply, *os.File, error) {
	id := *w.spec.worker
	env := append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/"}, what.Env...)
	c, err := start(program{
		binary: w.binary, stdout: files[0], stderr: files[0], keep: files[1:], family: w.family,
		shim: shimSpec{Argv: append([]string{w.spec.command, what.Name}, what.Args...), Env: env, Switch: true, UID: id.UID, GID: id.GID,
			NoFile: w.spec.nofile, Umask: 0o077},
	})
	if err != nil {
		if errs.KindOf(err) == errs.Unknown {
			err = errs.Wrap(errs.Internal, err, "a worker of the %s plugin", w.kind)
		}
		return nil, nil, err
	}
	share, err := unix.FcntlInt(c.share.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	go func() {
		<-c.gone
		c.close()
	}()
	if err != nil {
		c.signal(unix.SIGKILL)
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return &jail.Reply{UID: id.UID, GID: id.GID, Process: &jail.Process{PID: c.pid, StartTime: c.start}}, os.NewFile(uintptr(share), "pidfd"), nil
}

// end kills a process that is a worker of this plugin: it has the worker's uid and the plugin's program, of
// whatever version.
func (w *workers) end(p jail.Process) error {
	fd, err := holdProcess(w.spec.worker.UID, p)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	exe, err := os.Readlink("/proc/" + strconv.Itoa(p.PID) + "/exe")
	if err != nil || strings.TrimSuffix(exe, " (deleted)") != w.spec.command {
		return errs.New(errs.NotFound, "process %d is no worker of the %s plugin", p.PID, w.kind).Because("PROCESS_GONE")
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	return nil
}
