package engine

import (
	"errors"
	"fmt"
	"sort"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/mvirt/mvirt/sdk/service"
)

// Codes of conditions.
const (
	condCorrupt = "LOG_CORRUPT"
	condFull    = "DISK_FULL"
	condLow     = "DISK_LOW"
	condEngine  = "LOG_ENGINE_ERROR"
	condBroken  = "LOG_NOT_DURABLE"
)

var remedies = map[string]string{
	condCorrupt: "restore the log from a backup; what is readable stays readable, and `mvirt-log check` names what is not",
	condFull:    "free space, or lower --retain-age and --retain-size; the log goes on by itself",
	condLow:     "free space, or lower --retain-age and --retain-size; the log goes on by itself",
	condBroken:  "check the disk of the log's data directory, then restart the log plugin",
	condEngine:  "look at the log plugin's own messages; if it lasts, check the disk",
}

// conditions is the trouble that lasts.
type conditions struct {
	now func() time.Time
	mu  sync.Mutex
	all map[string]service.Condition
}

// set adds a condition or renews its text; level 0 is the store as a whole.
func (c *conditions) set(code string, level byte, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		c.all = map[string]service.Condition{}
	}
	key := fmt.Sprint(code, level)
	sev := service.SeverityCritical
	if code == condLow || code == condEngine {
		sev = service.SeverityWarning
	}
	old, ok := c.all[key]
	n := service.Condition{Code: code, Severity: sev, Since: c.now(), Text: text, Remedy: remedies[code]}
	if ok {
		n.Since = old.Since
	}
	c.all[key] = n
}

func (c *conditions) clear(code string, level byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, fmt.Sprint(code, level))
}

// Conditions lists the trouble that lasts.
func (s *Store) Conditions() []service.Condition {
	s.conds.mu.Lock()
	defer s.conds.mu.Unlock()
	var out []service.Condition
	for _, c := range s.conds.all {
		out = append(out, c)
	}
	sort.Slice(out, func(i, k int) bool {
		if out[i].Code != out[k].Code {
			return out[i].Code < out[k].Code
		}
		return out[i].Text < out[k].Text
	})
	return out
}

// fullFlag says that writes wait for disk space, and wakes those who wait for such writes.
type fullFlag struct {
	mu sync.Mutex
	on bool
	ch chan struct{} // closed while on
}

func (f *fullFlag) is() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.on
}

func (f *fullFlag) signal() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ch == nil {
		f.ch = make(chan struct{})
	}
	return f.ch
}

func (f *fullFlag) set(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if on == f.on {
		return
	}
	f.on = on
	switch {
	case !on:
		f.ch = nil
	case f.ch == nil:
		f.ch = make(chan struct{})
		fallthrough
	default:
		close(f.ch)
	}
}

// diskFull is told by the file system below Pebble.
func (s *Store) diskFull(on bool) {
	s.full.set(on)
	if on {
		s.conds.set(condFull, 0, "the disk of the log is full; entries are refused, reading goes on")
		return
	}
	s.conds.clear(condFull, 0)
}

// checkSpace refuses appends before the disk is full, so that what makes space (retention, compaction) has
// some to work with.
func (s *Store) checkSpace() {
	u, err := s.opt.FS.GetDiskUsage(s.opt.Dir)
	if err != nil {
		if !errors.Is(err, vfs.ErrUnsupported) {
			s.log.Warn("free space of the data directory is not known", "error", err)
		}
		return
	}
	low := u.AvailBytes < s.opt.MinFree
	if low != s.low.Swap(low) {
		if low {
			s.conds.set(condLow, 0, fmt.Sprintf("%d MiB are free on the disk of the log, under the %d MiB that it keeps in reserve; entries are refused, reading goes on",
				u.AvailBytes>>20, s.opt.MinFree>>20))
		} else {
			s.conds.clear(condLow, 0)
		}
	}
}

// careLoop looks at free space and retention.
func (s *Store) careLoop() {
	defer s.wg.Done()
	space := time.NewTicker(s.opt.PollDisk)
	defer space.Stop()
	every := s.opt.Retention.Every
	if every == 0 {
		every = time.Minute
	}
	keep := time.NewTicker(every)
	defer keep.Stop()
	for {
		select {
		case <-s.done:
			return
		case <-space.C:
			s.checkSpace()
			s.tidy()
			s.kickSealer()
		case <-keep.C:
			if err := s.Retain(); err != nil {
				s.log.Warn("retention failed; it is tried again", "error", err)
			}
		}
	}
}

// idlePack is how long nothing must have come before what is in memory is packed, and how much of it: fewer
// entries make poor segments, and stay in the log.
const (
	idlePack    = 10 * time.Second
	idlePackMin = 4096
	idleRaw     = 4 << 20 // bytes of the raw log from which all is packed
)

// tidy packs what is left in memory after a burst, so that its log goes.
func (s *Store) tidy() {
	n := s.stats.appended.Load()
	if n != s.tidySeen || s.opt.Now().Sub(s.tidyTime) < idlePack {
		if n != s.tidySeen {
			s.tidySeen, s.tidyTime = n, s.opt.Now()
		}
		return
	}
	s.mu.Lock()
	waiting := 0
	// A few entries of a quiet level would keep the log of all that came meanwhile.
	least := idlePackMin
	if s.raw.Size() > idleRaw {
		least = 1
	}
	for l := byte(1); l < levels; l++ {
		if h := s.active[l]; h.Len() >= least && h.Shown() == h.Len() {
			s.freeze(l, 0)
		}
		waiting += len(s.frozen[l])
	}
	s.mu.Unlock()
	if waiting > 0 {
		return // the sealer first
	}
	s.sealMu.Lock()
	defer s.sealMu.Unlock()
	if s.unflushed > 0 {
		if err := s.flush(); err != nil {
			s.log.Warn("flush failed; it is tried again", "error", err)
			return
		}
	}
	select {
	case s.trims <- struct{}{}:
	default:
	}
}

// trim gives back the space of the raw log when nothing is in it. The committer does it, as the one who
// writes there.
func (s *Store) trim() {
	if !s.sealMu.TryLock() {
		return // another time
	}
	defer s.sealMu.Unlock()
	s.mu.RLock()
	empty := s.unflushed == 0
	for l := byte(1); l < levels; l++ {
		empty = empty && s.active[l].Len() == 0 && len(s.frozen[l]) == 0
	}
	s.mu.RUnlock()
	if err := s.raw.Trim(empty); err != nil {
		s.log.Warn("files of the raw log are not removed; the next start does it", "error", err)
	}
}

// listener hears what goes wrong inside Pebble.
func (s *Store) listener() *pebble.EventListener {
	return &pebble.EventListener{
		BackgroundError: func(err error) {
			if pebble.IsCorruptionError(err) {
				s.conds.set(condCorrupt, 0, fmt.Sprintf("a part of the store is damaged: %v", err))
				return
			}
			s.conds.set(condEngine, 0, fmt.Sprintf("work in the background fails: %v", err))
		},
		DataCorruption: func(info pebble.DataCorruptionInfo) {
			s.conds.set(condCorrupt, 0, fmt.Sprintf("table %s is damaged: %v", info.Path, info.Details))
		},
		FlushEnd: func(info pebble.FlushInfo) {
			if info.Err == nil {
				s.conds.clear(condEngine, 0)
			}
		},
	}
}
