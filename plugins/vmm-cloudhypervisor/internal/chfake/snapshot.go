package chfake

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// snapshot writes what the real one does: the configuration, the state of the devices by their ids, memory.
func (f *fake) snapshot(dir string) (int, string) {
	if ents, err := os.ReadDir(dir); err != nil || len(ents) > 0 {
		f.violation("vm.snapshot", fmt.Errorf("%s is no empty directory: %v", dir, err))
	}
	for _, n := range f.list("net") {
		m, _ := n.(map[string]any)
		if k := f.nets[text(n, "id")]; k > 0 {
			none := make([]int, k)
			for i := range none {
				none[i] = -1
			}
			m["fds"] = none
		}
	}
	devices := map[string]any{}
	for _, key := range []string{"disks", "net"} {
		for _, d := range f.list(key) {
			devices[text(d, "id")] = map[string]any{"snapshot_data": map[string]string{"state": `{"id":"` + text(d, "id") + `"}`}}
		}
	}
	config, err := json.Marshal(f.config)
	state, serr := json.Marshal(map[string]any{"snapshots": map[string]any{"device-manager": map[string]any{"snapshots": devices}}})
	if err := errors.Join(err, serr, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600),
		os.WriteFile(filepath.Join(dir, "state.json"), state, 0o600),
		os.WriteFile(filepath.Join(dir, "memory-ranges"), []byte("what the guest knows"), 0o600)); err != nil {
		return 500, `["` + err.Error() + `"]`
	}
	f.event("vm", "snapshotted")
	return 204, ""
}

// restore reads it again, and holds devices, state and descriptors against each other.
func (f *fake) restore(body any, files int) (int, string) {
	no := func(format string, a ...any) (int, string) {
		b, _ := json.Marshal([]string{"Cannot restore VM", fmt.Sprintf(format, a...)})
		return 500, string(b)
	}
	dir := strings.TrimPrefix(text(body, "source_url"), "file://")
	config, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		return no("%v", err)
	}
	state, serr := os.ReadFile(filepath.Join(dir, "state.json"))
	memory, merr := os.ReadFile(filepath.Join(dir, "memory-ranges"))
	var devices map[string]any
	if err := errors.Join(serr, merr, json.Unmarshal(config, &f.config), json.Unmarshal(state, &devices)); err != nil {
		return no("%v", err)
	}
	for _, key := range []string{"disks", "net"} {
		for _, d := range f.list(key) {
			id := text(d, "id")
			inner := text(get(devices, "snapshots", "device-manager", "snapshots", id, "snapshot_data"), "state")
			if inner != `{"id":"`+id+`"}` {
				return no("the state has no device %s but %q", id, inner)
			}
			if p := text(d, "path"); key == "disks" {
				if _, err := os.Stat(p); err != nil {
					return no("%v", err)
				}
			}
		}
	}
	want := map[string]int{}
	for _, n := range f.list("net") {
		if fds, _ := get(n, "fds").([]any); len(fds) > 0 {
			want[text(n, "id")] = len(fds)
		}
	}
	given, total := get(body, "net_fds"), 0
	list, _ := given.([]any)
	for _, g := range list {
		n, _ := get(g, "num_fds").(float64)
		if want[text(g, "id")] != int(n) {
			return no("%v descriptors for NIC %s", n, text(g, "id"))
		}
		f.nets[text(g, "id")] = int(n)
		total += int(n)
		delete(want, text(g, "id"))
	}
	if len(want) > 0 || total != files {
		return no("descriptors are missing for %v; %d came, %d were told", want, files, total)
	}
	if f.spec != nil {
		if err := f.spec.CheckConfig(f.config); err != nil {
			f.violation("config.json", err)
		}
	}
	f.event("vm", "restoring")
	if err := f.listen(); err != nil {
		return no("%v", err)
	}
	f.state = "Paused"
	f.event("vm", "restored")
	f.print("fake guest goes on, and knows " + string(memory) + "\n")
	return 204, ""
}
