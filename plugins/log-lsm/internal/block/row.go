package block

import (
	"encoding/binary"
	"time"

	"github.com/mvirt/mvirt/sdk/log"
)

// AppendMessage appends a row's message.
func (r *Reader) AppendMessage(dst []byte, i int) ([]byte, error) {
	if err := r.prepare(); err != nil {
		return dst, err
	}
	k := r.index.At(i)
	s := r.shapes[k]
	if s != nil {
		return r.render(dst, s.message, i, r.colAt[k], int(r.rank[i]))
	}
	lit, err := r.stringAt(&r.cols[r.colAt[k]], int(r.rank[i]))
	if err != nil {
		return dst, err
	}
	_, rest, ok := takeBytes(lit)
	msg, _, ok2 := takeBytes(rest)
	if !ok || !ok2 {
		return dst, ErrBad
	}
	return append(dst, msg...), nil
}

// Component is a row's component.
func (r *Reader) Component(i int) (string, error) {
	if err := r.prepare(); err != nil {
		return "", err
	}
	if c := r.comps[r.comp.At(i)]; c != nil {
		return c.Text(), nil
	}
	k := r.index.At(i)
	lit, err := r.stringAt(&r.cols[r.colAt[k]], int(r.rank[i]))
	if err != nil {
		return "", err
	}
	c, _, ok := takeBytes(lit)
	if !ok {
		return "", ErrBad
	}
	return string(c), nil
}

// Labels makes the map of a row's labels, nil when there are none.
func (r *Reader) Labels(i int) (map[string]string, error) {
	s, err := r.Shape(i)
	if err != nil {
		return nil, err
	}
	k := r.index.At(i)
	if s != nil {
		if len(s.labels) == 0 {
			return nil, nil
		}
		m := make(map[string]string, len(s.labels))
		for l := range s.labels {
			p := s.labels[l].value
			if v, ok := plain(p); ok {
				m[s.labels[l].key] = v
				continue
			}
			if r.scratch, err = r.render(r.scratch[:0], p, i, r.colAt[k], int(r.rank[i])); err != nil {
				return nil, err
			}
			m[s.labels[l].key] = string(r.scratch)
		}
		return m, nil
	}
	lit, err := r.stringAt(&r.cols[r.colAt[k]], int(r.rank[i]))
	if err != nil {
		return nil, err
	}
	_, lit, ok := takeBytes(lit)
	if ok {
		_, lit, ok = takeBytes(lit)
	}
	count, w := binary.Uvarint(lit)
	if !ok || w <= 0 || count > log.MaxLabels {
		return nil, ErrBad
	}
	if count == 0 {
		return nil, nil
	}
	lit = lit[w:]
	m := make(map[string]string, count)
	for range count {
		var key, val []byte
		key, lit, ok = takeBytes(lit)
		if ok {
			val, lit, ok = takeBytes(lit)
		}
		if !ok {
			return nil, ErrBad
		}
		m[string(key)] = string(val)
	}
	return m, nil
}

// Entry makes the whole entry of a row, for the level of its segment.
func (r *Reader) Entry(i int, level log.Level) (log.Entry, error) {
	e := log.Entry{Time: time.Unix(0, r.Time(i)).UTC(), Level: level}
	var err error
	if r.scratch, err = r.AppendID(r.scratch[:0], i); err != nil {
		return e, err
	}
	e.ID = string(r.scratch)
	if n := r.NObjects(i); n > 0 {
		e.Objects = make([]string, n)
		for k := range n {
			if e.Objects[k], err = r.names.Object(r.ObjectNum(i, k)); err != nil {
				return e, err
			}
		}
	}
	if r.scratch, err = r.AppendMessage(r.scratch[:0], i); err != nil {
		return e, err
	}
	e.Message = string(r.scratch)
	if e.Component, err = r.Component(i); err != nil {
		return e, err
	}
	e.Labels, err = r.Labels(i)
	return e, err
}
