// Package launcher starts plugins: as root under other users, or as an ordinary user all under the same.
package launcher
