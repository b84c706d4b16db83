package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
	"github.com/mvirt/mvirt/sdk/ident"
)

// ack is a change that was acknowledged.
type ack struct {
	op     string // as the audit trail calls it
	object string
	tries  int // requests that were sent for it; each may have its own audit entry
}

// workload changes things through the API and keeps in mind what must be there.
type workload struct {
	c    *chaos
	conn *grpc.ClientConn
	stop context.CancelFunc
	done sync.WaitGroup

	runners []*runner // of their goroutines until done

	mu    sync.Mutex
	acks  []ack
	wrong []string
	sent  int
	again int // requests that were repeated
	slow  time.Duration
}

func newWorkload(c *chaos) *workload { return &workload{c: c} }

func (w *workload) start(ctx context.Context) error {
	var err error
	if w.conn, err = w.c.sys.sys.Dial(); err != nil {
		return err
	}
	ctx, w.stop = context.WithCancel(ctx)
	image := filepath.Join(w.c.place().Dir, "image.raw")
	if err := os.WriteFile(image, randomBytes(w.c.seed, 4<<20), 0o644); err != nil {
		return err
	}
	for i := range 3 {
		r := &runner{w: w, n: i, rand: rand.New(rand.NewPCG(w.c.seed, uint64(10+i))), image: image}
		w.runners = append(w.runners, r)
		w.done.Go(func() { r.run(ctx) })
	}
	return nil
}

// finish lets each runner end what it is at.
func (w *workload) finish() {
	w.stop()
	w.done.Wait()
}

func randomBytes(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 99))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func (w *workload) bad(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrong = append(w.wrong, fmt.Sprintf(format, args...))
}

// transient tells whether a request may be sent again: nothing was decided about it, or the other side was
// just not there. What is in the middle of another operation passes too.
func transient(err error) bool {
	switch errs.KindOf(err) {
	case errs.Unavailable, errs.Deadline, errs.Canceled, errs.Conflict, errs.Unknown:
		return true
	}
	return false
}

// settleMost is how long one change may take with all repetitions: several faults in a row, of which one may
// freeze what it needs.
const settleMost = 5 * time.Minute

// change sends a request until it is acknowledged. gone tells for deletes that "there is no such object"
// means done, from the second try on: the first may have been.
func (w *workload) change(op, object string, gone bool, send func(ctx context.Context) error) bool {
	begin := time.Now()
	for try := 1; ; try++ {
		ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
		err := grpcerr.FromStatus(send(ctx))
		cancel()
		w.mu.Lock()
		w.sent++
		if try > 1 {
			w.again++
		}
		w.mu.Unlock()
		if err != nil && gone && try > 1 && errs.KindOf(err) == errs.NotFound {
			err = nil
		}
		if err == nil {
			w.mu.Lock()
			w.acks = append(w.acks, ack{op, object, try})
			w.slow = max(w.slow, time.Since(begin))
			w.mu.Unlock()
			return true
		}
		if !transient(err) || time.Since(begin) > settleMost {
			w.bad("%s of %s failed for good at try %d after %v: %s: %v", op, object, try, time.Since(begin).Round(time.Millisecond), errs.KindOf(err), err)
			return false
		}
		time.Sleep(20 * time.Millisecond) // a client that is told "unavailable" and asks again
	}
}

// object is something that a runner made and that must be there.
type object struct {
	kind string // volume, snapshot, network, nic, group, vm, template
	id   string
	name string
	size uint64
	on   string // snapshot: volume; nic: network; volume: the guest that it is plugged into
}

// runner makes one change after the other.
type runner struct {
	w     *workload
	n     int
	rand  *rand.Rand
	image string
	count int
	have  []*object
}

func (r *runner) run(ctx context.Context) {
	for ctx.Err() == nil {
		r.step(ctx)
		pause(ctx, time.Duration(r.rand.Int64N(int64(200*time.Millisecond))))
	}
}

func (r *runner) name(kind string) string {
	r.count++
	return fmt.Sprintf("c%d-%s-%d", r.n, kind, r.count)
}

func (r *runner) pick(kind string, ok func(*object) bool) *object {
	var list []*object
	for _, o := range r.have {
		if o.kind == kind && (ok == nil || ok(o)) {
			list = append(list, o)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return list[r.rand.IntN(len(list))]
}

func (r *runner) add(o *object, made bool) {
	if made {
		r.have = append(r.have, o)
	}
}

// labels mark what the workload made.
var labels = map[string]string{"chaos": "1"}

// step makes one change, chosen at random; it keeps at most some forty objects.
func (r *runner) step(ctx context.Context) {
	w, conn := r.w, r.w.conn
	vols, snaps, nets := apiv1.NewVolumesClient(conn), apiv1.NewSnapshotsClient(conn), apiv1.NewNetworksClient(conn)
	nics, groups, vms := apiv1.NewNICsClient(conn), apiv1.NewSecurityGroupsClient(conn), apiv1.NewVMsClient(conn)
	id := ident.New()
	if len(r.have) > 40 {
		r.remove(r.have[r.rand.IntN(len(r.have))])
		return
	}
	switch k := r.rand.IntN(14); k {
	case 0, 1:
		o := &object{kind: "volume", id: id, name: r.name("vol"), size: uint64(1+r.rand.IntN(8)) << 20}
		req := &apiv1.CreateVolumeRequest{Id: o.id, Name: o.name, SizeBytes: o.size, Labels: labels}
		r.add(o, w.change("volume.create", id, false, func(ctx context.Context) error { _, err := vols.Create(ctx, req); return err }))
	case 2:
		if o := r.pick("volume", func(o *object) bool { return o.on == "" }); o != nil {
			size := o.size + uint64(1+r.rand.IntN(4))<<20
			if w.change("volume.resize", o.id, false, func(ctx context.Context) error {
				_, err := vols.Resize(ctx, &apiv1.ResizeVolumeRequest{Ref: o.id, SizeBytes: size})
				return err
			}) {
				o.size = size
			}
		}
	case 3:
		if o := r.pick("volume", nil); o != nil {
			name := r.name("vol")
			if w.change("volume.rename", o.id, false, func(ctx context.Context) error {
				_, err := vols.Rename(ctx, &apiv1.RenameRequest{Ref: o.id, Name: name})
				return err
			}) {
				o.name = name
			}
		}
	case 4:
		if v := r.pick("volume", nil); v != nil {
			o := &object{kind: "snapshot", id: id, name: r.name("snap"), on: v.id}
			r.add(o, w.change("snapshot.create", id, false, func(ctx context.Context) error {
				_, err := snaps.Create(ctx, &apiv1.CreateSnapshotRequest{Id: id, Volume: v.id, Name: o.name, Labels: labels})
				return err
			}))
		}
	case 5:
		o := &object{kind: "network", id: id, name: r.name("net")}
		req := &apiv1.CreateNetworkRequest{Id: id, Name: o.name, Mode: "private", Subnet4: fmt.Sprintf("10.%d.%d.0/24", 100+r.n, r.count%250), Labels: labels}
		r.add(o, w.change("network.create", id, false, func(ctx context.Context) error { _, err := nets.Create(ctx, req); return err }))
	case 6, 7:
		if n := r.pick("network", nil); n != nil {
			o := &object{kind: "nic", id: id, name: r.name("nic"), on: n.id}
			r.add(o, w.change("nic.create", id, false, func(ctx context.Context) error {
				_, err := nics.Create(ctx, &apiv1.CreateNICRequest{Id: id, Name: o.name, Network: n.id, Labels: labels})
				return err
			}))
		}
	case 8:
		o := &object{kind: "group", id: id, name: r.name("sg")}
		r.add(o, w.change("security_group.create", id, false, func(ctx context.Context) error {
			_, err := groups.Create(ctx, &apiv1.CreateSecurityGroupRequest{Id: id, Name: o.name, Labels: labels})
			return err
		}))
	case 9:
		o := &object{kind: "vm", id: id, name: r.name("vm")}
		req := &apiv1.CreateVMRequest{Id: id, Name: o.name, MemoryBytes: 64 << 20, Disks: []*apiv1.NewDisk{{SizeBytes: 4 << 20}}, Nics: []*apiv1.NewNIC{{Network: "lan"}}, Labels: labels}
		r.add(o, w.change("vm.create", id, false, func(ctx context.Context) error { _, err := vms.Create(ctx, req); return err }))
	case 10:
		if r.n == 0 { // one runner plugs, so that slots in the guest are enough
			r.plug(vms)
		}
	case 11:
		if r.n == 1 {
			r.importImage(ctx)
		}
	default:
		if len(r.have) > 6 {
			r.remove(r.have[r.rand.IntN(len(r.have))])
		}
	}
}

// plug plugs a volume into a running guest, or takes it out.
func (r *runner) plug(vms apiv1.VMsClient) {
	if o := r.pick("volume", func(o *object) bool { return o.on != "" }); o != nil {
		r.unplug(vms, o)
		return
	}
	o := r.pick("volume", nil)
	if o == nil || len(r.w.c.vms) == 0 {
		return
	}
	g := r.w.c.vms[r.rand.IntN(len(r.w.c.vms))]
	try := 0
	if r.w.change("vm.attach_volume", o.id, false, func(ctx context.Context) error {
		try++
		_, err := vms.AttachVolume(ctx, &apiv1.AttachVolumeRequest{Ref: g.id, Disk: &apiv1.NewDisk{Name: "extra", Volume: o.id}})
		if err != nil && try > 1 && r.has(ctx, vms, g.id, o.id) {
			return nil // attaching is told by its effect: it takes no id of the caller's
		}
		return err
	}) {
		o.on = g.id
	}
}

func (r *runner) unplug(vms apiv1.VMsClient, o *object) bool {
	ok := r.w.change("vm.detach_volume", o.id, true, func(ctx context.Context) error {
		_, err := vms.DetachVolume(ctx, &apiv1.DetachVolumeRequest{Ref: o.on, Disk: o.id})
		return err
	})
	if ok {
		o.on = ""
	}
	return ok
}

func (r *runner) has(ctx context.Context, vms apiv1.VMsClient, vm, volume string) bool {
	v, err := vms.Get(ctx, &apiv1.RefRequest{Ref: vm})
	if err != nil || v.Operation != "" {
		return false
	}
	for _, d := range v.Disks {
		if d.VolumeId == volume {
			return true
		}
	}
	return false
}

// remove deletes an object and what hangs on it.
func (r *runner) remove(o *object) {
	conn := r.w.conn
	if o.on != "" && o.kind == "volume" && !r.unplug(apiv1.NewVMsClient(conn), o) {
		return
	}
	for i := 0; i < len(r.have); i++ {
		if d := r.have[i]; d.on == o.id && d.kind != "volume" {
			r.remove(d)
			i = -1
			if !r.gone(d) {
				return
			}
		}
	}
	req := &apiv1.DeleteRequest{Ref: o.id}
	del := map[string]func(ctx context.Context) error{
		"volume":   func(ctx context.Context) error { _, err := apiv1.NewVolumesClient(conn).Delete(ctx, req); return err },
		"snapshot": func(ctx context.Context) error { _, err := apiv1.NewSnapshotsClient(conn).Delete(ctx, req); return err },
		"network":  func(ctx context.Context) error { _, err := apiv1.NewNetworksClient(conn).Delete(ctx, req); return err },
		"nic":      func(ctx context.Context) error { _, err := apiv1.NewNICsClient(conn).Delete(ctx, req); return err },
		"group": func(ctx context.Context) error {
			_, err := apiv1.NewSecurityGroupsClient(conn).Delete(ctx, req)
			return err
		},
		"vm":       func(ctx context.Context) error { _, err := apiv1.NewVMsClient(conn).Delete(ctx, req); return err },
		"template": func(ctx context.Context) error { _, err := apiv1.NewTemplatesClient(conn).Delete(ctx, req); return err },
	}[o.kind]
	op := map[string]string{"group": "security_group.delete"}[o.kind]
	if op == "" {
		op = o.kind + ".delete"
	}
	if r.w.change(op, o.id, true, del) {
		for i, h := range r.have {
			if h == o {
				r.have = append(r.have[:i], r.have[i+1:]...)
				break
			}
		}
	}
}

func (r *runner) gone(o *object) bool {
	for _, h := range r.have {
		if h == o {
			return false
		}
	}
	return true
}

// importImage imports a template by the CLI, whose process hands the open file over. An import whose end the
// CLI did not see is waited for; whatever became of it, it must be there whole or not at all.
func (r *runner) importImage(ctx context.Context) {
	name := r.name("tpl")
	bg, cancel := context.WithTimeout(context.Background(), settleMost)
	defer cancel()
	ictx, icancel := context.WithTimeout(bg, 40*time.Second)
	_, err := r.w.c.sys.sys.CLI(ictx, "template", "import", name, r.image)
	icancel()
	tpls := apiv1.NewTemplatesClient(r.w.conn)
	for {
		// Templates last: what is no longer under way is there by then.
		imps, ierr := tpls.ListImports(bg, &apiv1.ListImportsRequest{})
		ops, oerr := apiv1.NewOperationsClient(r.w.conn).List(bg, &apiv1.ListOperationsRequest{})
		list, lerr := tpls.List(bg, &apiv1.ListTemplatesRequest{})
		if bg.Err() != nil {
			r.w.bad("import %s does not settle: %v %v %v, at first %v", name, lerr, ierr, oerr, err)
			return
		}
		if lerr == nil && ierr == nil && oerr == nil && !importing(imps, ops, name) {
			for _, t := range list.Templates {
				if t.Name == name {
					if t.SizeBytes != 4<<20 {
						r.w.bad("template %s has %d bytes", name, t.SizeBytes)
					}
					r.have = append(r.have, &object{kind: "template", id: t.Id, name: name, size: t.SizeBytes})
					return
				}
			}
			if err == nil {
				r.w.bad("lost acknowledged change: template %s was imported and is not there", name)
			}
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func importing(imps *apiv1.ListImportsResponse, ops *apiv1.ListOperationsResponse, name string) bool {
	for _, o := range ops.Operations {
		if o.Type == "template.import" {
			return true
		}
	}
	for _, i := range imps.Imports {
		if i.Name == name && i.State != "done" && i.State != "failed" && i.State != "canceled" {
			return true
		}
	}
	return false
}
