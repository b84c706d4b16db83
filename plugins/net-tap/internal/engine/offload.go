package engine

import (
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// checkOffload judges what a sender asks to be done to its packet: the offsets must lie in the packet, and
// a segmentation must fit what the packet is. It clears what only the engine may say.
func (p *Packet) checkOffload() bool {
	o, in := &p.Offload, &p.info
	o.Flags &= NeedsCsum
	if o.Flags == 0 {
		if o.GSO != GSONone { // segments need checksums
			return false
		}
		p.Offload = Offload{}
		return true
	}
	start, offs := int(o.CsumStart), int(o.CsumOffs)
	if start < in.L4 || start+offs+2 > in.End || start+offs+2 > len(p.Head) && len(p.Tail) == 0 {
		return false
	}
	o.HdrLen = 0
	if o.GSO == GSONone {
		o.GSOSize = 0
		return true
	}
	if o.GSOSize == 0 || !in.First || in.Fragment {
		return false
	}
	switch o.GSO &^ GSOECN {
	case GSOTCP4, GSOTCP6:
		if in.Proto != wire.ProtoTCP || (o.GSO&^GSOECN == GSOTCP6) != in.V6 || start != in.L4 || offs != 16 {
			return false
		}
	case GSOUDP, GSOUDPL4:
		if in.Proto != wire.ProtoUDP || start != in.L4 || offs != 6 || o.GSO&GSOECN != 0 {
			return false
		}
	default:
		return false
	}
	end := p.transportEnd()
	if end < in.L4+wire.UDPLen || end > in.End || end > len(p.Head) {
		return false
	}
	o.HdrLen = uint16(end)
	return true
}
