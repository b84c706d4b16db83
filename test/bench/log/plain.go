package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable/block"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	sdkplugin "github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
)

// plain is the store that one writes first: a Pebble key an entry and a key an object, each append one batch,
// synced. It is the baseline, with the tuning that makes it fastest.
type plain struct{ db *pebble.DB }

func plainMain() {
	dir := ""
	sdkplugin.Main(sdkplugin.Program{
		Kind: service.KindLog, Name: "plain-pebble", Version: "1", Short: "baseline of the log benchmark",
		Flags: func(fs *pflag.FlagSet) { fs.StringVar(&dir, "data-dir", "", "directory of the store") },
		Open: func(context.Context, sdkplugin.Env) (service.Base, error) {
			o := &pebble.Options{MemTableSize: 64 << 20, Cache: pebble.NewCache(256 << 20), Logger: silent{}, FormatMajorVersion: pebble.FormatNewest,
				CompactionConcurrencyRange: func() (int, int) { return 1, 2 }}
			for i := range o.Levels {
				o.Levels[i].BlockSize = 32 << 10
				o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
				o.Levels[i].Compression = func() *block.CompressionProfile { return block.ZstdCompression }
			}
			db, err := pebble.Open(dir, o)
			return &plain{db}, err
		},
	})
}

type silent struct{}

func (silent) Infof(string, ...any)      {}
func (silent) Errorf(string, ...any)     {}
func (silent) Fatalf(s string, _ ...any) { panic(s) }

func (p *plain) Health(context.Context) (service.Health, error) { return service.Health{}, nil }
func (p *plain) Shutdown(context.Context) error                 { return p.db.Close() }

func stamp(e *log.Entry) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(e.Time.UnixNano())), e.ID...)
}

func (p *plain) Append(_ context.Context, es []log.Entry) error {
	b := p.db.NewBatch()
	var v []byte
	for i := range es {
		e := &es[i]
		ts := stamp(e)
		v = encode(v[:0], e)
		if err := b.Set(append([]byte{'l'}, ts...), v, nil); err != nil {
			return err
		}
		for _, o := range e.Objects {
			k := append(append(append([]byte{'o'}, o...), 0), ts...)
			if err := b.Set(k, nil, nil); err != nil {
				return err
			}
		}
	}
	return b.Commit(pebble.Sync)
}

// encode is the protobuf of an entry.
func encode(b []byte, e *log.Entry) []byte {
	b = protowire.AppendFixed64(protowire.AppendTag(b, 1, protowire.Fixed64Type), uint64(e.Time.UnixNano()))
	b = protowire.AppendVarint(protowire.AppendTag(b, 3, protowire.VarintType), uint64(e.Level))
	b = protowire.AppendString(protowire.AppendTag(b, 4, protowire.BytesType), e.Component)
	b = protowire.AppendString(protowire.AppendTag(b, 5, protowire.BytesType), e.Message)
	for _, o := range e.Objects {
		b = protowire.AppendString(protowire.AppendTag(b, 6, protowire.BytesType), o)
	}
	return b
}

func decode(b []byte, e *log.Entry) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		switch typ {
		case protowire.Fixed64Type:
			v, n := protowire.ConsumeFixed64(b)
			if n < 0 {
				return protowire.ParseError(n)
			}
			e.Time = time.Unix(0, int64(v)).UTC()
			b = b[n:]
		case protowire.VarintType:
			v, n := protowire.ConsumeVarint(b)
			if n < 0 {
				return protowire.ParseError(n)
			}
			e.Level = log.Level(v)
			b = b[n:]
		default:
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			switch num {
			case 4:
				e.Component = string(v)
			case 5:
				e.Message = string(v)
			case 6:
				e.Objects = append(e.Objects, string(v))
			}
		}
	}
	return nil
}

func (p *plain) Query(_ context.Context, q log.Query, fn func(log.Result) error) error {
	prefix := []byte{'l'}
	if len(q.Objects) > 0 {
		prefix = append(append([]byte{'o'}, q.Objects[0]...), 0)
	}
	end := append(bytes.Clone(prefix[:len(prefix)-1]), prefix[len(prefix)-1]+1)
	it, err := p.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: end})
	if err != nil {
		return err
	}
	step, ok := it.Next, it.First()
	if q.NewestFirst {
		step, ok = it.Prev, it.Last()
	}
	for n := uint32(0); ok && (q.Limit == 0 || n < q.Limit); ok = step() {
		var e log.Entry
		ts := it.Key()[len(prefix):]
		v := it.Value()
		if len(q.Objects) > 0 {
			x, closer, err := p.db.Get(append([]byte{'l'}, ts...))
			if err != nil {
				return errors.Join(err, it.Close())
			}
			err = decode(x, &e)
			closer.Close()
			if err != nil {
				return errors.Join(err, it.Close())
			}
		} else if err := decode(v, &e); err != nil {
			return errors.Join(err, it.Close())
		}
		e.ID = string(ts[8:])
		if q.Contains != "" && !bytes.Contains([]byte(e.Message), []byte(q.Contains)) {
			continue
		}
		n++
		if err := fn(log.Result{Entry: e}); err != nil {
			return errors.Join(err, it.Close())
		}
	}
	return it.Close()
}

func (p *plain) Stats(context.Context) (log.Stats, error) {
	return log.Stats{}, errs.New(errs.Unsupported, "no statistics")
}
