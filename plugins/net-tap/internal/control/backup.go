package control

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
)

// A backup is text: a line with the format and its version, a line of JSON (content), and a line with the
// SHA-256 of the two before. It says what there should be, as requests that would make it: names of links and
// namespaces, link addresses and attachments belong to a host and are made anew where it is put back.
const (
	backupMagic   = "mvirt-net-backup "
	backupVersion = "1"
	backupSum     = "sha256 "
	backupMax     = 256 << 20 // bytes; 100,000 NICs are about 60 MiB
)

type content struct {
	Groups   []net.CreateSecurityGroupRequest
	Networks []net.CreateNetworkRequest
	NICs     []net.CreateNICRequest
	Down     []string `json:",omitempty"` // ids of NICs whose link is down
}

var _ net.Backuper = (*Service)(nil)

// Backup implements service.Backuper: what there is at one moment.
func (s *Service) Backup(_ context.Context, w io.Writer) error {
	var c content
	s.mu.Lock()
	for _, g := range s.data.Groups {
		c.Groups = append(c.Groups, net.CreateSecurityGroupRequest{ID: g.Group.ID, Name: g.Group.Name, Rules: g.Group.Rules, Labels: g.Group.Labels})
	}
	for _, n := range s.data.Networks {
		if !n.Deleting {
			c.Networks = append(c.Networks, n.Request)
		}
	}
	for _, n := range s.data.NICs {
		if n.LinkDown {
			c.Down = append(c.Down, n.ID)
		}
		c.NICs = append(c.NICs, net.CreateNICRequest{ID: n.ID, Name: n.Name, NetworkID: n.NetworkID, MAC: n.MAC, IPv4: n.IPv4, IPv6: n.IPv6,
			RoutedPrefixes: n.Routed, SecurityGroups: n.Groups, HostName: n.HostName, Labels: n.Labels})
	}
	damaged := len(s.data.Damaged)
	s.mu.Unlock() // records are replaced, never changed
	if damaged > 0 {
		return errs.New(errs.Corrupt, "%d records of the network metadata cannot be read, so a backup would lack them", damaged).
			Because("METADATA_DAMAGED").Do("see mvirt plugin show net for which; restore metadata.db or remove them")
	}
	slices.SortFunc(c.Groups, func(a, b net.CreateSecurityGroupRequest) int { return strings.Compare(a.ID, b.ID) })
	slices.SortFunc(c.Networks, func(a, b net.CreateNetworkRequest) int { return strings.Compare(a.ID, b.ID) })
	slices.Sort(c.Down)
	slices.SortFunc(c.NICs, func(a, b net.CreateNICRequest) int { return strings.Compare(a.ID, b.ID) })
	body, err := json.Marshal(c)
	if err != nil {
		return err
	}
	data := fmt.Appendf(nil, "%s%s\n%s\n", backupMagic, backupVersion, body)
	_, err = fmt.Fprintf(w, "%s%s%x\n", data, backupSum, sha256.Sum256(data))
	return err
}

// parseBackup reads what Backup wrote.
func parseBackup(r io.Reader) (*content, error) {
	corrupt := func(format string, args ...any) error {
		return errs.New(errs.Corrupt, "this is no complete backup of mvirt-net: "+format, args...).Because("BACKUP_CORRUPT").Do("use another backup")
	}
	data, err := io.ReadAll(io.LimitReader(r, backupMax+1))
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "read the backup")
	}
	if len(data) > backupMax {
		return nil, corrupt("it is longer than %d bytes", backupMax)
	}
	first, _, _ := bytes.Cut(data, []byte("\n"))
	v, ok := bytes.CutPrefix(first, []byte(backupMagic))
	if !ok || len(v) > 16 {
		return nil, corrupt("it does not begin as one")
	}
	if string(v) != backupVersion {
		return nil, errs.New(errs.Precondition, "the backup has format %q, this mvirt-net knows %s", v, backupVersion).Because("BACKUP_NEWER").
			Do("restore it with the mvirt that made it, or a newer one")
	}
	at := bytes.LastIndex(data, []byte("\n"+backupSum)) + 1
	if at <= len(first) {
		return nil, corrupt("it has no checksum")
	}
	sum := sha256.Sum256(data[:at])
	if string(data[at:]) != backupSum+hex.EncodeToString(sum[:])+"\n" {
		return nil, corrupt("its checksum is wrong")
	}
	var c content
	if err := json.Unmarshal(data[len(first)+1:at], &c); err != nil {
		return nil, corrupt("%v", err)
	}
	return &c, nil
}

// Restore implements service.Backuper. All is made as if it were asked for, with every check; if one thing
// cannot be made, all is undone. NICs come back without attachments.
func (s *Service) Restore(ctx context.Context, r io.Reader) (err error) {
	c, err := parseBackup(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	n := len(s.data.Networks) + len(s.data.NICs) + len(s.data.Groups)
	s.mu.Unlock()
	if n > 0 {
		return errs.New(errs.Precondition, "there are %d networks, NICs and security groups, a restore needs none", n).Because("NOT_EMPTY").
			Do("delete them, or restore with an empty --metadata-dir")
	}
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for _, f := range slices.Backward(undo) {
			if e := f(); e != nil {
				s.log.Error("undo of a restore", "error", e)
			}
		}
	}()
	bg := context.WithoutCancel(ctx)
	step := func(what, name string, make, remove func() error) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := make(); err != nil {
			return &errs.Error{Op: "net.Restore", Kind: errs.KindOf(err), Err: fmt.Errorf("%s %s: %w", what, name, err)}
		}
		undo = append(undo, remove)
		return nil
	}
	for _, g := range c.Groups { // without rules at first: they may name groups that are still to come
		bare := g
		bare.Rules = nil
		if err := step("security group", g.Name,
			func() error { _, err := s.CreateSecurityGroup(bg, bare); return err },
			func() error {
				_, err := s.SetSecurityGroupRules(bg, net.SetSecurityGroupRulesRequest{Ref: g.ID})
				return errors.Join(err, s.DeleteSecurityGroup(bg, net.Ref{Ref: g.ID}))
			}); err != nil {
			return err
		}
	}
	for _, g := range c.Groups {
		if err := step("rules of security group", g.Name, func() error {
			_, err := s.SetSecurityGroupRules(bg, net.SetSecurityGroupRulesRequest{Ref: g.ID, Rules: g.Rules})
			return err
		}, func() error {
			_, err := s.SetSecurityGroupRules(bg, net.SetSecurityGroupRulesRequest{Ref: g.ID})
			return err
		}); err != nil {
			return err
		}
	}
	for _, n := range c.Networks {
		if err := step("network", n.Name,
			func() error { _, err := s.CreateNetwork(bg, n); return err },
			func() error { return s.DeleteNetwork(bg, net.Ref{Ref: n.ID}) }); err != nil {
			return err
		}
	}
	for _, n := range c.NICs {
		if err := step("NIC", n.Name,
			func() error { _, err := s.CreateNIC(bg, n); return err },
			func() error { return s.DeleteNIC(bg, net.Ref{Ref: n.ID}) }); err != nil {
			return err
		}
	}
	for _, id := range c.Down {
		if _, err := s.UpdateNIC(bg, net.UpdateNICRequest{Ref: id, SetLink: true, LinkDown: true}); err != nil {
			return err
		}
	}
	return nil
}
