package launcher

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// The test binary is also the shim, the plugin and the core that tests start.
func TestMain(m *testing.M) {
	Shim()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case CoreArg:
			testCore()
		case "test-hostile":
			testHostile()
		case "test-opener":
			testOpener()
		case "test-plugin":
			testPlugin()
		}
	}
	goleak.VerifyTestMain(m)
}

// testPlugin says who it is in one line of JSON on stdout and ends with its lifeline (descriptor 3), or as
// its mode says.
func testPlugin() {
	status, _ := os.ReadFile("/proc/self/status")
	fds, _ := os.ReadDir("/proc/self/fd")
	wd, _ := os.Getwd()
	var lim syscall.Rlimit
	_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim)
	r := report{Status: string(status), Env: os.Environ(), Args: os.Args, PID: os.Getpid(), Dir: wd, NoFile: lim.Max}
	old := syscall.Umask(0)
	r.Umask = old
	syscall.Umask(old)
	for _, f := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil {
			r.FDs = append(r.FDs, f.Name()+" "+to)
		}
	}
	if dir := os.Getenv("TEST_LAUNCH_DIR"); dir != "" {
		r.WriteErr = errText(os.WriteFile(dir+"/file", nil, 0o600))
	}
	if d := os.Getenv("TEST_DATA_DIR"); d != "" {
		r.DataErr = errText(os.WriteFile(d+"/file", nil, 0o600))
	}
	b, _ := json.Marshal(r)
	fmt.Println(string(b))
	mode := ""
	if len(os.Args) > 2 {
		mode = os.Args[2]
	}
	switch mode {
	case "exit7":
		os.Exit(7)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		select {}
	}
	os.NewFile(3, "lifeline").Read(make([]byte, 1))
	os.Exit(0)
}

func errText(err error) string {
	if err != nil {
		return err.Error()
	}
	return ""
}

type report struct {
	Status            string
	Env, Args, FDs    []string
	PID, Umask        int
	NoFile            uint64
	Dir               string
	WriteErr, DataErr string
}

func (r report) status(name string) string {
	for line := range strings.Lines(r.Status) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}
	return ""
}

// testCore starts what its arguments say and prints what happens, a line each, to the file that the last
// argument names by descriptor path; then it does as told by the mode.
func testCore() {
	sock, err := CoreSocket()
	if err != nil {
		panic(err)
	}
	cl := NewClient(sock)
	out := os.Stderr
	say := func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	status, _ := os.ReadFile("/proc/self/status")
	b, _ := json.Marshal(report{Status: string(status), PID: os.Getpid()})
	say("core %s", b)
	_ = cl.Ready()
	for _, kind := range strings.Split(os.Args[2], ",") {
		p, err := cl.Spawn(context.Background(), service.Kind(kind))
		if err != nil {
			say("failed %s|%s|%s", errs.ReasonOf(err), err, errs.RemedyOf(err))
			continue
		}
		line, _ := bufio.NewReader(p.Stdout).ReadString('\n')
		say("plugin %s", strings.TrimSpace(line))
		go func() {
			<-p.Gone
			say("exited %s", p.Exit())
		}()
		if os.Args[3] == "term" {
			_ = p.Signal(syscall.SIGTERM)
			<-p.Gone
			time.Sleep(10 * time.Millisecond) // let the other goroutine print
		}
	}
	say("done")
	switch os.Args[3] {
	case "exit":
		os.Exit(3)
	case "flood": // many starts, and nobody reads the answers
		for i := range uint32(1000) {
			if cl.c.send(&message{Type: msgStart, Seq: 1000 + i, Kind: 4}) != nil {
				break
			}
		}
	case "garbage":
		syscall.Sendmsg(CoreSocketFD, []byte{9, 9, 9}, nil, nil, 0)
	case "config":
		os.Exit(ExitConfig)
	}
	<-cl.Stop()
	say("stop")
	os.Exit(0)
}
