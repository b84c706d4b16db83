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
