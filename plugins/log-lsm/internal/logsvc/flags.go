package logsvc

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/engine"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// Flags are the plugin's own command line flags.
type Flags struct {
	dataDir   string
	cache     string
	age       string
	size      string
	levelSize string
	minFree   string
}

// Register declares the flags with their defaults.
func (f *Flags) Register(fs *pflag.FlagSet) {
	fs.StringVar(&f.dataDir, "data-dir", "/var/lib/mvirt/log", "directory of the store; made if absent")
	fs.StringVar(&f.cache, "cache-size", "64MiB", "memory for reading and for what is on its way to the disk")
	fs.StringVar(&f.age, "retain-age", "debug=7d,info=90d,warn=365d,error=365d", "how long entries of each level are kept; a level that is not named is kept for ever")
	fs.StringVar(&f.size, "retain-size", "0", "delete the oldest entries, the least grave levels first, when the store is larger; 0: no limit")
	fs.StringVar(&f.levelSize, "retain-level-size", "", "the same for single levels: debug=1GiB,info=10GiB")
	fs.StringVar(&f.minFree, "min-free", "64MiB", "free space on the disk below which entries are refused")
}

// Options are what the flags say.
func (f *Flags) Options() (engine.Options, error) {
	o := engine.Options{Dir: f.dataDir}
	if f.dataDir == "" {
		return o, errs.Field("data-dir", "give --data-dir a directory", "--data-dir is empty")
	}
	cache, err := parseSize("cache-size", f.cache)
	if err != nil {
		return o, err
	}
	if cache < 8<<20 || cache > 1<<40 {
		return o, errs.Field("cache-size", "give at least 8MiB", "--cache-size %s is too small or absurd", f.cache)
	}
	o.CacheSize = int64(cache)
	if o.MinFree, err = parseSize("min-free", f.minFree); err != nil {
		return o, err
	}
	if o.Retention.Size, err = parseSize("retain-size", f.size); err != nil {
		return o, err
	}
	o.Retention.Age = map[log.Level]time.Duration{}
	err = eachLevel("retain-age", f.age, func(l log.Level, v string) error {
		d, err := parseAge(v)
		o.Retention.Age[l] = d
		return err
	})
	if err != nil {
		return o, err
	}
	o.Retention.LevelSize = map[log.Level]uint64{}
	err = eachLevel("retain-level-size", f.levelSize, func(l log.Level, v string) error {
		n, err := parseSize("retain-level-size", v)
		o.Retention.LevelSize[l] = n
		return err
	})
	return o, err
}

func eachLevel(flag, s string, fn func(l log.Level, v string) error) error {
	if s == "" || s == "0" {
		return nil
	}
	for part := range strings.SplitSeq(s, ",") {
		name, v, ok := strings.Cut(strings.TrimSpace(part), "=")
		l := log.ParseLevel(name)
		if !ok || l == 0 {
			return errs.Field(flag, "write level=value,level=value with audit, error, warn, info, debug", "--%s: %q names no level", flag, part)
		}
		if err := fn(l, v); err != nil {
			return errs.Wrap(errs.Invalid, err, "--%s", flag)
		}
	}
	return nil
}

// parseSize reads "64MiB", "10GiB", "5G" (also binary) or bytes.
func parseSize(flag, s string) (uint64, error) {
	num := strings.TrimRight(s, "KMGTiB")
	unit := s[len(num):]
	shift, ok := map[string]uint{"": 0, "B": 0, "K": 10, "KiB": 10, "M": 20, "MiB": 20, "G": 30, "GiB": 30, "T": 40, "TiB": 40}[unit]
	n, err := strconv.ParseUint(num, 10, 63)
	if err != nil || !ok || n > 1<<62>>shift {
		return 0, errs.Field(flag, "write a number with KiB, MiB, GiB or TiB", "%q is not a size", s)
	}
	return n << shift, nil
}

// parseAge reads "7d", "12h", or what time.ParseDuration does.
func parseAge(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err == nil && n > 0 {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	} else if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return d, nil
	}
	return 0, fmt.Errorf("%q is no time such as 7d or 12h", s)
}
