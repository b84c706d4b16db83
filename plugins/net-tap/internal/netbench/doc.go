// Package netbench measures mvirt-net: what make bench-net prints. It holds tests only, as they need the
// test front-end and namespaces of their own.
package netbench
