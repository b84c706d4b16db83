// Package cloudinit makes the volume by which a guest's cloud-init is told who it is: the NoCloud data
// source, an ISO 9660 file system with the volume id "cidata" that holds meta-data, user-data and
// network-config (cloud-init's documentation, "NoCloud" and "Networking config Version 2").
package cloudinit

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/kdomanski/iso9660"
	"gopkg.in/yaml.v3"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// MaxPart is the largest user data, meta data or network config that is taken, in bytes.
const MaxPart = 1 << 20

// Wanted tells whether a VM gets the volume.
func Wanted(ci vmm.CloudInit) bool { return ci != vmm.CloudInit{} }

// Check says whether the parts can be handed over. That user data is meant for cloud-init is for it to judge;
// meta data and network config must be YAML, or the guest silently boots without them.
func Check(ci vmm.CloudInit) error {
	for _, p := range []struct {
		field, text string
		yaml        bool
	}{
		{"spec.cloud_init.user_data", ci.UserData, false},
		{"spec.cloud_init.meta_data", ci.MetaData, true},
		{"spec.cloud_init.network_config", ci.NetworkConfig, true},
	} {
		if len(p.text) > MaxPart {
			return errs.Field(p.field, "fetch the large part from within the guest", "%s is %d bytes long, the limit is %d",
				p.field, len(p.text), MaxPart)
		}
		var v map[string]any
		if p.yaml && p.text != "" {
			if err := yaml.Unmarshal([]byte(p.text), &v); err != nil {
				return errs.Field(p.field, "give a YAML mapping", "%s is not YAML: %v", p.field, err)
			}
		}
	}
	return nil
}

// Files gives the contents of the volume by name.
func Files(id string, spec vmm.Spec) (map[string][]byte, error) {
	files := map[string][]byte{
		"user-data":      []byte(spec.CloudInit.UserData),
		"meta-data":      []byte(spec.CloudInit.MetaData),
		"network-config": []byte(spec.CloudInit.NetworkConfig),
	}
	if len(files["user-data"]) == 0 {
		files["user-data"] = []byte("#cloud-config\n{}\n") // without any, NoCloud is not recognised
	}
	if len(files["meta-data"]) == 0 {
		b, err := yaml.Marshal(map[string]string{"instance-id": id, "local-hostname": HostName(spec.Name)})
		if err != nil {
			return nil, err
		}
		files["meta-data"] = b
	}
	if len(files["network-config"]) == 0 {
		b, err := yaml.Marshal(networkConfig(spec.NICs))
		if err != nil {
			return nil, err
		}
		files["network-config"] = b
	}
	return files, nil
}

// HostName makes a host name of a VM's name: RFC 1123 knows no '_', and a dot would make a domain of it.
func HostName(name string) string {
	return strings.Trim(strings.NewReplacer("_", "-", ".", "-").Replace(name), "-")
}

type netConfig struct {
	Version   int                 `yaml:"version"`
	Ethernets map[string]ethernet `yaml:"ethernets"`
}

type ethernet struct {
	Match struct {
		MAC string `yaml:"macaddress"`
	} `yaml:"match"`
	DHCP4    bool `yaml:"dhcp4"`
	DHCP6    bool `yaml:"dhcp6"`
	AcceptRA bool `yaml:"accept-ra"`
}

// networkConfig has DHCP on each NIC. Names are not set: by the MAC they are found whatever they are called.
func networkConfig(nics []vmm.NIC) netConfig {
	c := netConfig{Version: 2, Ethernets: map[string]ethernet{}}
	for i, n := range nics {
		e := ethernet{DHCP4: true, DHCP6: true, AcceptRA: true}
		e.Match.MAC = strings.ToLower(n.MAC)
		c.Ethernets[fmt.Sprintf("nic%d", i)] = e
	}
	return c
}

// Write makes the volume at path, whole or not at all.
func Write(path, id string, spec vmm.Spec) error {
	files, err := Files(id, spec)
	if err != nil {
		return err
	}
	w, err := iso9660.NewWriter()
	if err != nil {
		return err
	}
	defer func() { _ = w.Cleanup() }()
	for name, data := range files {
		if err := w.AddFile(bytes.NewReader(data), name); err != nil {
			return err
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := w.WriteTo(f, "cidata"); err != nil {
		return err
	}
	// A hypervisor under a uid of its own comes in by an entry of the access list, which the group's bits bound.
	if err := f.Chmod(0o640); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
