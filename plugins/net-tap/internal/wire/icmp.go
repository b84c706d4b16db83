package wire

// ICMP types and codes that the engine sends or looks at (RFC 792, RFC 1191, RFC 1812).
const (
	ICMPEchoReply    = 0
	ICMPUnreachable  = 3
	ICMPSourceQuench = 4
	ICMPRedirect     = 5
	ICMPEcho         = 8
	ICMPTimeExceeded = 11
	ICMPParamProblem = 12

	CodeNetUnreachable   = 0
	CodeHostUnreachable  = 1
	CodeProtoUnreachable = 2
	CodePortUnreachable  = 3
	CodeFragNeeded       = 4
	CodeProhibited       = 13
)

// ICMPv6 types and codes (RFC 4443, RFC 4861, RFC 3810).
const (
	ICMP6Unreachable  = 1
	ICMP6TooBig       = 2
	ICMP6TimeExceeded = 3
	ICMP6ParamProblem = 4
	ICMP6Echo         = 128
	ICMP6EchoReply    = 129
	ICMP6MLDQuery     = 130
	ICMP6MLDReport    = 131
	ICMP6MLDDone      = 132
	ICMP6RS           = 133
	ICMP6RA           = 134
	ICMP6NS           = 135
	ICMP6NA           = 136
	ICMP6Redirect     = 137
	ICMP6MLDv2Report  = 143

	Code6NoRoute     = 0
	Code6Prohibited  = 1
	Code6AddrUnreach = 3
	Code6PortUnreach = 4
)

// ICMPIsError says whether an ICMPv4 type reports an error; errors are never answered with errors
// (RFC 1122, section 3.2.2).
func ICMPIsError(t uint8) bool {
	switch t {
	case ICMPUnreachable, ICMPSourceQuench, ICMPRedirect, ICMPTimeExceeded, ICMPParamProblem:
		return true
	}
	return false
}

// maxICMPError is how long an error may be, IP header included (RFC 1812, section 4.3.2.3).
const maxICMPError = 576

// ICMPv4Error builds into out, behind room for an Ethernet header, the error about the IPv4 packet pkt
// (from its IP header on): an IPv4 header from src to the packet's source, the ICMP header with its four
// bytes extra, and as much of pkt as fits. It returns the frame's length.
func ICMPv4Error(out, pkt []byte, src IP4, typ, code uint8, extra uint32, id uint16) int {
	quote := min(len(pkt), maxICMPError-IPv4MinLen-ICMPLen)
	n := ICMPLen + quote
	ip := out[EthLen:]
	icmp := ip[IPv4MinLen:]
	copy(icmp[ICMPLen:], pkt[:quote])
	icmp[0], icmp[1], icmp[2], icmp[3] = typ, code, 0, 0
	IP4(extra).Put(icmp[4:])
	PutBe16(icmp[2:], Checksum(icmp[:n]))
	PutIPv4(ip, src, GetIP4(pkt[12:]), ProtoICMP, 64, id, n)
	return EthLen + IPv4MinLen + n
}

// ICMPv6Error is the same for IPv6, up to the minimum MTU of 1280 (RFC 4443, section 2.4 (c)).
func ICMPv6Error(out, pkt []byte, src *IP6, typ, code uint8, extra uint32) int {
	quote := min(len(pkt), 1280-IPv6Len-ICMPLen)
	n := ICMPLen + quote
	ip := out[EthLen:]
	icmp := ip[IPv6Len:]
	copy(icmp[ICMPLen:], pkt[:quote])
	icmp[0], icmp[1], icmp[2], icmp[3] = typ, code, 0, 0
	IP4(extra).Put(icmp[4:])
	var dst IP6
	copy(dst[:], pkt[8:24])
	PutIPv6(ip, src, &dst, ProtoICMPv6, 64, n)
	SumICMPv6(ip, n)
	return EthLen + IPv6Len + n
}

// SumICMPv6 fills in the checksum of an ICMPv6 message of n bytes right behind the IPv6 header ip.
func SumICMPv6(ip []byte, n int) {
	icmp := ip[IPv6Len:]
	icmp[2], icmp[3] = 0, 0
	PutBe16(icmp[2:], Fold(Sum(PseudoSum6(ip[8:], ProtoICMPv6, n), icmp[:n])))
}

// ARP is an Ethernet/IPv4 ARP message.
type ARP struct {
	Op        uint16 // 1 request, 2 reply
	SenderMAC MAC
	SenderIP  IP4
	TargetMAC MAC
	TargetIP  IP4
}

// ParseARP reads the 28 bytes behind the Ethernet header; ok is false unless it is Ethernet and IPv4.
func ParseARP(b []byte) (a ARP, ok bool) {
	if len(b) < ARPLen || Be16(b) != 1 || Be16(b[2:]) != TypeIPv4 || b[4] != 6 || b[5] != 4 {
		return a, false
	}
	return ARP{Op: Be16(b[6:]), SenderMAC: GetMAC(b[8:]), SenderIP: GetIP4(b[14:]),
		TargetMAC: GetMAC(b[18:]), TargetIP: GetIP4(b[24:])}, true
}

// Put writes the 28 bytes.
func (a *ARP) Put(b []byte) {
	_ = b[ARPLen-1]
	PutBe16(b, 1)
	PutBe16(b[2:], TypeIPv4)
	b[4], b[5] = 6, 4
	PutBe16(b[6:], a.Op)
	a.SenderMAC.Put(b[8:])
	a.SenderIP.Put(b[14:])
	a.TargetMAC.Put(b[18:])
	a.TargetIP.Put(b[24:])
}

// PutEth writes an Ethernet header.
func PutEth(b []byte, dst, src MAC, typ uint16) {
	dst.Put(b)
	src.Put(b[6:])
	PutBe16(b[12:], typ)
}
