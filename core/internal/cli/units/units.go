// Package units reads and writes what people type: sizes, times, ages.
//
// A size is a whole number with an optional suffix K, M, G, T or P, in powers of 1024; "10G", "10GiB" and
// "10GB" mean the same 10·2³⁰ bytes, a bare number means bytes. There is no second, decimal meaning anywhere
// in mvirt: disks and memory are made in binary units.
package units

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

const letters = "KMGTPE"

// ParseSize reads a size; field names the flag in the error.
func ParseSize(field, text string) (uint64, error) {
	bad := func(format string, args ...any) error {
		return errs.Field(field, `give a whole number with K, M, G or T, in powers of 1024: "10G", "512M"`,
			"%s %s %s", field, ident.Quote(text), fmt.Sprintf(format, args...))
	}
	s := strings.ToUpper(strings.TrimSpace(text))
	end := 0
	for end < len(s) && s[end] >= '0' && s[end] <= '9' {
		end++
	}
	number, unit := s[:end], strings.TrimSpace(s[end:])
	switch {
	case number == "" && strings.HasPrefix(s, "-"):
		return 0, bad("is negative")
	case number == "":
		return 0, bad("is not a size")
	case strings.HasPrefix(unit, "."), strings.HasPrefix(unit, ","):
		return 0, bad("is not a whole number; use the next smaller unit")
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return 0, bad("is too large")
	}
	shift := 0
	switch unit {
	case "", "B":
	default:
		i := strings.IndexByte(letters, unit[0])
		if i < 0 || unit[1:] != "" && unit[1:] != "B" && unit[1:] != "IB" {
			return 0, bad("has an unknown unit")
		}
		shift = 10 * (i + 1)
	}
	if shift > bits.LeadingZeros64(n) && n != 0 || n<<shift > math.MaxInt64 {
		return 0, bad("is too large")
	}
	return n << shift, nil
}

// Size writes bytes for people: three significant digits, "10G", "1.5G", "512M", "0".
func Size(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10)
	}
	f, unit := float64(n), byte(0)
	for i := 0; i < len(letters) && f >= 1024; i++ {
		f /= 1024
		unit = letters[i]
	}
	if f >= 999.5 && unit != 'E' { // would print as four digits
		f, unit = f/1024, letters[strings.IndexByte(letters, unit)+1]
	}
	prec := 0
	switch {
	case f < 9.995:
		prec = 2
	case f < 99.95:
		prec = 1
	}
	s := strconv.FormatFloat(f, 'f', prec, 64)
	if strings.Contains(s, ".") {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	return s + string(unit)
}

// Age writes how long ago t was, in its largest unit: "42s", "12m", "5h", "3d".
func Age(now, t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return Duration(now.Sub(t))
}

// Duration writes d in its largest unit.
func Duration(d time.Duration) string {
	switch d = max(d, 0); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// layouts of absolute times, most exact first; those without a zone are local time.
var layouts = []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04",
	"2006-01-02T15:04", "2006-01-02"}

// ParseTime reads a point in time: an age ("90s", "10m", "2h", "3d", "2w", "1h30m": so long before now),
// "now", "today", "yesterday", a clock time of today ("15:04", "15:04:05"), a date ("2026-11-24"), date and
// time ("2026-11-24 15:04"), or RFC 3339.
func ParseTime(field, text string, now time.Time) (time.Time, error) {
	s := strings.TrimSpace(text)
	midnight := time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, now.Location())
	switch s {
	case "now":
		return now, nil
	case "today":
		return midnight, nil
	case "yesterday":
		return midnight.AddDate(0, 0, -1), nil
	}
	if d, ok := ParseAge(s); ok {
		return now.Add(-d), nil
	}
	for _, l := range layouts {
		if t, err := time.ParseInLocation(l, s, now.Location()); err == nil {
			return t, nil
		}
	}
	for _, l := range []string{"15:04:05", "15:04"} {
		if t, err := time.Parse(l, s); err == nil {
			return midnight.Add(t.Sub(time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC))), nil
		}
	}
	return time.Time{}, errs.Field(field, `give an age ("10m", "2h", "3d"), a date ("2026-11-24") or a date and time ("2026-11-24 15:04")`,
		"%s %s is not a time", field, ident.Quote(text))
}

// ParseAge reads a duration that may also use d (days) and w (weeks); it says whether s is one. Negative
// and overflowing ones are not.
func ParseAge(s string) (time.Duration, bool) {
	total := time.Duration(0)
	if s == "" {
		return 0, false
	}
	for s != "" {
		end := 0
		for end < len(s) && (s[end] >= '0' && s[end] <= '9' || s[end] == '.') {
			end++
		}
		unitEnd := end
		for unitEnd < len(s) && s[unitEnd] >= 'a' && s[unitEnd] <= 'z' {
			unitEnd++
		}
		n, err := strconv.ParseFloat(s[:end], 64)
		if err != nil || unitEnd == end {
			return 0, false
		}
		unit, ok := map[string]time.Duration{"ms": time.Millisecond, "s": time.Second, "m": time.Minute, "h": time.Hour,
			"d": 24 * time.Hour, "w": 7 * 24 * time.Hour}[s[end:unitEnd]]
		if !ok {
			return 0, false
		}
		f := n * float64(unit)
		if f > float64(math.MaxInt64)/2 || total+time.Duration(f) < total {
			return 0, false
		}
		total += time.Duration(f)
		s = s[unitEnd:]
	}
	return total, true
}
