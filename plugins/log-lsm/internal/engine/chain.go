package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/sdk/log"
)

const (
	auditLevel = byte(log.LevelAudit)
	hashLen    = block.HashLen
)

// chainState is the end of the audit chain. The chain runs over the audit entries in the order of their
// arrival:
//
//	hash(0) = 32 zero bytes
//	hash(n) = SHA-256(hash(n-1) ‖ entry n in its canonical encoding)
type chainState struct {
	n    uint64 // audit entries so far, which is the arrival number of the next
	hash [hashLen]byte
}

func (c *chainState) add(rec []byte) {
	h := sha256.New()
	h.Write(c.hash[:])
	h.Write(rec)
	h.Sum(c.hash[:0])
	c.n++
}

func (c *chainState) encode() []byte {
	return append(binary.BigEndian.AppendUint64(nil, c.n), c.hash[:]...)
}

func decodeChain(v []byte) (chainState, error) {
	var c chainState
	if v == nil {
		return c, nil
	}
	if len(v) != 8+hashLen {
		return c, errors.New("the end of the audit chain is malformed")
	}
	c.n = binary.BigEndian.Uint64(v)
	copy(c.hash[:], v[8:])
	return c, nil
}

func (c *chainState) load(s *Store) error {
	v, err := s.misc(miscChain)
	if err != nil {
		return err
	}
	if *c, err = decodeChain(v); err != nil {
		s.conds.set(condCorrupt, auditLevel, fmt.Sprint(err))
	}
	return nil
}
