package main

import (
	"net"
	"os"
	"strings"
)

// notifier tells a service manager how we are: sd_notify(3), one datagram a message.
type notifier struct{ addr string }

// newNotifier takes the socket from the environment, and it out of the environment.
func newNotifier() notifier {
	n := notifier{addr: os.Getenv("NOTIFY_SOCKET")}
	os.Unsetenv("NOTIFY_SOCKET")
	return n
}

func (n notifier) send(lines ...string) {
	if n.addr == "" {
		return
	}
	name := n.addr
	if strings.HasPrefix(name, "@") { // an abstract socket
		name = "\x00" + name[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(strings.Join(lines, "\n")))
}
