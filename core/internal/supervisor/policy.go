package supervisor

import "time"

// Restart policy. The figures are those of the design: a plugin that dies once is back at once, one that
// keeps dying neither burns the host nor hides; facts of other supervisors (5 s to 2 min without jitter)
// are slower than VMs' users would like.
const (
	firstDelay       = 250 * time.Millisecond // before the second restart in a row
	longestDelay     = 30 * time.Second       // unless configured
	healthyAfter     = 60 * time.Second       // this long up, and the next restart is immediate again
	quarantineWindow = 2 * time.Minute
	quarantineRetry  = 5 * time.Minute // a host that was overloaded, or a disk that was full, is found better without a person
)

// restartPolicy decides what follows a death. Not safe for concurrent use.
type restartPolicy struct {
	inARow int         // deaths since it was last healthy for long
	deaths []time.Time // within the window
	jitter func() float64
	most   time.Duration // longest delay; 0: longestDelay
	enough int           // deaths within the window that lead to quarantine; 0: none do

	probation bool // in quarantine, or tried once from there: the next death is enough
}

// died records a death at now, after up (0: it never came up), and says how long to wait, or that it is
// enough (then delay is until the one attempt that a quarantined plugin has now and then).
func (p *restartPolicy) died(now time.Time, up time.Duration) (delay time.Duration, quarantine bool) {
	if up >= healthyAfter {
		p.inARow, p.probation = 0, false
	}
	keep := p.deaths[:0]
	for _, t := range p.deaths {
		if now.Sub(t) < quarantineWindow {
			keep = append(keep, t)
		}
	}
	p.deaths = append(keep, now)
	if p.enough > 0 && (p.probation || len(p.deaths) >= p.enough) {
		p.probation = true
		return quarantineRetry, true
	}
	most := p.most
	if most == 0 {
		most = longestDelay
	}
	if p.inARow > 0 {
		delay = longestDelay
		if shift := p.inARow - 1; shift < 7 { // 0.25 s << 7 = 32 s
			delay = firstDelay << shift
		}
		// Between 80 % and 120 %, so that plugins that died together do not start together.
		delay = time.Duration(float64(delay) * (0.8 + 0.4*p.jitter()))
	}
	p.inARow++
	return min(delay, most), false
}

// forgive forgets all deaths.
func (p *restartPolicy) forgive() { p.inARow, p.deaths, p.probation = 0, nil, false }
