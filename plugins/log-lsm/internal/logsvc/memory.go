package logsvc

import "runtime/debug"

// LimitMemory sets the garbage collector so that the process stays small: what lives is the cache, heads of up
// to 24 MiB and as much being packed, and the dictionary; what is garbage between two collections may
// be half of that.
func LimitMemory(cacheSize int64) {
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(cacheSize + 112<<20)
}
