package supervisor

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/sdk/service"
)

func devNull(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

const sampleStatus = `Name:	mvirt-net
Uid:	1000	1001	1001	1001
Gid:	0	7	7	7
Groups:	107 24 
VmRSS:	   15900 kB
CapInh:	0000000000000000
CapPrm:	00000000002030e1
CapEff:	00000000002030e1
CapBnd:	8000000000000001
NoNewPrivs:	1
`

func TestParseStatus(t *testing.T) {
	got, err := parseStatus(sampleStatus)
	want := Privileges{UID: 1001, GID: 7, Groups: []uint32{24, 107}, NoNewPrivs: true, resident: 15900 << 10,
		Capabilities: []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN"},
		Bounding:     []string{"CAP_CHOWN", "CAP_63"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := parseStatus("Uid:\t1\t99999999999\t1\t1\n"); err == nil {
		t.Error("a uid that does not fit is accepted")
	}
	own, err := ReadPrivileges(os.Getpid())
	if err != nil || int(own.UID) != os.Geteuid() || own.resident == 0 {
		t.Errorf("own: %+v, %v", own, err)
	}
	if _, err := ReadPrivileges(1 << 30); err == nil {
		t.Error("a process that is not there")
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add(sampleStatus)
	f.Add("Uid:\nGid: x\nGroups:\n")
	f.Add("Uid:\t1\n")
	f.Fuzz(func(_ *testing.T, s string) { _, _ = parseStatus(s) })
}

func TestDiffers(t *testing.T) {
	want := Privileges{UID: 1, GID: 2, Groups: []uint32{3}, Capabilities: []string{"CAP_KILL"}, Bounding: []string{"CAP_KILL"}, NoNewPrivs: true}
	if d := want.differs(want); d != "" {
		t.Error(d)
	}
	for name, change := range map[string]func(*Privileges){
		"user 0 instead of 1":                  func(p *Privileges) { p.UID = 0 },
		"group 0 instead of 2":                 func(p *Privileges) { p.GID = 0 },
		"groups [3 4]":                         func(p *Privileges) { p.Groups = []uint32{3, 4} },
		"capabilities [] instead of":           func(p *Privileges) { p.Capabilities = nil },
		"bounding set [CAP_KILL CAP_SYS_BOOT]": func(p *Privileges) { p.Bounding = []string{"CAP_KILL", "CAP_SYS_BOOT"} },
		"no_new_privs false":                   func(p *Privileges) { p.NoNewPrivs = false },
	} {
		got := want
		change(&got)
		if d := want.differs(got); !strings.Contains(d, name) {
			t.Errorf("%q is not said in %q", name, d)
		}
	}
}

func TestMissing(t *testing.T) {
	n := service.Needs{Root: true, Capabilities: []string{"CAP_KILL", "CAP_CHOWN"}, Devices: []string{"/dev/null", "/dev/none"}, Programs: []string{"sh", "no-such-program"}}
	got := missing(n, &Privileges{UID: 5, Capabilities: []string{"CAP_KILL"}})
	if want := []string{"user root", "CAP_CHOWN", "device /dev/none", "program no-such-program"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}
