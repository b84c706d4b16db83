package engine

import (
	"encoding/base64"
	"encoding/binary"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Page tokens: base64 of kind, time, id, and for a follower the numbers of its place.
const (
	tokenPosition = 1 // time and id
	tokenOpen     = 2 // and from
	tokenPart     = 3 // and from and upto
)

func token(t int64, id []byte, p *place) string {
	var buf [160]byte
	b := append(buf[:0], tokenPosition)
	b = binary.BigEndian.AppendUint64(b, uint64(t))
	b = append(b, byte(len(id)))
	b = append(b, id...)
	if p != nil {
		b[0] = tokenOpen
		for _, n := range p.from[1:] {
			b = binary.AppendUvarint(b, n)
		}
		if !p.open {
			b[0] = tokenPart
			for _, n := range p.upto[1:] {
				b = binary.AppendUvarint(b, n)
			}
		}
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func (q *query) parseToken(s string) error {
	bad := errs.Field("page_token", "give the page_token of a result of the same query, or none", "not a page token of this store")
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil || len(b) < 10 || b[0] < tokenPosition || b[0] > tokenPart || len(b) < 10+int(b[9]) {
		return bad
	}
	kind := b[0]
	q.after = &position{time: int64(binary.BigEndian.Uint64(b[1:])), id: string(b[10 : 10+int(b[9])])}
	b = b[10+int(b[9]):]
	numbers := func(into *[levels]uint64) bool {
		for l := 1; l < levels; l++ {
			n, k := binary.Uvarint(b)
			if k <= 0 {
				return false
			}
			into[l] = n
			b = b[k:]
		}
		return true
	}
	if kind != tokenPosition {
		q.place = &place{open: kind == tokenOpen}
		if !numbers(&q.place.from) || kind == tokenPart && !numbers(&q.place.upto) {
			return bad
		}
	}
	if len(b) != 0 {
		return bad
	}
	return nil
}
