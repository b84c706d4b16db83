// Package fdpass moves open descriptors between processes beside gRPC, which cannot carry them.
//
// A process that serves has a socket (SOCK_SEQPACKET) and a table. A peer deposits descriptors and gets a
// token, which it names in its gRPC request; the server takes them from the table by the token. The other way
// round, the server offers descriptors, names the token in its response, and the peer fetches them. A token
// works once. What nobody claims is closed after a while.
//
// The protocol, one packet each way:
//
//	request  'D'                 with 1 to 32 descriptors (SCM_RIGHTS)   → 'T' token        deposited
//	request  'F' token                                                   → 'O' and them     fetched
//	                                                                     → 'E' text         refused
//
// A token is 32 hexadecimal digits of crypto/rand; it is bound to the uid that deposited, or for which it was
// offered, so that knowing it is not enough.
package fdpass

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/internal/peercred"
)

// Limits. MaxFiles is below the kernel's SCM_MAX_FD (253); a VM's NIC has at most 16 queues.
const (
	MaxFiles = 32
	maxHeld  = 1024 // by all peers
	maxMine  = 256  // by one uid, so that one peer cannot use the table up for the others
	tokenLen = 32
	keep     = 30 * time.Second
	maxConns = 64 // of all peers at a time; each is given five seconds
	maxOwn   = 16 // of one uid
	refusal  = 200 * time.Millisecond
)

// Table holds descriptors between the packet that brought them and the call that names them.
type Table struct {
	now func() time.Time

	mu    sync.Mutex
	held  map[string]entry
	count int
	byUID map[uint32]int
}

type entry struct {
	files []*os.File
	uid   uint32
	until time.Time
}

// NewTable makes an empty table.
func NewTable() *Table {
	return &Table{now: time.Now, held: map[string]entry{}, byUID: map[uint32]int{}}
}

// Put holds duplicates of files for uid and returns the token. No files, no token.
func (t *Table) Put(uid uint32, files ...*os.File) (string, error) {
	var dups []*os.File
	for _, f := range files {
		if f == nil {
			continue
		}
		d, err := Dup(f)
		if err != nil {
			closeAll(dups)
			return "", err
		}
		dups = append(dups, d)
	}
	if len(dups) == 0 {
		return "", nil
	}
	return t.put(uid, dups)
}

// put takes the files over, also when it fails.
func (t *Table) put(uid uint32, files []*os.File) (string, error) {
	var b [tokenLen / 2]byte
	rand.Read(b[:]) // never fails: crypto/rand, Go 1.24
	token := hex.EncodeToString(b[:])
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweepLocked()
	if t.count+len(files) > maxHeld || t.byUID[uid]+len(files) > maxMine {
		closeAll(files)
		return "", errs.New(errs.Exhausted, "%d descriptors wait to be claimed, %d of them of uid %d; the limits are %d and %d", t.count, t.byUID[uid], uid, maxHeld, maxMine).
			Do("try again in half a minute, when unclaimed ones are closed")
	}
	t.held[token] = entry{files, uid, t.now().Add(keep)}
	t.count += len(files)
	t.byUID[uid] += len(files)
	return token, nil
}

// Take gives the files of a token to the caller, who closes them. An empty token is no files.
func (t *Table) Take(uid uint32, token string) ([]*os.File, error) {
	if token == "" {
		return nil, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweepLocked()
	e, ok := t.held[token]
	if !ok || e.uid != uid {
		return nil, errs.New(errs.Invalid, "no descriptors are held under this token").
			Do("hand the descriptors over again; a token works once and for half a minute")
	}
	t.forgetLocked(token, e)
	return e.files, nil
}

func (t *Table) forgetLocked(token string, e entry) {
	delete(t.held, token)
	t.count -= len(e.files)
	if t.byUID[e.uid] -= len(e.files); t.byUID[e.uid] <= 0 {
		delete(t.byUID, e.uid)
	}
}

// Sweep closes what nobody has claimed in time; call it now and then.
func (t *Table) Sweep() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweepLocked()
}

func (t *Table) sweepLocked() {
	now := t.now()
	for token, e := range t.held {
		if now.After(e.until) {
			closeAll(e.files)
			t.forgetLocked(token, e)
		}
	}
}

// Close closes all that is held.
func (t *Table) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for token, e := range t.held {
		closeAll(e.files)
		t.forgetLocked(token, e)
	}
}

// Server serves a Table on a socket.
type Server struct {
	table *Table
	check func(peercred.Cred) error
	ln    *net.UnixListener
	wg    sync.WaitGroup
	slots chan struct{}
	done  chan struct{}

	mu  sync.Mutex
	own map[uint32]int // connections by uid
}

// Peer is who is at the other end of the socket.
type Peer = peercred.Cred

// Serve listens on path (which must not exist) and serves table until Close. check may refuse a peer; nil
// lets in everybody who can open the socket.
func Serve(path string, table *Table, check func(Peer) error) (*Server, error) {
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	s := &Server{table: table, check: check, ln: ln, slots: make(chan struct{}, maxConns), done: make(chan struct{}), own: map[uint32]int{}}
	s.wg.Add(2)
	go s.accept()
	go s.sweep()
	return s, nil
}

func (s *Server) accept() {
	defer s.wg.Done()
	for {
		c, err := s.ln.AcceptUnix()
		if err != nil {
			return
		}
		select {
		case s.slots <- struct{}{}:
		default: // as many as allowed are being served: a peer that floods is turned away
			c.Close()
			continue
		}
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			defer func() { <-s.slots }()
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			s.serve(c)
		}()
	}
}

func (s *Server) sweep() {
	defer s.wg.Done()
	tick := time.NewTicker(keep / 2)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.table.Sweep()
		case <-s.done:
			return
		}
	}
}

// Close stops serving and removes the socket. The table stays as it is.
func (s *Server) Close() {
	close(s.done)
	s.ln.Close()
	s.wg.Wait()
}

// enter counts a connection of uid in, unless it has too many.
func (s *Server) enter(uid uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.own[uid] >= maxOwn {
		return errors.New("too many connections")
	}
	s.own[uid]++
	return nil
}

func (s *Server) leave(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.own[uid]--; s.own[uid] <= 0 {
		delete(s.own, uid)
	}
}

func (s *Server) serve(c *net.UnixConn) {
	cred, err := peercred.Of(c)
	if err == nil && s.check != nil {
		err = s.check(cred)
	}
	if err == nil {
		if err = s.enter(cred.UID); err == nil {
			defer s.leave(cred.UID)
		}
	}
	if err != nil {
		// Its packet is read, as closing with one unread would reset the connection before the answer is.
		c.SetDeadline(time.Now().Add(refusal))
		_, files, _ := receive(c)
		closeAll(files)
		c.SetDeadline(time.Now().Add(refusal))
		send(c, append([]byte{'E'}, err.Error()...), nil)
		return
	}
	msg, files, err := receive(c)
	if err != nil {
		return
	}
	switch {
	case len(msg) == 1 && msg[0] == 'D' && len(files) > 0:
		token, err := s.table.put(cred.UID, files)
		if err != nil {
			send(c, append([]byte{'E'}, err.Error()...), nil)
			return
		}
		if send(c, append([]byte{'T'}, token...), nil) != nil {
			if fs, err := s.table.Take(cred.UID, token); err == nil {
				closeAll(fs)
			}
		}
	case len(msg) == 1+tokenLen && msg[0] == 'F' && len(files) == 0:
		fs, err := s.table.Take(cred.UID, string(msg[1:]))
		if err != nil {
			send(c, append([]byte{'E'}, err.Error()...), nil)
			return
		}
		send(c, []byte{'O'}, fs)
		closeAll(fs)
	default:
		closeAll(files)
		send(c, []byte("Ebad request"), nil)
	}
}

// Deposit hands files over at path and returns the token to name. The files stay the caller's. check may
// refuse who serves there; nil trusts the path.
func Deposit(ctx context.Context, path string, check func(Peer) error, files ...*os.File) (string, error) {
	var some []*os.File
	for _, f := range files {
		if f != nil {
			some = append(some, f)
		}
	}
	if len(some) == 0 {
		return "", nil
	}
	if len(some) > MaxFiles {
		return "", errs.New(errs.Invalid, "%d descriptors at once, the limit is %d", len(some), MaxFiles)
	}
	msg, files, err := roundTrip(ctx, path, check, []byte{'D'}, some)
	closeAll(files)
	if err != nil {
		return "", err
	}
	if len(msg) != 1+tokenLen || msg[0] != 'T' {
		return "", errs.New(errs.Internal, "descriptor socket answered %q", msg)
	}
	return string(msg[1:]), nil
}

// Fetch gets the files offered under token at path; the caller closes them. An empty token is no files.
func Fetch(ctx context.Context, path string, check func(Peer) error, token string) ([]*os.File, error) {
	if token == "" {
		return nil, nil
	}
	msg, files, err := roundTrip(ctx, path, check, append([]byte{'F'}, token...), nil)
	if err != nil {
		closeAll(files)
		return nil, err
	}
	if len(msg) != 1 || msg[0] != 'O' || len(files) == 0 {
		closeAll(files)
		return nil, errs.New(errs.Internal, "descriptor socket answered %q with %d descriptors", msg, len(files))
	}
	return files, nil
}

func roundTrip(ctx context.Context, path string, check func(Peer) error, msg []byte, files []*os.File) ([]byte, []*os.File, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, nil, errs.Wrap(errs.Unavailable, err, "descriptor socket")
	}
	defer nc.Close()
	c := nc.(*net.UnixConn)
	deadline, ok := ctx.Deadline()
	if limit := time.Now().Add(10 * time.Second); !ok || deadline.After(limit) {
		deadline = limit
	}
	c.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if check != nil {
		cred, err := peercred.Of(c)
		if err == nil {
			err = check(cred)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	if err := send(c, msg, files); err != nil {
		return nil, nil, errs.Wrap(errs.Unavailable, err, "descriptor socket")
	}
	reply, got, err := receive(c)
	if err != nil {
		return nil, got, errs.Wrap(errs.Unavailable, err, "descriptor socket")
	}
	if len(reply) > 0 && reply[0] == 'E' {
		return nil, got, errs.New(errs.Invalid, "descriptor socket: %s", reply[1:])
	}
	return reply, got, nil
}

func send(c *net.UnixConn, msg []byte, files []*os.File) error {
	var oob []byte
	if len(files) > 0 {
		// File.Fd would make the descriptors blocking for everybody; the duplicates are closed below.
		fds := make([]int, 0, len(files))
		defer func() {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}()
		for _, f := range files {
			fd, err := dupFD(f)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err := c.WriteMsgUnix(msg, oob, nil)
	return err
}

// receive reads one packet. More descriptors than MaxFiles make it fail; none leak.
func receive(c *net.UnixConn) ([]byte, []*os.File, error) {
	buf := make([]byte, 512)
	oob := make([]byte, unix.CmsgSpace(4*(MaxFiles+8)))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob) // Go sets MSG_CMSG_CLOEXEC
	if err != nil {
		return nil, nil, err
	}
	files, err := parse(oob[:oobn], false)
	if err == nil && (flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(files) > MaxFiles) {
		err = errors.New("packet too large")
	}
	if err == nil && n == 0 {
		err = errors.New("closed")
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return buf[:n], files, nil
}

func parse(oob []byte, nonBlock bool) (files []*os.File, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if nonBlock {
				_ = unix.SetNonblock(fd, true) // fails for no descriptor that was just received
			}
			files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("received-%d", fd)))
		}
	}
	return files, nil
}

// Dup duplicates an open file, close-on-exec.
func Dup(f *os.File) (*os.File, error) {
	fd, err := dupFD(f)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func dupFD(f *os.File) (fd int, err error) {
	sc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := sc.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) })
	if cerr != nil {
		return -1, cerr
	}
	return fd, err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
