package engine

import (
	"net/netip"
	"slices"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

func toPrefix4(p netip.Prefix) prefix4 {
	mask := wire.IP4(^uint64(0) << (32 - p.Bits()))
	return prefix4{wire.IP4Of(p.Addr()) & mask, mask}
}

// fib4 finds the NIC that an address belongs to: the longest prefix wins. There is one map a prefix
// length; most networks have /32 only.
type fib4 struct {
	exact map[wire.IP4]*NIC
	lens  []fibLen4 // other lengths, longest first
}

type fibLen4 struct {
	mask wire.IP4
	m    map[wire.IP4]*NIC
}

func (f *fib4) reset(n int) {
	f.exact, f.lens = make(map[wire.IP4]*NIC, n), nil
}

func (f *fib4) add(p prefix4, nic *NIC) {
	if p.mask == 0xffffffff {
		f.exact[p.addr] = nic
		return
	}
	i, found := slices.BinarySearchFunc(f.lens, p.mask, func(l fibLen4, m wire.IP4) int {
		return int(int64(m) - int64(l.mask)) // descending
	})
	if !found {
		f.lens = slices.Insert(f.lens, i, fibLen4{p.mask, map[wire.IP4]*NIC{}})
	}
	f.lens[i].m[p.addr] = nic
}

func (f *fib4) lookup(a wire.IP4) *NIC {
	if nic := f.exact[a]; nic != nil {
		return nic
	}
	for i := range f.lens {
		if nic := f.lens[i].m[a&f.lens[i].mask]; nic != nil {
			return nic
		}
	}
	return nil
}

// prefix6 is an IPv6 prefix; addr has its host bits zero.
type prefix6 struct {
	addr wire.IP6
	bits int
}

func toPrefix6(p netip.Prefix) prefix6 { return prefix6{wire.IP6Of(p.Masked().Addr()), p.Bits()} }

func (p *prefix6) contains(a *wire.IP6) bool { return p.bits > 0 && mask6(a, p.bits) == p.addr }

// mask6 clears the bits of a behind the first n.
func mask6(a *wire.IP6, n int) (out wire.IP6) {
	k := n / 8
	copy(out[:k], a[:k])
	if k < 16 {
		out[k] = a[k] & ^(0xff >> (n % 8))
	}
	return out
}

// fib6 is fib4 for IPv6.
type fib6 struct {
	exact map[wire.IP6]*NIC
	lens  []fibLen6 // other lengths, longest first
}

type fibLen6 struct {
	bits int
	m    map[wire.IP6]*NIC
}

func (f *fib6) reset(n int) {
	f.exact, f.lens = make(map[wire.IP6]*NIC, n), nil
}

func (f *fib6) add(p prefix6, nic *NIC) {
	if p.bits == 128 {
		f.exact[p.addr] = nic
		return
	}
	i, found := slices.BinarySearchFunc(f.lens, p.bits, func(l fibLen6, bits int) int { return bits - l.bits })
	if !found {
		f.lens = slices.Insert(f.lens, i, fibLen6{p.bits, map[wire.IP6]*NIC{}})
	}
	f.lens[i].m[p.addr] = nic
}

func (f *fib6) lookup(a *wire.IP6) *NIC {
	if nic := f.exact[*a]; nic != nil {
		return nic
	}
	for i := range f.lens {
		if nic := f.lens[i].m[mask6(a, f.lens[i].bits)]; nic != nil {
			return nic
		}
	}
	return nil
}
