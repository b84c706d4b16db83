//go:build !amd64 && !arm64

package worker

const auditArch = 0

func legacyCalls() []int { return nil }
