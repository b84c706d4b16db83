package cloudinit

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kdomanski/iso9660"
	"gopkg.in/yaml.v3"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cloudinit.iso")
	spec := vmm.Spec{Name: "web_1.lan", NICs: []vmm.NIC{{MAC: "52:54:00:AB:00:01"}},
		CloudInit: vmm.CloudInit{UserData: "#!/bin/sh\necho hi\n"}}
	for range 2 { // again over the old one
		if err := Write(path, "the-id", spec); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := iso9660.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := img.Label(); err != nil || strings.TrimSpace(l) != "cidata" {
		t.Errorf("label %q, %v", l, err)
	}
	root, err := img.RootDir()
	if err != nil {
		t.Fatal(err)
	}
	children, err := root.GetChildren()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, c := range children {
		b, err := io.ReadAll(c.Reader())
		if err != nil {
			t.Fatal(err)
		}
		got[c.Name()] = string(b)
	}
	if got["user-data"] != spec.CloudInit.UserData {
		t.Errorf("user-data %q", got["user-data"])
	}
	var meta map[string]string
	if err := yaml.Unmarshal([]byte(got["meta-data"]), &meta); err != nil || meta["local-hostname"] != "web-1-lan" || meta["instance-id"] != "the-id" {
		t.Errorf("meta-data %q, %v", got["meta-data"], err)
	}
	if !strings.Contains(got["network-config"], "macaddress: 52:54:00:ab:00:01") {
		t.Errorf("network-config %q", got["network-config"])
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCheck(t *testing.T) {
	for field, ci := range map[string]vmm.CloudInit{
		"":                               {UserData: "anything", MetaData: "a: b", NetworkConfig: "version: 2"},
		"spec.cloud_init.user_data":      {UserData: strings.Repeat("x", MaxPart+1)},
		"spec.cloud_init.meta_data":      {MetaData: "- a list"},
		"spec.cloud_init.network_config": {NetworkConfig: "a: [b"},
	} {
		err := Check(ci)
		var e *errs.Error
		switch {
		case field == "" && err == nil:
		case asErr(err, &e) && e.Kind == errs.Invalid && e.Field == field && e.Remedy != "":
		default:
			t.Errorf("%s: %v", field, err)
		}
	}
}

func asErr(err error, e **errs.Error) bool {
	x, ok := err.(*errs.Error)
	*e = x
	return ok
}
