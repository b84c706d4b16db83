package wire

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// slowSum is the checksum as RFC 1071 says it, word by word.
func slowSum(b []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
		s = s>>16 + s&0xffff
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

func TestChecksum(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, 2000)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	for n := range b {
		if got, want := Checksum(b[:n]), slowSum(b[:n]); got != want {
			t.Fatalf("%d bytes: %04x, want %04x", n, got, want)
		}
		// In two parts, also with an odd first one.
		k := rng.IntN(n + 1)
		second := Sum(0, b[k:n])
		if k%2 == 1 {
			second = SwapSum(second)
		}
		if got, want := Fold(AddSum(Sum(0, b[:k]), second)), slowSum(b[:n]); got != want {
			t.Fatalf("%d+%d bytes: %04x, want %04x", k, n-k, got, want)
		}
	}
	all := make([]byte, 65536)
	for i := range all {
		all[i] = 0xff
	}
	if got := Checksum(all); got != slowSum(all) {
		t.Errorf("of ones: %04x, want %04x", got, slowSum(all))
	}
}

func TestUpdate(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	b := make([]byte, 20)
	for range 20000 {
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		b[8] |= 1
		PutBe16(b[10:], 0)
		PutBe16(b[10:], Checksum(b))
		DecTTL(b)
		if Checksum(b) != 0 {
			t.Fatalf("% x", b)
		}
	}
}

// TestAgainstLibrary compares with golang.org/x/net.
func TestAgainstLibrary(t *testing.T) {
	want, err := (&icmp.Message{Type: ipv4.ICMPTypeTimeExceeded, Body: &icmp.TimeExceeded{Data: make([]byte, 60)}}).Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	pkt := make([]byte, 60)
	PutIPv4(pkt, IP4Of(netip.MustParseAddr("10.0.0.2")), 1, ProtoUDP, 1, 0, 40)
	out := make([]byte, 1500)
	n := ICMPv4Error(out, pkt, 5, ICMPTimeExceeded, 0, 0, 1)
	m, err := icmp.ParseMessage(1, out[34:n])
	if err != nil || m.Type != ipv4.ICMPTypeTimeExceeded || len(m.Body.(*icmp.TimeExceeded).Data) != 60 || n-34 != len(want) {
		t.Errorf("%+v %v, %d bytes, want %d", m, err, n-34, len(want))
	}
	if h, err := ipv4.ParseHeader(out[14:34]); err != nil || h.Dst.String() != "10.0.0.2" || h.TotalLen != n-14 {
		t.Errorf("%v %v", h, err)
	}
}

func TestMAC(t *testing.T) {
	for s, ok := range map[string]bool{"52:54:00:12:34:56": true, "52:54:00:12:34:5": false, "52-54-00-12-34-56": false,
		"52:54:00:12:34:5g": false, "": false, "AA:bb:CC:dd:EE:ff": true, "52:54:00:12:34:56:78": false} {
		m, got := ParseMAC(s)
		if got != ok {
			t.Errorf("%q: %v", s, got)
		}
		if n, again := ParseMAC(m.String()); ok && (!again || n != m) {
			t.Errorf("%q reads back as %v", s, n)
		}
	}
}

func TestRoutable(t *testing.T) {
	for s, want := range map[string]bool{"10.0.0.1": true, "8.8.8.8": true, "0.1.2.3": false, "127.0.0.1": false, "169.254.1.1": false,
		"224.0.0.1": false, "240.0.0.1": false, "255.255.255.255": false, "223.255.255.255": true,
		"2001:db8::1": true, "fd00::1": true, "fe80::1": false, "ff02::1": false, "::": false, "::1": false, "::ffff:1.2.3.4": false} {
		a := netip.MustParseAddr(s)
		got := false
		if a.Is4() {
			got = IP4Of(a).Routable()
		} else {
			b := IP6(a.As16())
			got = b.Routable()
		}
		if got != want {
			t.Errorf("%s: %v", s, got)
		}
	}
}

// FuzzParse must not read outside, and must keep its promises about offsets.
func FuzzParse(f *testing.F) {
	b := make([]byte, 80)
	PutEth(b, 1, 2, TypeIPv4)
	PutIPv4(b[14:], 1, 2, ProtoUDP, 64, 0, 46)
	f.Add(b, 80)
	c := make([]byte, 90)
	PutIPv6(c[14:], &IP6{1}, &IP6{2}, ProtoHopByHop, 64, 36)
	f.Add(c, 90)
	f.Fuzz(func(t *testing.T, head []byte, total int) {
		if total < len(head) || total > 65550 {
			return
		}
		var in Info
		for _, parse := range []func([]byte, int, *Info) Problem{ParseIPv4, ParseIPv6} {
			if parse(head, total, &in) != OK {
				continue
			}
			if in.End > total || in.L4 > in.End || in.L4 < EthLen+IPv4MinLen || in.Ports && in.L4+4 > len(head) {
				t.Fatalf("%+v of %d/%d", in, len(head), total)
			}
		}
	})
}

// TestSum20: the quick way says what the general one says.
func TestSum20(t *testing.T) {
	b := make([]byte, 20)
	for i := range 200_000 {
		for k := range b {
			b[k] = byte(rand.Uint32())
		}
		if i%2 == 0 {
			PutBe16(b[10:], 0)
			PutBe16(b[10:], Checksum(b))
		}
		if i%3 == 0 {
			b[i%20] = 0xff
		}
		if sum20(b) != (Checksum(b) == 0) {
			t.Fatalf("%x", b)
		}
	}
}
