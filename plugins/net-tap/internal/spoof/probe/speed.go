package main

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"
)

// sinkPort is where sink listens.
const sinkPort = ":9"

// sink takes what is sent by TCP, and tells the sender at the end how many bytes those were.
func sink() error {
	l, err := net.Listen("tcp", sinkPort)
	if err != nil {
		return err
	}
	fmt.Println("probe: sinks")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			total, b := 0, make([]byte, 256<<10)
			for {
				n, err := c.Read(b)
				total += n
				if err != nil {
					break
				}
			}
			fmt.Fprintf(c, "%d\n", total)
		}()
	}
}

// pump sends by TCP for a while and prints bytes a second, by what has arrived.
func pump(addr, seconds string) error {
	s, err := strconv.Atoi(seconds)
	if err != nil {
		return err
	}
	c, err := net.Dial("tcp", addr+sinkPort)
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 256<<10)
	began := time.Now()
	for time.Since(began) < time.Duration(s)*time.Second {
		if _, err := c.Write(b); err != nil {
			return err
		}
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	var total int
	if _, err := fmt.Fscan(c, &total); err != nil {
		return err
	}
	fmt.Printf("probe: pumped %.0f\n", float64(total)/time.Since(began).Seconds())
	return nil
}

// roundTrips sends datagrams to an echo one after the other and prints the times that half and all but one in
// a hundred stay below, in microseconds.
func roundTrips(addr, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	u, err := net.Dial("udp", addr+port)
	if err != nil {
		return err
	}
	defer u.Close()
	b := make([]byte, 56)
	var times []time.Duration
	for range n {
		began := time.Now()
		if _, err := u.Write(b); err != nil {
			return err
		}
		_ = u.SetReadDeadline(began.Add(5 * time.Second))
		if _, err := u.Read(b); err != nil {
			return err
		}
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	fmt.Printf("probe: p50 %d p99 %d\n", times[n/2].Microseconds(), times[n*99/100].Microseconds())
	return nil
}
