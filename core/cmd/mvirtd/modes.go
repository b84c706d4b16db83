package main

import (
	"context"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/api"
	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/core/internal/supervisor"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/version"
)

// asLauncher is mvirtd as root.
func asLauncher(cfg *config.Config, text []byte, n notifier) error {
	log := newLogger(cfg.Core.LogLevel).With("part", "launcher")
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) // a terminal that goes away, or a habit of reloading: nothing happens
	err := launcher.RunRoot(launcher.RootOptions{Config: cfg, Text: text, Env: supervisor.HandshakeEnv, Log: log, Ready: func() {
		n.send("READY=1", "STATUS=serving "+cfg.Core.Socket)
	}, Stopping: func() {
		n.send("STOPPING=1", "STATUS=stopping; VMs keep running")
	}})
	return err
}

// orphanTime is how long a core without its launcher takes for an orderly end. Short, for nothing is lost by a
// core that ends in the middle: operations are in the journal, audit entries in the spool, and until it has ended
// the next mvirtd cannot begin.
const orphanTime = 300 * time.Millisecond

// asCore is mvirtd started by the launcher: the configuration comes in a descriptor, as root has read it.
func asCore() error {
	err := func() error {
		// Executed by descriptor, an older kernel calls us by its number.
		if name, err := unix.BytePtrFromString("mvirtd"); err == nil {
			_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0)
		}
		sock, err := launcher.CoreSocket()
		if err != nil {
			return err
		}
		f := os.NewFile(launcher.CoreConfigFD, "mvirt.toml")
		cfg, err := config.Read("mvirt.toml", f)
		f.Close()
		if err != nil {
			return err
		}
		client := launcher.NewClient(sock)
		defer client.Close()
		ctx, cancel := untilSignal()
		defer cancel()
		go func() {
			select {
			case <-client.Stop():
				cancel()
			case <-ctx.Done():
			}
		}()
		go func() {
			<-client.Gone()
			// Nobody can kill a plugin that does not stop by itself any more, and the next mvirtd waits for our
			// lock. Our end closes the lifelines; what is frozen, the next launcher sweeps.
			cancel()
			time.Sleep(orphanTime)
			os.Exit(exitFailure)
		}()
		return serve(ctx, cfg, client, true, func() { _ = client.Ready() })
	}()
	if err != nil {
		report(os.Stderr, err)
	}
	return err
}

// asUser is mvirtd as an ordinary user.
func asUser(cfg *config.Config, n notifier) error {
	local, err := launcher.NewLocal(cfg, supervisor.HandshakeEnv)
	if err != nil {
		return err
	}
	defer local.Close()
	ctx, cancel := untilSignal()
	defer cancel()
	return serve(ctx, cfg, local, false, func() { n.send("READY=1", "STATUS=serving "+cfg.Core.Socket) })
}

func untilSignal() (context.Context, context.CancelFunc) {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	return signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
}

// serve runs the supervisor and the API until ctx ends, then stops both in an orderly way.
func serve(ctx context.Context, cfg *config.Config, spawner launcher.Spawner, enforced bool, ready func()) error {
	log := newLogger(cfg.Core.LogLevel)
	tracker := &health.Tracker{}
	grants, err := launcher.Grants(cfg, enforced)
	if err != nil {
		return err
	}
	var srv *api.Server // made after the supervisor, and before any plugin runs
	sup := supervisor.ForConfig(cfg, supervisor.Wiring{Spawner: spawner, Grants: grants, Health: tracker, Log: log,
		Host: func(k service.Kind) service.Host { return srv.HostFor(k) },
		Line: func(k service.Kind, l supervisor.Line) { srv.PluginLog(k, l) }})
	srv, err = api.New(api.Options{Config: cfg, Supervisor: sup, Health: tracker, Log: log})
	if err != nil {
		return err
	}
	log.Info("mvirtd starts", "version", version.Version, "pid", os.Getpid(), "uid", os.Getuid(), "socket", cfg.Core.Socket)
	sup.Start()
	defer func() {
		// The API has drained; what it did not need of the time allowed is the plugins'.
		sctx, cancel := context.WithTimeout(context.Background(), cfg.Core.StopTimeout)
		defer cancel()
		sup.Stop(sctx)
		log.Info("mvirtd has stopped; VMs keep running")
	}()
	running := make(chan error, 1)
	begun := time.Now()
	go func() { running <- srv.Run(ctx) }()
	select {
	case <-answering(ctx, cfg.Core.Socket):
		log.Info("the API is served", "socket", cfg.Core.Socket, "after", time.Since(begun).Round(time.Millisecond).String())
		ready()
	case err := <-running:
		return err
	}
	return <-running
}

// answering is closed when somebody accepts connections on a socket, or ctx has ended.
func answering(ctx context.Context, socket string) <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		defer close(ch)
		var d net.Dialer
		for ctx.Err() == nil {
			if c, err := d.DialContext(ctx, "unix", socket); err == nil {
				c.Close()
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return ch
}
