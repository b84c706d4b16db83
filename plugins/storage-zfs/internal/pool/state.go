package pool

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/zfscmd"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

type health struct {
	state    string
	readOnly bool
	capacity int // percent
	free     uint64
	size     uint64
}

func (b *Backend) health(ctx context.Context) (health, error) {
	rows, err := b.zfs.List(ctx, "zpool", "list", "-H", "-p", "-o", "health,readonly,capacity,free,size", b.pool)
	switch {
	case zfscmd.Is(err, zfscmd.NoPool):
		return health{}, errs.New(errs.Unavailable, "there is no pool %s%s", b.pool, b.elsewhere(ctx)).Because("POOL_MISSING").
			Do("import it: zpool import " + b.pool)
	case err != nil:
		return health{}, zfscmd.Kinded(err, "cannot look at the pool")
	case len(rows) != 1 || len(rows[0]) != 5:
		return health{}, errs.New(errs.Internal, "zpool list answers %q", rows)
	}
	r := rows[0]
	h := health{state: r[0], readOnly: r[1] == "on"}
	h.capacity, _ = strconv.Atoi(r[2])
	h.free, h.size = number(r[3]), number(r[4])
	return h, nil
}

// elsewhere tells of another pool that has mvirt's datasets: it may be ours under another name.
func (b *Backend) elsewhere(ctx context.Context) string {
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-o", "name,"+propKind, "-d", "1")
	if err != nil {
		return ""
	}
	for _, r := range rows {
		if name, ok := strings.CutSuffix(r[0], "/"+metaDataset); ok && len(r) == 2 && r[1] == kindOwn {
			return fmt.Sprintf(" (but mvirt's data is in a pool named %s)", name)
		}
	}
	return ""
}

// Space asks the pool's root dataset, which counts what volumes can use.
func (b *Backend) Space(ctx context.Context) (storagekit.Space, error) {
	rows, err := b.zfs.List(ctx, "zfs", "get", "-H", "-p", "-o", "value", "used,available,compressratio", b.pool)
	if err != nil {
		return storagekit.Space{}, zfscmd.Kinded(err, "cannot look at the pool")
	}
	if len(rows) != 3 {
		return storagekit.Space{}, errs.New(errs.Internal, "zfs get answers %q", rows)
	}
	used, avail := number(rows[0][0]), number(rows[1][0])
	ratio, err := strconv.ParseFloat(strings.TrimSuffix(rows[2][0], "x"), 64)
	if err != nil {
		ratio = 1
	}
	return storagekit.Space{Place: b.pool, Total: used + avail, Available: avail, Used: used, Compression: ratio, Reflink: true}, nil
}

// Above this part of the pool in use there is a warning: ZFS slows down when it has to search for space.
const (
	highUse   = 85
	almostAll = 95
)

// Conditions looks at the pool's health.
func (b *Backend) Conditions(ctx context.Context) []service.Condition {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	h, err := b.health(ctx)
	if err != nil {
		code := errs.ReasonOf(err)
		if code == "" {
			code = "POOL_FAILED"
		}
		return []service.Condition{{Code: code, Severity: service.SeverityCritical, Text: err.Error(), Remedy: errs.RemedyOf(err)}}
	}
	var out []service.Condition
	switch h.state {
	case "ONLINE":
	case "DEGRADED":
		out = append(out, service.Condition{Code: "POOL_DEGRADED", Severity: service.SeverityWarning,
			Text: fmt.Sprintf("the pool %s is degraded", b.pool), Remedy: "look at zpool status and replace the failed device"})
	case "SUSPENDED":
		out = append(out, service.Condition{Code: "POOL_SUSPENDED", Severity: service.SeverityCritical,
			Text: fmt.Sprintf("the pool %s is suspended", b.pool), Remedy: "repair its devices, then zpool clear " + b.pool})
	default:
		out = append(out, service.Condition{Code: "POOL_FAILED", Severity: service.SeverityCritical,
			Text: fmt.Sprintf("the pool %s is %s", b.pool, h.state), Remedy: "look at zpool status"})
	}
	if h.readOnly {
		out = append(out, service.Condition{Code: "POOL_READONLY", Severity: service.SeverityCritical,
			Text: fmt.Sprintf("the pool %s is read-only", b.pool), Remedy: "export it and import it without readonly=on"})
	}
	if h.capacity >= highUse {
		c := service.Condition{Code: "LOW_SPACE", Severity: service.SeverityWarning,
			Text:   fmt.Sprintf("the pool %s is %d %% full (%.1f GiB free)", b.pool, h.capacity, float64(h.free)/(1<<30)),
			Remedy: "delete what is not needed or add devices: a guest whose volume cannot grow sees write errors"}
		if h.capacity >= almostAll {
			c.Severity = service.SeverityCritical
		}
		out = append(out, c)
	}
	return out
}
