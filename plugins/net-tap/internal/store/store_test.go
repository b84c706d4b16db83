package store

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	n := &Network{Request: net.CreateNetworkRequest{ID: "n1", Name: "lan", Mode: net.ModeNAT, Subnet4: netip.MustParsePrefix("10.0.0.0/24"),
		DNS: []netip.Addr{netip.MustParseAddr("1.1.1.1")}, Labels: map[string]string{"a": "b"}}, CreatedAt: time.Unix(5, 6).UTC(), NS: "mvirt-x",
		Link4: netip.MustParsePrefix("169.254.64.0/31"), Deleting: true}
	c := &NIC{ID: "c1", NetworkID: "n1", MAC: "52:54:00:00:00:01", IPv4: netip.MustParseAddr("10.0.0.2"), IPv6: netip.MustParseAddr("fd00::2"),
		Routed: []netip.Prefix{netip.MustParsePrefix("192.168.0.0/24")}, Groups: []string{"g1"}, Attach: &Attach{VMID: "v", UID: 7, Mode: net.AttachVhostUser, Queues: 2}}
	g := &Group{Group: net.SecurityGroup{ID: "g1", Rules: []net.Rule{{Direction: net.Inbound, Protocol: "tcp", PortFrom: 80, CIDR: netip.MustParsePrefix("::/0")}}}}
	st := State{Forwarding: hostnet.Guards{IPv4: []string{"eth0"}, All6: true}}
	if err := s.Do(PutNetwork(n), PutNIC(c), PutGroup(g), PutState(st)); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, dir)
	d, err := s.Load()
	if err != nil || len(d.Damaged) > 0 {
		t.Fatal(d.Damaged, err)
	}
	for _, x := range [][2]any{{d.Networks["n1"], n}, {d.NICs["c1"], c}, {d.Groups["g1"], g}, {d.State, st}} {
		if !reflect.DeepEqual(x[0], x[1]) {
			t.Errorf("%+v, want %+v", x[0], x[1])
		}
	}
	if err := s.Do(DeleteNIC("c1"), DeleteNetwork("n1"), DeleteGroup("g1"), DeleteGroup("none")); err != nil {
		t.Fatal(err)
	}
	if d, _ = s.Load(); len(d.NICs)+len(d.Networks)+len(d.Groups) != 0 {
		t.Errorf("%+v", d)
	}
	if fi, err := os.Stat(filepath.Join(dir, File)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi.Mode(), err)
	}
}

func TestRefusals(t *testing.T) {
	t.Run("in use", func(t *testing.T) {
		dir := t.TempDir()
		open(t, dir)
		_, err := Open(dir)
		if !errors.Is(err, errs.Unavailable) || errs.RemedyOf(err) == "" {
			t.Error(err)
		}
	})
	t.Run("newer", func(t *testing.T) {
		dir := t.TempDir()
		s := open(t, dir)
		if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bMeta).Put(kVersion, []byte("99")) }); err != nil {
			t.Fatal(err)
		}
		s.Close()
		_, err := Open(dir)
		if !errors.Is(err, errs.Precondition) || errs.RemedyOf(err) == "" {
			t.Error(err)
		}
	})
	t.Run("garbage", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, File), []byte("this is no database, but it is long enough to be looked at"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(dir)
		if !errors.Is(err, errs.Corrupt) || errs.RemedyOf(err) == "" {
			t.Error(err)
		}
	})
	t.Run("a damaged record", func(t *testing.T) {
		s := open(t, t.TempDir())
		err := s.db.Update(func(tx *bolt.Tx) error {
			return errors.Join(tx.Bucket(bNICs).Put([]byte("bad"), []byte("{")), tx.Bucket(bNICs).Put([]byte("good"), []byte(`{"ID":"good"}`)))
		})
		if err != nil {
			t.Fatal(err)
		}
		d, err := s.Load()
		if err != nil || len(d.Damaged) != 1 || d.NICs["good"] == nil || d.NICs["bad"] != nil {
			t.Errorf("%+v %v", d, err)
		}
	})
}
