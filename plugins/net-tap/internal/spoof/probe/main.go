// Command probe sends the suite of forged packets, or listens for what arrives of it, through a packet socket:
// in a real guest, or on a host interface; and it measures connections between guests. For tests only.
//
//	probe send IFACE FACTS     FACTS is spoof.Facts in JSON
//	probe listen IFACE         prints what has come, one mark a line, and "probe: done", once the last packet has
//	probe echo                 answers on port 7, by TCP and UDP
//	probe watch ADDRESS FILE   keeps a connection to an echo until FILE is there, and tells how that went
//	probe sink                 takes TCP on port 9
//	probe pump ADDRESS SECONDS sends to a sink, and tells how fast
//	probe rtt ADDRESS COUNT    times round trips to an echo
//
// The sender prints "probe: sent N".
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/spoof"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// limit is how long a listener waits, far longer than anything takes.
const limit = 5 * time.Minute

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "echo":
		return echo()
	case len(args) == 1 && args[0] == "sink":
		return sink()
	case len(args) == 3 && args[0] == "pump":
		return pump(args[1], args[2])
	case len(args) == 3 && args[0] == "rtt":
		return roundTrips(args[1], args[2])
	case len(args) == 3 && args[0] == "watch":
		return watch(args[1], args[2])
	}
	if len(args) < 2 || (args[0] == "send") != (len(args) == 3) {
		return fmt.Errorf("probe send IFACE FACTS | probe listen IFACE | probe echo | probe watch ADDRESS FILE | probe sink | probe pump ADDRESS SECONDS | probe rtt ADDRESS COUNT")
	}
	ifi, err := net.InterfaceByName(args[1])
	if err != nil {
		return err
	}
	all := uint16(unix.ETH_P_ALL)
	all = all<<8 | all>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(all))
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}); err != nil {
		return err
	}
	if args[0] == "listen" {
		own := wire.MAC(0)
		if len(ifi.HardwareAddr) == 6 {
			own = wire.GetMAC(ifi.HardwareAddr)
		}
		return listen(fd, own)
	}
	var f spoof.Facts
	if err := json.Unmarshal([]byte(args[2]), &f); err != nil {
		return err
	}
	frames := spoof.Suite(&f)
	last := slices.IndexFunc(frames, func(x spoof.Frame) bool { return x.Class == spoof.Last })
	if last < 0 {
		return errors.New("the suite has no last packet")
	}
	// Packets may be lost on the way: a kernel keeps few for a neighbour whose address it still asks for. So all are
	// sent several times, and the last ones until nobody can have missed them.
	for round := range rounds {
		part := frames[:last]
		if round >= rounds/2 {
			part = frames[last:]
		}
		for i, x := range part {
			if err := unix.Sendto(fd, x.Data, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index}); err != nil {
				return fmt.Errorf("%s: %w", x.Class, err)
			}
			if i%16 == 15 {
				time.Sleep(5 * time.Millisecond) // not faster than a guest without KVM can listen
			}
		}
		time.Sleep(200 * time.Millisecond)
	}
	fmt.Println("probe: sent", len(frames))
	return nil
}

// rounds is how often the suite is sent: half of them all but the last packets, then these.
const rounds = 20

// listen takes what comes in, not what the machine itself sends.
func listen(fd int, own wire.MAC) error {
	if os.Getenv("PROBE_ANY_MAC") != "" {
		own = 0
	}
	tv := unix.NsecToTimeval(int64(limit))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	fmt.Println("probe: listens")
	var t spoof.Tally
	b := make([]byte, 65536)
	for !t.Done() {
		n, from, err := unix.Recvfrom(fd, b, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		t.Add(b[:n], own)
	}
	for _, m := range t {
		fmt.Println("probe: got", m)
	}
	fmt.Println("probe: done")
	return nil
}
