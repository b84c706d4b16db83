package engine

import (
	"container/heap"
	"errors"
)

// errGone says that retention has removed an entry between two looks.
var errGone = errors.New("entry is gone")

// merger merges sources by key.
type merger struct {
	asc  bool
	heap []source
}

func (m *merger) Len() int { return len(m.heap) }
func (m *merger) Less(i, k int) bool {
	ti, di := m.heap[i].key()
	tk, dk := m.heap[k].key()
	if ti != tk {
		return ti < tk == m.asc
	}
	if m.asc {
		return string(di) < string(dk)
	}
	return string(di) > string(dk)
}
func (m *merger) Swap(i, k int) { m.heap[i], m.heap[k] = m.heap[k], m.heap[i] }
func (m *merger) Push(x any)    { m.heap = append(m.heap, x.(source)) }
func (m *merger) Pop() any {
	x := m.heap[len(m.heap)-1]
	m.heap = m.heap[:len(m.heap)-1]
	return x
}

// add takes a source that has not been advanced yet.
func (m *merger) add(q *query, s source) {
	if s.next() {
		heap.Push(m, s)
		return
	}
	q.note(s.trouble())
	s.close()
}

// advance moves the first source on.
func (m *merger) advance(q *query) {
	s := m.heap[0]
	if s.next() {
		heap.Fix(m, 0)
		return
	}
	heap.Pop(m)
	q.note(s.trouble())
	s.close()
}

func (m *merger) close(q *query) {
	for _, s := range m.heap {
		q.note(s.trouble())
		s.close()
	}
	m.heap = nil
}
