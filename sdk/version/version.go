// Package version holds the version that all of mvirt's programs report.
package version

// Version is set at link time: -ldflags "-X github.com/mvirt/mvirt/sdk/version.Version=1.2.3".
var Version = "0.1.0-dev"
