package api

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/core/apiv1"
)

// manyEnv names the number of VMs; the promise is about 10,000.
const manyEnv = "MVIRT_TEST_VMS"

// TestManyVMs creates, starts and deletes VMs through the API, eight at a time. Nothing is left of them, and
// memory, descriptors and goroutines are in the end what they were after the first fifth.
func TestManyVMs(t *testing.T) {
	n := 1000
	if testing.Short() {
		n = 200
	}
	if s := os.Getenv(manyEnv); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	c := newCore(t)
	c.furnish()
	before := c.sup.w.String()

	round := func(from, to int) {
		t.Helper()
		names := make(chan string)
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() {
				for name := range names {
					if _, err := c.vms.Create(c.ctx(), &apiv1.CreateVMRequest{Name: name, MemoryBytes: 64 << 20, Start: true,
						Disks: []*apiv1.NewDisk{{Template: "debian-12", SizeBytes: 2 << 20}}, Nics: []*apiv1.NewNIC{{Network: "lan"}}}); err != nil {
						t.Errorf("create %s: %v", name, err)
						continue
					}
					if _, err := c.vms.Delete(c.ctx(), &apiv1.DeleteRequest{Ref: name, Force: true}); err != nil {
						t.Errorf("delete %s: %v", name, err)
					}
				}
			})
		}
		for i := from; i < to; i++ {
			names <- fmt.Sprintf("vm-%d", i)
			if i%500 == 0 {
				c.sup.w.Forget() // the fake's own history, which a real plugin has on disk
			}
		}
		close(names)
		clients.Wait()
	}
	// What is under way in the background ends before it is measured: the last locks and audit entries.
	measure := func() (heap uint64, goroutines, files int) {
		t.Helper()
		c.ok(c.srv.audit.Flush(c.ctx()))
		c.sup.w.Forget()
		list, err := os.ReadDir("/proc/self/fd")
		c.ok(err)
		for range 3 {
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc, runtime.NumGoroutine(), len(list)
	}
	begin := time.Now()
	round(0, n/5)
	heap1, go1, fd1 := measure()
	round(n/5, n)
	heap2, go2, fd2 := measure()
	t.Logf("%d VMs in %.1f s; heap %d to %d KiB, goroutines %d to %d, descriptors %d to %d",
		n, time.Since(begin).Seconds(), heap1>>10, heap2>>10, go1, go2, fd1, fd2)
	if got := c.sup.w.String(); got != before {
		t.Errorf("left behind:\n%s\n-- before:\n%s", got, before)
	}
	if vms, err := c.vms.List(c.ctx(), &apiv1.ListVMsRequest{}); err != nil || len(vms.Vms) != 0 {
		t.Errorf("listed: %v %v", vms, err)
	}
	for _, o := range c.srv.engine.List(false) {
		t.Errorf("operation %s has not ended", o.Title)
	}
	// A leak of some bytes a VM: 4 MiB is 400 bytes for each of 10,000, and far above what the collector leaves.
	if heap2 > heap1+4<<20 {
		t.Errorf("the heap grew from %d to %d KiB", heap1>>10, heap2>>10)
	}
	if go2 > go1+8 || fd2 > fd1+4 {
		t.Errorf("goroutines %d to %d, descriptors %d to %d", go1, go2, fd1, fd2)
	}
}
