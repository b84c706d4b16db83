package units

import (
	"errors"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

func TestParseSize(t *testing.T) {
	good := map[string]uint64{"0": 0, "1": 1, "512": 512, "1K": 1024, "512M": 512 << 20, "10G": 10 << 30, "10g": 10 << 30, " 10 GiB ": 10 << 30,
		"10GB": 10 << 30, "2T": 2 << 40, "1P": 1 << 50, "7E": 7 << 60, "3B": 3, "9223372036854775807": 1<<63 - 1}
	for in, want := range good {
		if got, err := ParseSize("size", in); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "G", "-1G", "1.5G", "1,5G", "10X", "10GX", "10GiBs", "8E", "9223372036854775808", "99999999999999999999", "16384P", "abc", "0x10", "1K1"} {
		_, err := ParseSize("size", in)
		if !errors.Is(err, errs.Invalid) || errs.RemedyOf(err) == "" {
			t.Errorf("ParseSize(%q) gave %v, want an Invalid error with a remedy", in, err)
		}
	}
}

func TestSize(t *testing.T) {
	for in, want := range map[uint64]string{0: "0", 1023: "1023", 1024: "1K", 1536: "1.5K", 10 << 30: "10G", 1<<30 - 1: "1G", 1000 << 20: "0.98G",
		1 << 63: "8E", 64 << 20: "64M", 1234567: "1.18M", 123 << 20: "123M", 12.5 * 1024 * 1024: "12.5M"} {
		if got := Size(in); got != want {
			t.Errorf("Size(%d) = %q, want %q", in, got, want)
		}
	}
}

func TestParseTime(t *testing.T) {
	zone := time.FixedZone("x", 3600)
	now := time.Date(2026, 11, 24, 15, 4, 5, 0, zone)
	day := func(d, h, m, s int) time.Time { return time.Date(2026, 11, d, h, m, s, 0, zone) }
	for in, want := range map[string]time.Time{
		"now": now, "today": day(24, 0, 0, 0), "yesterday": day(23, 0, 0, 0), "10m": now.Add(-10 * time.Minute), "1h30m": now.Add(-90 * time.Minute),
		"5m ": now.Add(-5 * time.Minute), "3d": now.Add(-72 * time.Hour), "1w": now.Add(-168 * time.Hour), "2026-11-20": day(20, 0, 0, 0), "2026-11-20 12:30": day(20, 12, 30, 0),
		"2026-11-20T12:30:15": day(20, 12, 30, 15), "08:15": day(24, 8, 15, 0), "08:15:30": day(24, 8, 15, 30),
		"2026-11-20T12:30:15Z": time.Date(2026, 11, 20, 12, 30, 15, 0, time.UTC),
	} {
		if got, err := ParseTime("since", in, now); err != nil || !got.Equal(want) {
			t.Errorf("ParseTime(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "soon", "10", "10x", "2026-13-01", "-5m", "99999999999w", "1e9h"} {
		if got, err := ParseTime("since", in, now); !errors.Is(err, errs.Invalid) || errs.RemedyOf(err) == "" {
			t.Errorf("ParseTime(%q) = %v, %v; want Invalid with a remedy", in, got, err)
		}
	}
}

func TestDuration(t *testing.T) {
	for in, want := range map[time.Duration]string{-time.Second: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 3 * time.Hour: "3h", 49 * time.Hour: "2d"} {
		if got := Duration(in); got != want {
			t.Errorf("Duration(%v) = %q, want %q", in, got, want)
		}
	}
	if got := Age(time.Now(), time.Time{}); got != "-" {
		t.Errorf("Age of no time is %q", got)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"10G", "1h30m", "2026-11-24", "", "9999999999999999999P", "..s", "1.1.1h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseSize("x", s); err == nil && n > 1<<63-1 {
			t.Fatalf("%q gave %d", s, n)
		}
		if d, ok := ParseAge(s); ok && d < 0 {
			t.Fatalf("%q gave %v", s, d)
		}
		_, _ = ParseTime("x", s, time.Unix(0, 0))
	})
}
