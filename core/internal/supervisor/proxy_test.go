package supervisor

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// callAll calls each method of v with zero arguments and a context, and hands on its name and error, and
// whether it came as far as the plugin's client (which in these tests is nil, so that panics).
func callAll(t *testing.T, v any, each func(name string, err error, reached bool)) {
	t.Helper()
	rv := reflect.ValueOf(v)
	for i := range rv.NumMethod() {
		name := rv.Type().Method(i).Name
		m := rv.Method(i)
		args := make([]reflect.Value, m.Type().NumIn())
		for j := range args {
			args[j] = reflect.Zero(m.Type().In(j))
			if j == 0 {
				args[j] = reflect.ValueOf(context.Background())
			}
		}
		var err error
		reached := func() (panicked bool) {
			defer func() { panicked = recover() != nil }()
			out := m.Call(args)
			err, _ = out[len(out)-1].Interface().(error)
			return false
		}()
		each(name, err, reached)
	}
}

// Each method of each proxy says in its errors which call it was: a name that was copied wrong shows.
func TestProxiesNameTheirCalls(t *testing.T) {
	s := New(Options{Notice: func(Notice) {}, Health: newTracker()})
	n := 0
	for kind, v := range map[string]any{"storage": s.Storage(), "net": s.Net(), "vmm": s.VMM(), "log": s.Log()} {
		callAll(t, v, func(name string, err error, _ bool) {
			if name == "Shutdown" {
				return
			}
			n++
			var e *errs.Error
			if !errors.As(err, &e) || e.Op != kind+"."+name || e.Reason != "PLUGIN_NOT_CONFIGURED" {
				t.Errorf("%s.%s: %v", kind, name, err)
			}
		})
	}
	if n < 70 {
		t.Errorf("only %d methods", n)
	}
}

// nilInstance is an instance without features whose client is a nil pointer of the right kind.
type nilInstance struct {
	fakeInstance
	kind service.Kind
	base service.Base
}

func (i *nilInstance) Info() service.Info    { return service.Info{Kind: i.kind, Name: "x", Version: "1"} }
func (i *nilInstance) Service() service.Base { return i.base }

type (
	nilStorage struct{ Storage }
	nilNet     struct{ Net }
	nilVMM     struct{ VMM }
	nilLog     struct{ Log }
)

// Exactly the methods of optional features are refused when the plugin has none; all others reach it.
func TestProxiesKnowWhatIsOptional(t *testing.T) {
	mandatory := map[service.Kind]reflect.Type{service.KindStorage: reflect.TypeFor[storage.Service](), service.KindNet: reflect.TypeFor[net.Service](),
		service.KindVMM: reflect.TypeFor[vmm.Service](), service.KindLog: reflect.TypeFor[interface {
			service.Base
			Append()
			Query()
			Stats()
		}]()}
	for kind, base := range map[service.Kind]service.Base{service.KindStorage: nilStorage{}, service.KindNet: nilNet{}, service.KindVMM: nilVMM{}, service.KindLog: nilLog{}} {
		synctest.Test(t, func(t *testing.T) {
			inst := &nilInstance{fakeInstance: fakeInstance{exited: make(chan struct{}), f: &fakePlugins{}}, kind: kind, base: base}
			u := newUnit(Unit{Kind: kind}, &Options{CallWait: time.Second, CallTimeout: time.Second})
			u.inst, u.info = inst, inst.Info()
			u.setLocked(StateUp)
			s := &Supervisor{units: map[service.Kind]*unit{kind: u}}
			v := map[service.Kind]any{service.KindStorage: s.Storage(), service.KindNet: s.Net(), service.KindVMM: s.VMM(), service.KindLog: s.Log()}[kind]
			callAll(t, v, func(name string, err error, reached bool) {
				_, must := mandatory[kind].MethodByName(name)
				switch {
				case name == "Shutdown":
				case must && !reached:
					t.Errorf("%s.%s does not reach the plugin: %v", kind, name, err)
				case !must && (reached || errs.KindOf(err) != errs.Unsupported):
					t.Errorf("%s.%s of a plugin without features: reached %v, %v", kind, name, reached, err)
				}
			})
		})
	}
}

// What cannot be repeated is not, and what carries descriptors only without them.
func TestProxiesDoNotRepeatWhatIsNotHarmless(t *testing.T) {
	for _, c := range []struct {
		name string
		call func(v VMM) error
		want int
	}{
		{"Get", func(v VMM) error { _, err := v.Get(bg, vmm.Ref{}); return err }, 2},
		{"Create", func(v VMM) error { _, err := v.Create(bg, vmm.CreateRequest{}); return err }, 2},
		{"Create with a kernel", func(v VMM) error { _, err := v.Create(bg, vmm.CreateRequest{Kernel: devNull(t)}); return err }, 1},
		{"Reboot", func(v VMM) error { _, err := v.Reboot(bg, vmm.RebootRequest{}); return err }, 1},
		{"Console", func(v VMM) error { return v.Console(bg, vmm.ConsoleRequest{}, vmm.ConsoleIO{}) }, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			calls := 0
			s := New(Options{Health: newTracker(), CallWait: time.Minute, CallTimeout: time.Minute, Notice: func(Notice) {},
				Units: []Unit{{Kind: service.KindVMM, HealthInterval: time.Hour, HealthDeadline: time.Second, HealthMisses: 3, StartTimeout: time.Second, StopTimeout: time.Second,
					Launch: func(context.Context) (Instance, error) {
						i := &nilInstance{fakeInstance: fakeInstance{exited: make(chan struct{}), f: &fakePlugins{}}, kind: service.KindVMM}
						i.base = dyingVMM{i: i, calls: &calls}
						return i, nil
					}}}})
			s.Start()
			defer s.Stop(bg)
			_ = s.Ready(bg)
			if err := c.call(s.VMM()); errs.ReasonOf(err) != "PLUGIN_DIED" {
				t.Errorf("%s: %v", c.name, err)
			}
			if calls != c.want {
				t.Errorf("%s: %d calls, want %d", c.name, calls, c.want)
			}
		})
	}
}

// dyingVMM dies of each call.
type dyingVMM struct {
	VMM
	i     *nilInstance
	calls *int
}

func (d dyingVMM) die() error { *d.calls++; d.i.die("killed"); return errGone }

func (d dyingVMM) Health(context.Context) (service.Health, error) { return service.Health{}, nil }
func (d dyingVMM) Get(context.Context, vmm.Ref) (vmm.VM, error)   { return vmm.VM{}, d.die() }
func (d dyingVMM) Create(context.Context, vmm.CreateRequest) (vmm.VM, error) {
	return vmm.VM{}, d.die()
}
func (d dyingVMM) Reboot(context.Context, vmm.RebootRequest) (vmm.VM, error) {
	return vmm.VM{}, d.die()
}
func (d dyingVMM) Console(context.Context, vmm.ConsoleRequest, vmm.ConsoleIO) error { return d.die() }
