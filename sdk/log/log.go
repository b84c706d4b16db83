// Package log is the contract of log plugins: an audit and log store.
//
// # Words
//
// An entry is one thing that happened: when, how grave, said by which component, about which objects. An
// object id is any byte string; entries are found by each of the ids they carry. To append is to make
// durable: an acknowledged entry survives a power cut.
//
//	Append(entries)                                        → durable
//	Query(objects: [vm 0190…], newest first, limit 100)    → those, newest first
//	Query(…, follow)                                       → history, then live, no gap, no duplicate
//
// Entries are ordered by (Time, ID). Time is the sender's; it may step back or lie.
package log

import (
	"context"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
)

// Service is the log contract.
type Service interface {
	service.Base

	// Append makes entries durable, all or none, and returns when they are. An entry whose id is already
	// there is not stored again. Kinds: Invalid (bad level, no id, oversize), Exhausted (disk full).
	Append(ctx context.Context, entries []Entry) error
	// Query calls fn for each matching entry in order; it ends after Limit, at the end (without Follow), or
	// when fn or ctx ends it. A slow fn delays only itself. Kinds: Invalid, OutOfRange (page token gone).
	Query(ctx context.Context, q Query, fn func(Result) error) error
	// Stats says what is stored.
	Stats(ctx context.Context) (Stats, error)
}

// Level is how grave an entry is. On the wire: append only. Lower is graver.
type Level uint32

// Levels. Audit is apart: it marks a record of a change, kept longest.
const (
	LevelAudit Level = 1
	LevelError Level = 2
	LevelWarn  Level = 3
	LevelInfo  Level = 4
	LevelDebug Level = 5
)

var levelNames = map[Level]string{LevelAudit: "audit", LevelError: "error", LevelWarn: "warn", LevelInfo: "info", LevelDebug: "debug"}

// String is "audit", "error", "warn", "info", "debug" or "?".
func (l Level) String() string {
	if n, ok := levelNames[l]; ok {
		return n
	}
	return "?"
}

// ParseLevel reads what String writes; 0 for anything else.
func ParseLevel(s string) Level {
	for l, n := range levelNames {
		if n == s {
			return l
		}
	}
	return 0
}

// Limits of an entry; beyond them Append fails with Invalid.
const (
	MaxMessage   = 64 << 10
	MaxObjects   = 64
	MaxObjectLen = 256
	MaxLabels    = 64
	MaxBatch     = 10000
)

// Entry is one thing that happened.
type Entry struct {
	Time      time.Time // nanoseconds since 1970 matter, the zone does not
	ID        string    // chosen by the sender, unique; UUIDv7 by convention; 1 to 64 bytes
	Level     Level
	Component string // "core", "storage-zfs", "console", …
	Message   string // UTF-8
	Objects   []string
	Labels    map[string]string // "who", "op", "request", …
}

// Query selects entries. Zero fields select all.
type Query struct {
	Objects     []string          // entries that carry any of these …
	AllObjects  bool              // … or all of these
	Since       time.Time         // inclusive
	Until       time.Time         // exclusive
	MaxLevel    Level             // this grave or graver: LevelInfo leaves debug out. 0: all
	Levels      []Level           // or exactly these
	Components  []string          // any of
	Labels      map[string]string // all of
	Contains    string            // substring of the message
	IgnoreCase  bool
	NewestFirst bool
	Limit       uint32 // 0: no limit
	PageToken   string // from Result: go on behind it, under the same query
	Follow      bool   // after the history, entries as they come; not with NewestFirst
}

// Result is one entry found, or a note about the stream.
type Result struct {
	Entry     Entry
	PageToken string // position of this entry
	CaughtUp  bool   // Follow: history is done, live begins; Entry is empty
	Missed    uint64 // Follow: this many could not be kept in memory and are read from disk now; Entry is empty
}

// Stats says what is stored.
type Stats struct {
	Entries     uint64
	Objects     uint64 // estimate of distinct object ids
	DiskBytes   uint64
	Oldest      time.Time
	Newest      time.Time
	ByLevel     map[string]uint64
	Dropped     uint64 // by rate limits, since start
	MemoryBytes uint64
}

// Verifier is the optional feature FeatureLogVerify: audit entries form a hash chain.
type Verifier interface {
	// Verify walks the chain and reports each break.
	Verify(ctx context.Context, req VerifyRequest) (VerifyReport, error)
}

// VerifyRequest narrows a verification; zero is all.
type VerifyRequest struct {
	Since time.Time
	Until time.Time
}

// VerifyReport is the outcome.
type VerifyReport struct {
	Checked uint64
	Breaks  []VerifyBreak
	Head    string // hash of the newest audit entry, hex
}

// VerifyBreak names an entry that was edited, removed or inserted.
type VerifyBreak struct {
	EntryID string
	Time    time.Time
	What    string // "edited", "removed", "inserted"
	Detail  string
}

// Backuper is the optional feature FeatureLogBackup.
type Backuper = service.Backuper
