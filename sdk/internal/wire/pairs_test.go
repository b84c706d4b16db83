package wire

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/mvirt/mvirt/sdk/fdpass"
)

// pair is a Go struct and its message, with a trip to the message and back.
type pair struct {
	name   string
	typ    reflect.Type
	encode func(e *Enc, v reflect.Value) proto.Message
	decode func(d *Dec, wire []byte) (any, error)
}

func pairOf[T, PB any](name string, to func(*Enc, *T) *PB, from func(*Dec, *PB) T) pair {
	return pair{name, reflect.TypeFor[T](),
		func(e *Enc, v reflect.Value) proto.Message {
			return any(to(e, v.Addr().Interface().(*T))).(proto.Message)
		},
		func(d *Dec, wire []byte) (any, error) {
			m := new(PB)
			err := proto.Unmarshal(wire, any(m).(proto.Message))
			return from(d, m), err
		}}
}

// enum is a Go enumeration and its proto.
type enum struct {
	name   string
	desc   protoreflect.EnumDescriptor
	consts map[string]int32
}

// filler sets every field of a struct to a value of its own.
type filler struct {
	t *testing.T
	n int
}

func (f *filler) fill(v reflect.Value) {
	f.n++
	switch x := v.Addr().Interface().(type) {
	case *time.Time:
		*x = time.Unix(1_700_000_000+int64(f.n), int64(f.n)).UTC()
		return
	case *time.Duration:
		*x = time.Duration(f.n)*time.Second + time.Duration(f.n)
		return
	case *netip.Addr:
		*x = netip.AddrFrom4([4]byte{10, 0, byte(f.n >> 8), byte(f.n)})
		if f.n%2 == 0 {
			*x = netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", f.n))
		}
		return
	case *netip.Prefix:
		*x = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(f.n >> 8), byte(f.n), 0}), 24)
		return
	case **os.File:
		file, err := os.Create(filepath.Join(f.t.TempDir(), fmt.Sprint("file", f.n)))
		if err != nil {
			f.t.Fatal(err)
		}
		f.t.Cleanup(func() { file.Close() })
		*x = file
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			f.fill(v.Field(i))
		}
	case reflect.String:
		v.SetString(fmt.Sprintf("string %d é", f.n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(f.n))
	case reflect.Float64:
		v.SetFloat(float64(f.n) + 0.5)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		f.fill(v.Index(0))
		f.fill(v.Index(1))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 2 {
			k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			f.fill(k)
			f.fill(e)
			v.SetMapIndex(k, e)
		}
	default:
		f.t.Fatalf("the test cannot fill a %s", v.Type())
	}
}

func exchange() (*Exchange, *fdpass.Table) {
	table := fdpass.NewTable()
	uid := uint32(os.Getuid())
	return &Exchange{
		Send:    func(_ context.Context, files []*os.File) (string, error) { return table.Put(uid, files...) },
		Receive: func(_ context.Context, token string) ([]*os.File, error) { return table.Take(uid, token) },
	}, table
}

// inode replaces open files by what they are, so that two duplicates are equal.
func inode(t *testing.T, v reflect.Value) {
	switch x := v.Addr().Interface().(type) {
	case *time.Time, *netip.Addr, *netip.Prefix:
		return
	case **os.File:
		if *x == nil {
			return
		}
		fi, err := (*x).Stat()
		if err != nil {
			t.Fatal(err)
		}
		*x = os.NewFile(1<<30, fmt.Sprint("inode ", fi.Sys().(*syscall.Stat_t).Ino)) // a name only, never an open file
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			inode(t, v.Field(i))
		}
	case reflect.Slice:
		for i := range v.Len() {
			inode(t, v.Index(i))
		}
	}
}

func text(v any) string { return fmt.Sprintf("%+v", names(reflect.ValueOf(v))) }

// names makes files printable by name.
func names(v reflect.Value) any {
	if v.Type() == reflect.TypeFor[*os.File]() {
		if v.IsNil() {
			return nil
		}
		return v.Interface().(*os.File).Name()
	}
	switch v.Kind() {
	case reflect.Struct:
		if v.Type().PkgPath() == "time" || v.Type().PkgPath() == "net/netip" {
			return v.Interface()
		}
		var out []any
		for i := range v.NumField() {
			out = append(out, v.Type().Field(i).Name, names(v.Field(i)))
		}
		return out
	case reflect.Slice:
		out := []any{}
		for i := range v.Len() {
			out = append(out, names(v.Index(i)))
		}
		return out
	}
	return v.Interface()
}

// TestRoundTrip fills every field of every struct of every contract, sends it through bytes and compares. It
// also finds a field that only the proto has, as nothing sets it.
func TestRoundTrip(t *testing.T) {
	for _, p := range pairs {
		t.Run(p.name, func(t *testing.T) {
			x, table := exchange()
			defer table.Close()
			in := reflect.New(p.typ).Elem()
			(&filler{t: t}).fill(in)
			e := &Enc{ctx: t.Context(), x: x}
			m := p.encode(e, in)
			if e.err != nil {
				t.Fatal(e.err)
			}
			fields := m.ProtoReflect().Descriptor().Fields()
			for i := range fields.Len() {
				if !m.ProtoReflect().Has(fields.Get(i)) {
					t.Errorf("%s stands in the proto, and nothing in Go sets it", fields.Get(i).FullName())
				}
			}
			if fields.Len() != p.typ.NumField() {
				t.Errorf("%d fields in the proto, %d in Go", fields.Len(), p.typ.NumField())
			}
			wire, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			d := &Dec{ctx: t.Context(), x: x}
			got, err := p.decode(d, wire)
			if err != nil || d.err != nil {
				t.Fatal(err, d.err)
			}
			defer closeFiles(d.received)
			out := reflect.New(p.typ).Elem()
			out.Set(reflect.ValueOf(got))
			want := reflect.New(p.typ).Elem()
			want.Set(in)
			inode(t, out)
			inode(t, want)
			if a, b := text(want.Interface()), text(out.Interface()); a != b {
				t.Errorf("sent     %s\nreceived %s", a, b)
			}
		})
	}
}

// TestZero holds that nothing stays nothing, and that a missing message is a zero value.
func TestZero(t *testing.T) {
	for _, p := range pairs {
		in := reflect.New(p.typ).Elem()
		wire, err := proto.Marshal(p.encode(&Enc{ctx: t.Context()}, in))
		if err != nil {
			t.Fatal(err)
		}
		for _, wire := range [][]byte{wire, nil} {
			got, err := p.decode(&Dec{ctx: t.Context()}, wire)
			if err != nil {
				t.Fatal(p.name, err)
			}
			if a, b := text(in.Interface()), text(got); a != b {
				t.Errorf("%s: zero became %s", p.name, b)
			}
		}
	}
}

// TestHostileText holds that a string that is no UTF-8 crosses, made valid, instead of failing in gRPC.
func TestHostileText(t *testing.T) {
	for _, p := range pairs {
		in := reflect.New(p.typ).Elem()
		spoil(in)
		e := &Enc{ctx: t.Context()}
		if _, err := proto.Marshal(p.encode(e, in)); err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
	}
}

func spoil(v reflect.Value) {
	switch v.Addr().Interface().(type) {
	case *time.Time, *netip.Addr, *netip.Prefix, **os.File:
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString("a\xff\x00\xc3")
	case reflect.Struct:
		for i := range v.NumField() {
			spoil(v.Field(i))
		}
	case reflect.Slice:
		if v.Type().Elem() != reflect.TypeFor[*os.File]() {
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
			spoil(v.Index(0))
		}
	case reflect.Map:
		if v.Type().Elem().Kind() == reflect.String {
			v.Set(reflect.ValueOf(map[string]string{"k\xff": "v\xff"}))
		}
	}
}

// TestEnums holds that both sides have the same values under like names.
func TestEnums(t *testing.T) {
	plain := func(s string) string { return strings.ToLower(strings.ReplaceAll(s, "_", "")) }
	for _, e := range enums {
		left := map[int32]string{}
		for i := range e.desc.Values().Len() {
			v := e.desc.Values().Get(i)
			if v.Number() != 0 {
				left[int32(v.Number())] = string(v.Name())
			}
		}
		short := e.name[strings.Index(e.name, ".")+1:]
		for name, n := range e.consts {
			got, ok := left[n]
			if !ok {
				t.Errorf("%s: %s = %d is not in the proto", e.name, name, n)
				continue
			}
			if !strings.HasSuffix(plain(got), plain(strings.TrimPrefix(name, short))) && !strings.HasSuffix(plain(name), plain(strings.TrimPrefix(got, strings.ToUpper(short)+"_"))) {
				t.Errorf("%s: %d is %s in Go and %s in the proto", e.name, n, name, got)
			}
			delete(left, n)
		}
		for n, name := range left {
			t.Errorf("%s: %s = %d is not in Go", e.name, name, n)
		}
	}
}

// TestMethods holds that each contract's Go methods and RPCs are the same, but for what is said here.
func TestMethods(t *testing.T) {
	extra := map[string][]string{"log": {"AppendStream"}}
	for kind, list := range methods {
		var rpcs []string
		protoregistry.GlobalFiles.RangeFilesByPackage(protoreflect.FullName("mvirt."+kind+".v1"), func(f protoreflect.FileDescriptor) bool {
			for i := range f.Services().Len() {
				for j := range f.Services().Get(i).Methods().Len() {
					rpcs = append(rpcs, string(f.Services().Get(i).Methods().Get(j).Name()))
				}
			}
			return true
		})
		want := append(slices.Clone(list), append(extra[kind], "Backup", "Restore")...)
		slices.Sort(want)
		slices.Sort(rpcs)
		if len(rpcs) == 0 || !slices.Equal(want, rpcs) {
			t.Errorf("%s\nGo    %v\nproto %v", kind, want, rpcs)
		}
	}
}

// TestHostileValues holds that values which no Go side sends are refused, with the field, not believed.
func TestHostileValues(t *testing.T) {
	d := &Dec{}
	addrFromPB(d, "ipv4", "10.0.0.300")
	if d.err == nil || !strings.Contains(d.err.Error(), "ipv4") {
		t.Errorf("address: %v", d.err)
	}
	d = &Dec{}
	prefixFromPB(d, "subnet4", "10.0.0.0/33")
	if d.err == nil {
		t.Error("prefix taken")
	}
	d = &Dec{ctx: t.Context()}
	if d.file("kernel_token", "x"); d.err == nil {
		t.Error("token taken without an exchange")
	}
	x, table := exchange()
	defer table.Close()
	d = &Dec{ctx: t.Context(), x: x}
	if d.file("kernel_token", "0123"); d.err == nil || !strings.Contains(fmt.Sprintf("%+v", d.err), "token") {
		t.Errorf("unknown token: %v", d.err)
	}
}

// TestFeatures holds that each feature number belongs to a kind.
func TestFeatures(t *testing.T) {
	for _, e := range enums {
		if e.name != "service.Feature" {
			continue
		}
		for name, n := range e.consts {
			kind := map[int32]string{1: "Storage", 2: "Net", 3: "VMM", 4: "Log"}[n/100]
			if kind == "" || !strings.HasPrefix(name, "Feature"+kind) {
				t.Errorf("%s = %d", name, n)
			}
		}
	}
}
