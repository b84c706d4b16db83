package vhost

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Session is a connection with its front-end, as another worker can go on with it: the front-end notices
// nothing, as the connection itself is among the descriptors that go with it. Those are, in order, the
// connection, its back-end channel if it has one, a file for each region, and for each ring its kick, call and error descriptors as far as it has
// them.
type Session struct {
	Features, Proto, Status uint64
	Inflight                bool
	Backend                 bool // the channel for what we say unasked goes with it, behind the connection
	Regions                 []Region
	Rings                   []Ring
}

// Region is one of the guest's memory regions.
type Region struct{ GPA, Size, User, Offset uint64 }

// Ring is one ring. Where it is to go on its used index says: chains are given back in order.
type Ring struct {
	Num              uint32
	Addrs            [3]uint64
	HasAddrs         bool
	Started, Enabled bool
	Kick, Call, Err  bool
}

// Session tells the connection's state and its descriptors, which stay the port's; nil without a connection.
func (p *Port) Session() (*Session, []int) {
	if p.conn < 0 {
		return nil, nil
	}
	s := &Session{Features: p.features, Proto: p.proto, Status: p.status, Inflight: p.inflight}
	fds := []int{p.conn}
	if s.Backend = p.backend >= 0; s.Backend {
		fds = append(fds, p.backend)
	}
	for i := range p.mem.regions {
		r := &p.mem.regions[i]
		s.Regions = append(s.Regions, Region{r.gpa, uint64(len(r.mem)), r.user, uint64(len(r.full) - len(r.mem))})
		fds = append(fds, r.fd)
	}
	for i := range p.rings {
		r := &p.rings[i]
		s.Rings = append(s.Rings, Ring{Num: r.num, Addrs: r.addrs, HasAddrs: r.hasAddrs, Started: r.started, Enabled: r.enabled,
			Kick: r.kick >= 0, Call: r.call >= 0, Err: r.errFD >= 0})
		for _, fd := range []int{r.kick, r.call, r.errFD} {
			if fd >= 0 {
				fds = append(fds, fd)
			}
		}
	}
	return s, fds
}

// Resume goes on with a session. It takes the descriptors over. If it fails the connection is ended, and the
// front-end connects again.
func (p *Port) Resume(s *Session, fds []int) (err error) {
	take := func() int {
		if len(fds) == 0 {
			err = errors.New("a descriptor is missing")
			return -1
		}
		fd := fds[0]
		fds = fds[1:]
		return fd
	}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
		if err != nil {
			p.disconnect("its session could not be resumed: " + err.Error())
		}
	}()
	if p.conn >= 0 {
		return nil // the front-end was faster
	}
	if p.conn = take(); err != nil {
		p.conn = -1
		return err
	}
	if err = p.host.Watch(p.conn); err != nil {
		return err
	}
	if s.Backend {
		if p.backend = take(); err != nil {
			return err
		}
	}
	if len(s.Rings) != len(p.rings) || s.Features&^p.offered() != 0 {
		return fmt.Errorf("a session with %d rings and features %#x", len(s.Rings), s.Features)
	}
	p.features, p.proto, p.status, p.inflight = s.Features, s.Proto, s.Status, s.Inflight
	p.setHeader()
	for _, g := range s.Regions {
		fd := take()
		if err != nil {
			return err
		}
		r, err := mapRegion(g.GPA, g.Size, g.User, g.Offset, fd)
		if err == nil {
			err = p.mem.add(r)
		}
		if err != nil {
			return err
		}
	}
	for i := range s.Rings {
		g, r := &s.Rings[i], &p.rings[i]
		r.num, r.addrs, r.hasAddrs, r.enabled = g.Num, g.Addrs, g.HasAddrs, g.Enabled
		for _, f := range []struct {
			has bool
			fd  *int
		}{{g.Kick, &r.kick}, {g.Call, &r.call}, {g.Err, &r.errFD}} {
			if f.has {
				*f.fd = take()
			}
		}
		if err != nil {
			return err
		}
		if r.kick >= 0 {
			if err = p.host.Watch(r.kick); err != nil {
				return err
			}
		}
	}
	for i := range s.Rings {
		if !s.Rings[i].Started {
			continue
		}
		r := &p.rings[i]
		if r.num == 0 || r.num > maxRingSize || r.num&(r.num-1) != 0 {
			return fmt.Errorf("a ring of %d entries", r.num)
		}
		if err = r.start(&p.mem, p.has(fEventIdx)); err != nil {
			return err
		}
		r.lastAvail = r.usedIdx
	}
	p.changed()
	return nil
}
