package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// message is one message being read.
type message struct {
	buf  [headerLen + maxPayload]byte
	have int
	fds  []int
}

func (m *message) size() int {
	if m.have < headerLen {
		return headerLen
	}
	return headerLen + int(binary.LittleEndian.Uint32(m.buf[8:]))
}

// read reads on until the message is whole (done) or there is nothing to read now.
func (m *message) read(fd int) (done bool, err error) {
	var oob [256]byte
	for {
		want := m.size()
		if m.have >= headerLen {
			if want > len(m.buf) {
				return false, fmt.Errorf("a message of %d bytes", want)
			}
			if m.have == want {
				return true, nil
			}
		}
		n, oobn, flags, _, err := unix.Recvmsg(fd, m.buf[m.have:want], oob[:], unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if oobn > 0 {
			if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
				for i := range msgs {
					if fds, err := unix.ParseUnixRights(&msgs[i]); err == nil {
						m.fds = append(m.fds, fds...)
					}
				}
			}
		}
		if flags&unix.MSG_CTRUNC != 0 || len(m.fds) > maxMessageFDs {
			return false, errors.New("a message with too many descriptors")
		}
		if n == 0 {
			return false, io.EOF
		}
		m.have += n
	}
}

// reset closes what descriptors nobody took and begins the next message.
func (m *message) reset() {
	for _, fd := range m.fds {
		unix.Close(fd)
	}
	m.have, m.fds = 0, nil
}

// takeFD gives the i-th descriptor away.
func (m *message) takeFD(i int) int {
	if i >= len(m.fds) {
		return -1
	}
	fd := m.fds[i]
	m.fds[i] = -1
	return fd
}

func (m *message) u64() (uint64, error) {
	b := m.buf[headerLen:m.have]
	if len(b) < 8 {
		return 0, errors.New("a message is too short")
	}
	return binary.LittleEndian.Uint64(b), nil
}

// vringState is the payload of the messages about a ring's number.
func (m *message) vringState() (index, num uint32, err error) {
	b := m.buf[headerLen:m.have]
	if len(b) < 8 {
		return 0, 0, errors.New("a message is too short")
	}
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), nil
}

// send sends a reply with descriptors. Replies are short; a front-end that leaves them unread until its
// socket is full is cut off rather than waited for.
func send(fd int, req uint32, payload []byte, fds ...int) error {
	b := make([]byte, headerLen+len(payload))
	binary.LittleEndian.PutUint32(b, req)
	binary.LittleEndian.PutUint32(b[4:], flagVersion|flagReply)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	copy(b[headerLen:], payload)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, err := unix.SendmsgN(fd, b, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	if err == nil && n != len(b) {
		err = io.ErrShortWrite
	}
	return err
}

func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// handle does one message. An error ends the connection.
func (p *Port) handle(m *message) error {
	req := binary.LittleEndian.Uint32(m.buf[:])
	flags := binary.LittleEndian.Uint32(m.buf[4:])
	if flags&3 != flagVersion {
		return fmt.Errorf("a message of protocol version %d", flags&3)
	}
	reply, fds, err := p.do(req, m)
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	switch {
	case reply != nil:
		if err != nil {
			return err
		}
		return send(p.conn, req, reply, fds...)
	case flags&flagNeedReply != 0 && p.proto&protoReplyAck != 0:
		status := uint64(0)
		if err != nil {
			status = 1
		}
		if e := send(p.conn, req, le64(status)); e != nil {
			return e
		}
	}
	return err
}

// do does what a request asks; reply is not nil if the request has an answer of its own. fds are the
// answer's, to be closed.
func (p *Port) do(req uint32, m *message) (reply []byte, fds []int, err error) {
	switch req {
	case getFeatures:
		return le64(p.offered()), nil, nil
	case setFeatures:
		v, err := m.u64()
		if err == nil && v&^p.offered() != 0 {
			err = fmt.Errorf("features %#x were not offered", v&^p.offered())
		}
		if err == nil {
			p.features = v
			p.setHeader()
			if v&fProtocol == 0 { // without it rings begin enabled
				for i := range p.rings {
					p.rings[i].enabled = true
				}
			}
		}
		return nil, nil, err
	case setOwner, setLogFD:
		return nil, nil, nil
	case resetOwner, resetDevice:
		p.stopRings()
		return nil, nil, nil
	case setMemTable:
		return nil, nil, p.setMemory(m)
	case addMemReg, remMemReg:
		return nil, nil, p.changeMemory(req, m)
	case getMaxMemSlots:
		return le64(maxRegions), nil, nil
	case getProtocolFeatures:
		return le64(protoAll), nil, nil
	case setProtocolFeatures:
		v, err := m.u64()
		if err == nil && v&^uint64(protoAll) != 0 {
			err = fmt.Errorf("protocol features %#x were not offered", v&^uint64(protoAll))
		}
		p.proto = v
		return nil, nil, err
	case getQueueNum:
		return le64(uint64(p.pairs)), nil, nil
	case setVringNum, setVringBase, setVringEnable, getVringBase, setVringAddr, setVringKick, setVringCall, setVringErr:
		return p.vring(req, m)
	case netSetMTU:
		_, err := m.u64() // the guest hears it from the front-end
		return nil, nil, err
	case setBackendFD:
		p.closeBackend()
		p.backend = m.takeFD(0)
		if p.backend < 0 {
			return nil, nil, errors.New("a back-end channel without its descriptor")
		}
		return nil, nil, nil
	case getConfig:
		return p.getConfig(m)
	case setConfig:
		return nil, nil, errors.New("the device's configuration is read-only")
	case getInflight:
		return p.getInflight(m)
	case setInflight:
		return nil, nil, p.setInflight(m)
	case setStatus:
		v, err := m.u64()
		p.status = v
		if err == nil && v == statusReset {
			p.stopRings()
		}
		return nil, nil, err
	case getStatus:
		return le64(p.status), nil, nil
	}
	return nil, nil, fmt.Errorf("request %d is not known", req)
}

// setMemory replaces the guest's memory.
func (p *Port) setMemory(m *message) error {
	b := m.buf[headerLen:m.have]
	if len(b) < 8 {
		return errors.New("a memory table is too short")
	}
	n := int(binary.LittleEndian.Uint32(b))
	if n > 8 || n != len(m.fds) || len(b) < 8+n*regionLen {
		return fmt.Errorf("a memory table of %d regions with %d descriptors", n, len(m.fds))
	}
	p.unmapRings()
	p.mem.clear()
	for i := range n {
		r, err := parseRegion(b[8+i*regionLen:], m.takeFD(i))
		if err != nil {
			return err
		}
		if err := p.mem.add(r); err != nil {
			return err
		}
	}
	return p.remapRings()
}

func parseRegion(b []byte, fd int) (region, error) {
	le := binary.LittleEndian
	return mapRegion(le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:]), fd)
}

// changeMemory adds or removes one region.
func (p *Port) changeMemory(req uint32, m *message) error {
	b := m.buf[headerLen:m.have]
	if len(b) < 8+regionLen {
		return errors.New("a memory region is too short")
	}
	if req == addMemReg {
		if len(m.fds) != 1 {
			return fmt.Errorf("a memory region with %d descriptors", len(m.fds))
		}
		r, err := parseRegion(b[8:], m.takeFD(0))
		if err != nil {
			return err
		}
		return p.mem.add(r)
	}
	le := binary.LittleEndian
	p.unmapRings()
	if !p.mem.remove(le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:])) {
		return errors.New("there is no such memory region")
	}
	return p.remapRings()
}

// vring does the messages about one ring.
func (p *Port) vring(req uint32, m *message) (reply []byte, fds []int, err error) {
	idx, num, err := m.vringState()
	if err != nil {
		return nil, nil, err
	}
	withFD := req == setVringKick || req == setVringCall || req == setVringErr
	if withFD {
		idx &= 0xff
	}
	if idx >= uint32(len(p.rings)) {
		return nil, nil, fmt.Errorf("ring %d is none of %d", idx, len(p.rings))
	}
	r := &p.rings[idx]
	switch req {
	case setVringNum:
		if num == 0 || num > maxRingSize || num&(num-1) != 0 {
			return nil, nil, fmt.Errorf("a ring of %d entries", num)
		}
		if r.started {
			return nil, nil, errors.New("the size of a running ring cannot change")
		}
		r.num = num
	case setVringBase:
		if r.started {
			return nil, nil, errors.New("the base of a running ring cannot change")
		}
		r.lastAvail = uint16(num)
	case setVringAddr:
		b := m.buf[headerLen:m.have]
		if len(b) < 40 {
			return nil, nil, errors.New("ring addresses are too short")
		}
		for i := range r.addrs {
			r.addrs[i] = binary.LittleEndian.Uint64(b[8+8*i:])
		}
		r.hasAddrs = true
		if r.started {
			return nil, nil, p.startRing(int(idx))
		}
	case setVringEnable:
		r.enabled = num != 0
		p.changed()
	case getVringBase:
		base := r.lastAvail
		p.stopRing(int(idx))
		out := make([]byte, 8)
		binary.LittleEndian.PutUint32(out, idx)
		binary.LittleEndian.PutUint32(out[4:], uint32(base))
		return out, nil, nil
	default:
		fd := m.takeFD(0)
		if v, _ := m.u64(); v&noFD != 0 && fd >= 0 || v&noFD == 0 && fd < 0 {
			if fd >= 0 {
				unix.Close(fd)
			}
			return nil, nil, errors.New("a ring descriptor is missing or too much")
		}
		return nil, nil, p.setRingFD(int(idx), req, fd)
	}
	return nil, nil, nil
}

// setRingFD takes a ring's eventfd over; a kick starts the ring.
func (p *Port) setRingFD(idx int, req uint32, fd int) error {
	r := &p.rings[idx]
	if fd >= 0 {
		if err := unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
			return err
		}
	}
	switch req {
	case setVringCall:
		if r.call >= 0 {
			unix.Close(r.call)
		}
		r.call, r.valid = fd, false
	case setVringErr:
		if r.errFD >= 0 {
			unix.Close(r.errFD)
		}
		r.errFD = fd
	case setVringKick:
		if r.kick >= 0 {
			p.host.Unwatch(r.kick)
			unix.Close(r.kick)
		}
		r.kick = fd
		if fd >= 0 {
			if err := p.host.Watch(fd); err != nil {
				return err
			}
		}
		return p.startRing(idx)
	}
	return nil
}

// getConfig tells virtio_net_config (virtio 1.2, section 5.1.4).
func (p *Port) getConfig(m *message) (reply []byte, fds []int, err error) {
	b := m.buf[headerLen:m.have]
	if len(b) < configHeader {
		return nil, nil, errors.New("a configuration request is too short")
	}
	off, size := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	if size > configMax || off > configMax-size {
		return nil, nil, fmt.Errorf("a configuration request of %d bytes at %d", size, off)
	}
	var cfg [configMax]byte
	copy(cfg[:], p.cfg.MAC[:])
	if !p.linkDown {
		binary.LittleEndian.PutUint16(cfg[6:], statusUp)
	}
	binary.LittleEndian.PutUint16(cfg[8:], uint16(p.pairs))
	binary.LittleEndian.PutUint16(cfg[10:], uint16(p.cfg.MTU))
	binary.LittleEndian.PutUint32(cfg[12:], 0xffffffff) // speed unknown
	cfg[16] = 0xff                                      // duplex unknown
	reply = append([]byte{}, b[:configHeader]...)
	return append(reply, cfg[off:off+size]...), nil, nil
}

// getInflight gives the front-end memory to keep for us. Chains are given back in the order in which they
// were fetched, within the burst that fetched them, so after a reconnect the used index in the guest's
// memory alone says where to go on, and the region stays zero; having it is what makes a front-end rely on
// that.
func (p *Port) getInflight(m *message) (reply []byte, fds []int, err error) {
	b := m.buf[headerLen:m.have]
	if len(b) < 20 {
		return nil, nil, errors.New("an inflight request is too short")
	}
	queues, size := binary.LittleEndian.Uint16(b[16:]), binary.LittleEndian.Uint16(b[18:])
	if int(queues) > len(p.rings) || size > maxRingSize {
		return nil, nil, fmt.Errorf("an inflight request for %d queues of %d", queues, size)
	}
	per := (inflightHeader + inflightPerReq*int(size) + inflightAlign - 1) &^ (inflightAlign - 1)
	total := max(per*int(queues), 4096)
	fd, err := unix.MemfdCreate("mvirt-inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, nil, os.NewSyscallError("memfd_create", err)
	}
	if err := unix.Ftruncate(fd, int64(total)); err != nil {
		unix.Close(fd)
		return nil, nil, err
	}
	out := make([]byte, 20)
	binary.LittleEndian.PutUint64(out, uint64(total))
	binary.LittleEndian.PutUint16(out[16:], queues)
	binary.LittleEndian.PutUint16(out[18:], size)
	return out, []int{fd}, nil
}

// setInflight gets that memory back: rings then go on where the used index says.
func (p *Port) setInflight(m *message) error {
	if len(m.fds) != 1 || m.have < headerLen+20 {
		return errors.New("an inflight message without its memory")
	}
	p.inflight = true
	return nil
}
