package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// port is where echo answers, by TCP and UDP.
const port = ":7"

// echo answers until the machine ends.
func echo() error {
	l, err := net.Listen("tcp", port)
	if err != nil {
		return err
	}
	u, err := net.ListenPacket("udp", port)
	if err != nil {
		return err
	}
	fmt.Println("probe: echoes")
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := u.ReadFrom(b)
			if err == nil {
				_, _ = u.WriteTo(b[:n], from)
			}
		}
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
	}
}

// watch keeps one TCP connection to an echo and sends a datagram each 5 ms, until a file named stop is there;
// then it tells how long there was no answer at most, and whether the connection lived.
func watch(addr, stop string) error {
	c, err := net.Dial("tcp", addr+port)
	if err != nil {
		return err
	}
	defer c.Close()
	u, err := net.Dial("udp", addr+port)
	if err != nil {
		return err
	}
	defer u.Close()
	type tally struct {
		n   int
		gap time.Duration
		err error
	}
	udp, tcp := make(chan tally, 1), make(chan tally, 1)
	go func() {
		var t tally
		last, b := time.Now(), make([]byte, 64)
		for {
			_ = u.SetReadDeadline(time.Now().Add(3 * time.Second))
			if _, err := u.Read(b); err != nil {
				if t.err = err; os.IsTimeout(err) {
					udp <- t
					return
				}
				continue
			}
			now := time.Now()
			if t.n > 0 {
				t.gap = max(t.gap, now.Sub(last))
			}
			last = now
			t.n++
		}
	}()
	done := make(chan struct{})
	go func() {
		var t tally
		r := bufio.NewReader(c)
		for last := time.Now(); ; last = time.Now() {
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			if _, t.err = fmt.Fprintf(c, "line %d\n", t.n); t.err == nil {
				var line string
				if line, t.err = r.ReadString('\n'); t.err == nil && line != fmt.Sprintf("line %d\n", t.n) {
					t.err = fmt.Errorf("%q came back", line)
				}
			}
			if t.err != nil {
				tcp <- t
				return
			}
			t.gap = max(t.gap, time.Since(last))
			t.n++
			select {
			case <-done:
				tcp <- t
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	fmt.Println("probe: watches")
	sent := 0
	for tick := time.NewTicker(5 * time.Millisecond); ; <-tick.C {
		if sent++; sent%16 == 0 {
			if _, err := os.Stat(stop); err == nil {
				break
			}
		}
		_, _ = u.Write([]byte("x"))
	}
	close(done)
	x, y := <-tcp, <-udp
	fmt.Printf("probe: datagrams %d of %d gap %d ms; connection: %d lines, gap %d ms, alive %v\n", y.n, sent, y.gap.Milliseconds(), x.n, x.gap.Milliseconds(), x.err == nil)
	return x.err
}
