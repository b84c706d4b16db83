package logsvc

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/engine"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// Workers are what the program does beside being a plugin, with stores that no plugin has open.
func Workers() map[string]func(args []string) int {
	return map[string]func(args []string) int{
		"check": func(args []string) int {
			return onStore(args, os.Stderr, "check --data-dir DIR\nReads a log store and compares all indexes with the entries, and the audit chain.\n"+
				"Exit code 0: sound; 1: damaged; 2: could not be read.", func(dir string) int {
				return check(os.Stdout, os.Stderr, engine.Options{Dir: dir, ReadOnly: true})
			})
		},
		"backup": func(args []string) int {
			return onStore(args, os.Stderr, "backup --data-dir DIR > FILE\nWrites a log store as the stream that a running plugin gives for a backup.", func(dir string) int {
				return backup(dir, os.Stdout, os.Stderr)
			})
		},
		"restore": func(args []string) int {
			return onStore(args, os.Stderr, "restore --data-dir DIR < FILE\nPuts a backup into a directory without entries, and checks it.", func(dir string) int {
				return restore(dir, os.Stdin, os.Stdout, os.Stderr)
			})
		},
	}
}

// onStore parses --data-dir.
func onStore(args []string, errOut io.Writer, usage string, fn func(dir string) int) int {
	dir := ""
	switch {
	case len(args) == 2 && args[0] == "--data-dir":
		dir = args[1]
	case len(args) == 1:
		dir, _ = strings.CutPrefix(args[0], "--data-dir=")
		if dir == args[0] {
			dir = ""
		}
	}
	if dir == "" {
		fmt.Fprintf(errOut, "usage: mvirt-log %s\n", usage)
		return 2
	}
	return fn(dir)
}

// complain says what went wrong; its result is the exit code.
func complain(errOut io.Writer, err error) int {
	fmt.Fprintf(errOut, "error: %v\n", err)
	if r := errs.RemedyOf(err); r != "" {
		fmt.Fprintf(errOut, "remedy: %s\n", r)
	}
	return 2
}

func backup(dir string, out, errOut io.Writer) int {
	if _, err := os.Stat(dir); err != nil { // opening would make it
		return complain(errOut, errs.Wrap(errs.NotFound, err, "open the store"))
	}
	s, err := Open(engine.Options{Dir: dir, Now: time.Now})
	if err != nil {
		return complain(errOut, err)
	}
	ctx := context.Background()
	err = s.Backup(ctx, out)
	if cerr := s.Shutdown(ctx); err == nil {
		err = cerr
	}
	if err != nil {
		return complain(errOut, err)
	}
	return 0
}

func restore(dir string, in io.Reader, out, errOut io.Writer) int {
	s, err := Open(engine.Options{Dir: dir, Now: time.Now})
	if err != nil {
		return complain(errOut, err)
	}
	ctx := context.Background()
	err = s.Restore(ctx, in)
	if cerr := s.Shutdown(ctx); err == nil {
		err = cerr
	}
	if err != nil {
		return complain(errOut, err)
	}
	return check(out, errOut, engine.Options{Dir: dir, ReadOnly: true})
}

func check(out, errOut io.Writer, opt engine.Options) int {
	st, err := engine.Open(opt)
	if err != nil {
		return complain(errOut, err)
	}
	ctx := context.Background()
	defer st.Close(ctx)
	rep, err := st.Check(ctx)
	if err != nil {
		return complain(errOut, err)
	}
	chain, err := st.Verify(ctx, log.VerifyRequest{})
	if err != nil {
		rep.Problems = append(rep.Problems, fmt.Sprintf("audit chain: %v", err))
	}
	for _, b := range chain.Breaks {
		rep.Problems = append(rep.Problems, fmt.Sprintf("audit chain: %s %s %s: %s", b.What, b.Time.Format("2006-01-02T15:04:05.000Z07:00"), b.EntryID, b.Detail))
	}
	for _, c := range st.Conditions() {
		rep.Problems = append(rep.Problems, c.Code+": "+c.Text)
	}
	for _, p := range rep.Problems {
		fmt.Fprintln(out, p)
	}
	fmt.Fprintf(out, "%d entries, %d segments, %d audit entries in the chain, %d problems\n", rep.Entries, rep.Segments, chain.Checked, len(rep.Problems))
	if len(rep.Problems) > 0 {
		return 1
	}
	return 0
}
