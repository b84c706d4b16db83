package supervisor

import (
	"context"
	"fmt"
	"time"
)

// checkHealth asks the instance how it is, at once and then at each interval, and reports on dead when it
// left HealthMisses checks in a row without an answer. It ends with ctx.
func (u *unit) checkHealth(ctx context.Context, inst Instance, dead chan<- string) {
	tick := time.NewTicker(u.HealthInterval)
	defer tick.Stop()
	base := inst.Service()
	for {
		hctx, cancel := context.WithTimeout(ctx, u.HealthDeadline)
		h, err := base.Health(hctx)
		cancel()
		if ctx.Err() != nil {
			return
		}
		u.mu.Lock()
		if u.ending {
			u.mu.Unlock()
			return
		}
		if err != nil {
			u.misses++
		} else {
			u.misses, u.healthAt = 0, time.Now()
		}
		misses := u.misses
		u.mu.Unlock()
		switch {
		case err == nil:
			u.opt.Health.Replace(u.source(), append(h.Conditions, u.ownConditions(inst)...))
		case misses >= u.HealthMisses:
			dead <- fmt.Sprintf("no answer to %d health checks in a row (%s each)", misses, u.HealthDeadline)
			return
		default:
			u.notice(true, err, "health check %d of %d without an answer", misses, u.HealthMisses)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
