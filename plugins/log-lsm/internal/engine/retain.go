package engine

import "time"

// Retention says how long entries are kept.
type Retention struct {
	Every time.Duration
}

// Retain deletes what is not to be kept any longer.
func (s *Store) Retain() error { return nil }
