package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// The file as TOML has it. Pointers tell "absent" from "zero".
type fileConfig struct {
	Core   fileCore     `toml:"core"`
	Jail   fileJail     `toml:"jail"`
	TLS    *fileTLS     `toml:"tls"`
	Access []fileAccess `toml:"access"`
	Plugin struct {
		Storage *filePlugin `toml:"storage"`
		Net     *filePlugin `toml:"net"`
		VMM     *filePlugin `toml:"vmm"`
		Log     *filePlugin `toml:"log"`
	} `toml:"plugin"`
}

type fileCore struct {
	Socket          *string `toml:"socket"`
	SocketGroup     *string `toml:"socket_group"`
	SocketMode      *string `toml:"socket_mode"`
	StateDir        *string `toml:"state_dir"`
	RunDir          *string `toml:"run_dir"`
	User            *string `toml:"user"`
	Group           *string `toml:"group"`
	LogLevel        *string `toml:"log_level"`
	CallWait        *string `toml:"call_wait"`
	CallTimeout     *string `toml:"call_timeout"`
	StopTimeout     *string `toml:"stop_timeout"`
	RestartDelayMax *string `toml:"restart_delay_max"`
	SpoolLimit      any     `toml:"spool_limit"`
	Cgroup          *string `toml:"cgroup"`
}

type filePlugin struct {
	Command          *string           `toml:"command"`
	Args             []string          `toml:"args"`
	User             *string           `toml:"user"`
	Group            *string           `toml:"group"`
	Groups           []string          `toml:"groups"`
	Capabilities     []string          `toml:"capabilities"`
	DataDir          *string           `toml:"data_dir"`
	WorkerUser       *string           `toml:"worker_user"`
	SHA256           *string           `toml:"sha256"`
	Env              map[string]string `toml:"env"`
	NoFile           *int64            `toml:"nofile"`
	Attach           *string           `toml:"attach"`
	HealthInterval   *string           `toml:"health_interval"`
	HealthDeadline   *string           `toml:"health_deadline"`
	HealthMisses     *int64            `toml:"health_misses"`
	StartTimeout     *string           `toml:"start_timeout"`
	StopTimeout      *string           `toml:"stop_timeout"`
	RestartDelayMax  *string           `toml:"restart_delay_max"`
	QuarantineDeaths *int64            `toml:"quarantine_deaths"`
}

// Problem is one thing wrong with a configuration.
type Problem struct {
	File   string
	Line   int    // 1-based; 0: the whole file
	Column int    // 1-based
	Key    string // "plugin.vmm.user"
	Text   string
	Remedy string
}

// Error is "file:line:column: key: text (remedy)".
func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	b.WriteString(p.Text)
	if p.Remedy != "" {
		b.WriteString(" (" + p.Remedy + ")")
	}
	return b.String()
}

// Problems are all things wrong with a configuration, in the order of the file.
type Problems []Problem

// Error has one problem a line.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// Is makes errors.Is(err, errs.Invalid) work.
func (ps Problems) Is(target error) bool { return target == errs.Invalid }

// Load reads and checks a file. Errors: NotFound or Denied for the file itself, [Problems] for what it says.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, errs.New(errs.NotFound, "there is no configuration file %s", path).
				Do("copy the commented example that comes with mvirt to " + path + ", or give another with --config")
		}
		return nil, errs.Wrap(errs.Unknown, err, "the configuration cannot be read")
	}
	defer f.Close()
	return Read(path, f)
}

// Read checks a configuration from an opened file; path is for messages only.
func Read(path string, r io.Reader) (*Config, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxFile+1))
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "reading %s", path)
	}
	return Parse(path, data)
}

// Parse checks the text of a configuration; path is for messages only.
func Parse(path string, data []byte) (*Config, error) {
	if len(data) > MaxFile {
		return nil, Problems{{File: path, Text: fmt.Sprintf("the file is larger than %d bytes", MaxFile),
			Remedy: "give an mvirt configuration"}}
	}
	var f fileConfig
	dec := toml.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return nil, decodeProblems(path, err)
	}
	ck := &checker{file: path, at: keyPositions(data)}
	cfg := ck.build(&f)
	if len(ck.problems) > 0 {
		return nil, ck.sorted()
	}
	return cfg, nil
}

func decodeProblems(path string, err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var out Problems
		for i := range strict.Errors {
			e := &strict.Errors[i]
			l, c := e.Position()
			key := strings.Join(e.Key(), ".")
			out = append(out, Problem{File: path, Line: l, Column: c, Key: key, Text: "unknown key", Remedy: unknownRemedy(e.Key())})
		}
		return out
	}
	var de *toml.DecodeError
	if errors.As(err, &de) {
		l, c := de.Position()
		return Problems{{File: path, Line: l, Column: c, Key: strings.Join(de.Key(), "."),
			Text: strings.TrimPrefix(de.Error(), "toml: "), Remedy: "see the commented example for the key's type"}}
	}
	return Problems{{File: path, Text: err.Error(), Remedy: "the file must be TOML 1.0"}}
}

// unknownRemedy lists what may stand in the table that the unknown key is in.
func unknownRemedy(key []string) string {
	switch {
	case len(key) >= 2 && key[0] == "plugin" && !isKind(key[1]):
		return "plugins are named by kind: plugin.storage, plugin.net, plugin.vmm, plugin.log"
	case len(key) >= 3 && key[0] == "plugin":
		return "keys of a plugin: " + strings.Join(keysOf(filePlugin{}), ", ")
	case len(key) >= 2 && key[0] == "core":
		return "keys of core: " + strings.Join(keysOf(fileCore{}), ", ")
	case len(key) >= 2 && key[0] == "jail":
		return "keys of jail: " + strings.Join(keysOf(fileJail{}), ", ")
	}
	switch {
	case len(key) >= 2 && key[0] == "tls":
		return "keys of tls: " + strings.Join(keysOf(fileTLS{}), ", ")
	case len(key) >= 2 && key[0] == "access":
		return "keys of access: " + strings.Join(keysOf(fileAccess{}), ", ")
	}
	return "tables are core, jail, tls, access and plugin.<kind>"
}

func isKind(s string) bool {
	for _, k := range service.Kinds() {
		if string(k) == s {
			return true
		}
	}
	return false
}

type position struct{ line, column int }

// keyPositions finds where each key stands, so that a value that is well-formed but wrong can be pointed
// at. It is best effort: what it cannot place is reported without a line.
func keyPositions(data []byte) map[string]position {
	at := map[string]position{}
	var p unstable.Parser
	p.Reset(data)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		var names []string
		var first *unstable.Node
		for it := e.Key(); it.Next(); {
			n := it.Node()
			if first == nil {
				first = n
			}
			names = append(names, string(n.Data))
		}
		if first == nil {
			continue
		}
		s := p.Shape(first.Raw).Start
		pos := position{s.Line, s.Column}
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = names
			at[strings.Join(names, ".")] = pos
		case unstable.KeyValue:
			at[strings.Join(append(append([]string(nil), table...), names...), ".")] = pos
		}
	}
	return at
}
