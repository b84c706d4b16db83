package chfake

import (
	"bufio"
	"net"
	"os"
)

// listen serves the serial socket: one client, a new one takes the old one's place.
func (f *fake) listen() error {
	serial, _ := f.config["serial"].(map[string]any)
	l, err := net.Listen("unix", text(serial, "socket"))
	if err != nil {
		return err
	}
	f.serial = l
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			if f.client != nil {
				f.client.Close()
			}
			f.client = c
			_, _ = c.Write(f.pending.Bytes())
			f.pending.Reset()
			f.mu.Unlock()
			go f.read(c)
		}
	}()
	return nil
}

func (f *fake) unlisten() {
	if f.serial != nil {
		f.serial.Close()
		f.serial = nil
	}
	if f.client != nil {
		f.client.Close()
		f.client = nil
	}
}

// print is what the guest prints.
func (f *fake) print(s string) {
	if f.client != nil {
		if _, err := f.client.Write([]byte(s)); err == nil {
			return
		}
	}
	f.pending.WriteString(s)
}

// read is what the guest does with what is typed.
func (f *fake) read(c net.Conn) {
	sc := bufio.NewScanner(c)
	for sc.Scan() {
		switch sc.Text() {
		case "off":
			f.powerOff()
		case "exit":
			os.Exit(7)
		case "panic":
			f.event("guest", "panic", "event", "panic")
		case "deaf":
			f.mu.Lock()
			f.deaf = true
			f.mu.Unlock()
			fallthrough
		default:
			f.mu.Lock()
			if sc.Text() == "reset" {
				f.reboot()
			} else {
				f.print("you typed " + sc.Text() + "\n")
			}
			f.mu.Unlock()
		}
	}
}
