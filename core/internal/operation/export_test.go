package operation

// Store is a journal whose writes tests may watch and stop.
type Store interface{ store }

// OpenWith opens an engine whose journal's writes ask gate before and after.
func OpenWith(opt Options, gate func(write string, after bool) error) (*Engine, error) {
	j, err := openJournal(opt.Path)
	if err != nil {
		return nil, err
	}
	j.db.NoSync = true // the power goes in the test's own way, and not at the disk
	return newEngine(opt, gated{j, gate}), nil
}

type gated struct {
	*journal
	gate func(write string, after bool) error
}

func (g gated) put(ops ...*Operation) error {
	if err := g.gate("journal.put", false); err != nil {
		return err
	}
	if err := g.journal.put(ops...); err != nil {
		return err
	}
	return g.gate("journal.put", true)
}

func (g gated) remove(ids ...string) error {
	if err := g.gate("journal.remove", false); err != nil {
		return err
	}
	return g.journal.remove(ids...)
}
