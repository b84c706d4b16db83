// Package arch holds no code: its tests keep the directions of imports, the size of files and the package
// comments of the whole repository as docs/architecture.md has them.
package arch
