package main

import (
	"context"
	"sync"
	"time"

	"github.com/mvirt/mvirt/test/system"
)

// keeper is the service manager: it starts mvirtd whenever it ends.
type keeper struct {
	sys *system.System

	mu       sync.Mutex
	ending   bool
	starts   int
	lastPID  int
	finished chan struct{}
}

func keep(sys *system.System) *keeper {
	k := &keeper{sys: sys, lastPID: sys.Pid(), finished: make(chan struct{})}
	go k.run()
	return k
}

func (k *keeper) run() {
	defer close(k.finished)
	for {
		<-k.sys.Done()
		k.mu.Lock()
		if k.ending {
			k.mu.Unlock()
			return
		}
		k.starts++
		err := k.sys.Spawn()
		if err == nil {
			k.lastPID = k.sys.Pid()
		}
		k.mu.Unlock()
		// Systemd waits RestartSec= too; without it a program that cannot start would spin.
		time.Sleep(50 * time.Millisecond)
		if err != nil {
			time.Sleep(200 * time.Millisecond)
		}
	}
}

// pid is the launcher's.
func (k *keeper) pid() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.lastPID
}

// stop ends mvirtd for good.
func (k *keeper) stop(ctx context.Context) error {
	k.mu.Lock()
	k.ending = true
	k.mu.Unlock()
	err := k.sys.Stop(ctx)
	<-k.finished
	return err
}
