package engine

import (
	"bytes"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// matcher holds what a query asks of an entry beside level, time and (where the index tells) objects.
type matcher struct {
	components []string
	labels     map[string]string
	contains   string // lower case when fold
	fold       bool

	// nums is set where rows must be checked for objects because the index cannot be read.
	nums []uint32
	all  bool

	msg    []byte
	shapes map[*block.Shape]int8 // what shape has told
}

// maxKnown bounds shapes.
const maxKnown = 4096

// newMatcher returns nil when nothing is asked.
func newMatcher(q *log.Query) *matcher {
	if len(q.Components) == 0 && len(q.Labels) == 0 && q.Contains == "" {
		return nil
	}
	m := &matcher{components: q.Components, labels: q.Labels, contains: q.Contains, fold: q.IgnoreCase}
	if m.fold {
		m.contains = strings.ToLower(m.contains)
	}
	return m
}

// clone is a matcher for another goroutine.
func (m *matcher) clone() *matcher {
	c := *m
	c.msg, c.shapes = nil, nil
	return &c
}

// decision tells for each shape and component of a block whether all (1), none (-1) or some (0) of its entries
// match.
type decision struct{ shapes, comps []int8 }

func (m *matcher) decide(b *block.Reader, d *decision) (some bool, err error) {
	shapes, err := b.Shapes()
	if err != nil {
		return false, err
	}
	d.shapes, d.comps = d.shapes[:0], d.comps[:0]
	for _, s := range shapes {
		x := int8(0)
		if s != nil {
			var known bool
			if x, known = m.shapes[s]; !known {
				if m.shapes == nil || len(m.shapes) >= maxKnown {
					m.shapes = map[*block.Shape]int8{}
				}
				x = m.shape(s)
				m.shapes[s] = x
			}
		}
		some = some || x >= 0
		d.shapes = append(d.shapes, x)
	}
	comps, err := b.Components()
	if err != nil {
		return false, err
	}
	anyComp := false
	for _, c := range comps {
		x := int8(0)
		switch {
		case len(m.components) == 0 || c != nil && slices.Contains(m.components, c.Text()):
			x = 1
		case c != nil:
			x = -1
		}
		anyComp = anyComp || x >= 0
		d.comps = append(d.comps, x)
	}
	if !some || !anyComp {
		return false, nil
	}
	return true, b.Prepare()
}

func (m *matcher) shape(s *block.Shape) int8 {
	sure := true
	for k, v := range m.labels {
		switch s.Label(k, v) {
		case -1:
			return -1
		case 0:
			sure = false
		}
	}
	if m.contains != "" {
		if m.fold {
			return 0
		}
		switch s.Matches(m.contains) {
		case -1:
			return -1
		case 0:
			sure = false
		}
	}
	if sure {
		return 1
	}
	return 0
}

// row says whether a row matches; d is of its block.
func (m *matcher) row(b *block.Reader, i int, d *decision) (bool, error) {
	byShape, byComp := d.shapes[b.ShapeIndex(i)], d.comps[b.ComponentIndex(i)]
	if byShape < 0 || byComp < 0 || len(m.nums) > 0 && !m.objects(b, i) {
		return false, nil
	}
	if byComp == 0 {
		c, err := b.Component(i)
		if err != nil || !slices.Contains(m.components, c) {
			return false, err
		}
	}
	if byShape == 1 {
		return true, nil
	}
	if m.contains != "" {
		var err error
		if m.msg, err = b.AppendMessage(m.msg[:0], i); err != nil || !m.text(m.msg) {
			return false, err
		}
	}
	if len(m.labels) > 0 {
		have, err := b.Labels(i)
		if err != nil {
			return false, err
		}
		for k, v := range m.labels {
			if x, ok := have[k]; !ok || x != v {
				return false, nil
			}
		}
	}
	return true, nil
}

func (m *matcher) objects(b *block.Reader, i int) bool {
	hits := 0
	for _, want := range m.nums {
		for k := range b.NObjects(i) {
			if b.ObjectNum(i, k) == want {
				hits++
				break
			}
		}
	}
	return hits > 0 && (!m.all || hits == len(m.nums))
}

func (m *matcher) text(msg []byte) bool {
	if m.fold {
		msg = bytes.ToLower(msg)
	}
	return bytes.Contains(msg, []byte(m.contains))
}

// view says whether an entry in memory matches.
func (m *matcher) view(v *rec.View) bool {
	if m == nil {
		return true
	}
	if len(m.components) > 0 && !slices.Contains(m.components, string(v.Component)) {
		return false
	}
	if m.contains != "" && !m.text(v.Message) {
		return false
	}
	for k, want := range m.labels {
		if x, ok := v.Label(k); !ok || string(x) != want {
			return false
		}
	}
	return true
}
