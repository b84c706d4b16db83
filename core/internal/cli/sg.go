package cli

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

func (a *app) sgs() *noun[*apiv1.SecurityGroup] {
	n := newNoun[*apiv1.SecurityGroup](a, "security-group")
	n.columns = []render.Column[*apiv1.SecurityGroup]{
		{Head: "NAME", Cell: n.label},
		{Head: "RULES", Right: true, Cell: func(g *apiv1.SecurityGroup) string { return fmt.Sprint(len(g.GetRules())) }},
		{Head: "NICS", Right: true, Cell: func(g *apiv1.SecurityGroup) string { return fmt.Sprint(g.GetNicCount()) }},
		{Head: "AGE", Right: true, Cell: func(g *apiv1.SecurityGroup) string { return a.age(g.GetCreatedAt()) }},
		{Head: "LABELS", Wide: true, Cell: func(g *apiv1.SecurityGroup) string { return labelText(g.GetLabels()) }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.detail = func(g *apiv1.SecurityGroup) []render.Pair {
		var rules []string
		for _, r := range g.GetRules() {
			rules = append(rules, ruleText(r))
		}
		return []render.Pair{
			{Key: "Name", Value: g.GetName()}, {Key: "Id", Value: g.GetId()}, {Key: "NICs", Value: fmt.Sprint(g.GetNicCount())},
			{Key: "Rules", Value: strings.Join(rules, "\n")}, {Key: "Labels", Value: labelText(g.GetLabels())}, {Key: "Created", Value: a.when(g.GetCreatedAt())},
		}
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.SecurityGroup, error) {
		r, err := c.SecurityGroups.List(ctx, &apiv1.ListSecurityGroupsRequest{})
		return r.GetSecurityGroups(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.SecurityGroup, error) {
		return c.SecurityGroups.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

const ruleHelp = `A rule is DIRECTION:PROTOCOL[:PORTS][:PEER]

  in:tcp:22                        from anywhere to port 22
  in:tcp:8000-8080:10.0.0.0/8      from a subnet
  in:tcp:5432:group=web            from the NICs of the group web
  out:any                          everything out
  in:icmp

DIRECTION is in or out; PROTOCOL tcp, udp, icmp, icmpv6, any or a number; PORTS a port or a range (for icmp:
a type); PEER a CIDR or group=NAME. What no rule allows is dropped; answers to what was allowed pass.`

func (a *app) sgCommand() *cobra.Command {
	n := a.sgs()
	cmd := &cobra.Command{Use: "sg", Aliases: []string{"security-group"}, Short: "Security groups: rules that NICs share"}
	var req apiv1.CreateSecurityGroupRequest
	var rules, label []string
	create := &cobra.Command{Use: "create NAME [RULE…]", Short: "Make a security group", Long: "Makes a security group.\n\n" + ruleHelp, Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var err error
			req.Name = args[0]
			if req.Rules, err = parseRules(append(args[1:], rules...)); err != nil {
				return err
			}
			if req.Labels, err = labels(label); err != nil {
				return err
			}
			g, err := c.SecurityGroups.Create(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return n.changed(g, "created")
		})}
	create.Flags().StringArrayVar(&rules, "rule", nil, "a rule; may be repeated")
	idFlag(create, &req.Id)
	labelFlag(create, &label)

	var setRules []string
	var none bool
	set := &cobra.Command{Use: "set GROUP RULE…", Short: "Replace a group's rules; works at once", Long: "Replaces the rules of a group, for all its NICs at once.\n\n" + ruleHelp,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: n.complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			list, err := parseRules(append(args[1:], setRules...))
			if err != nil {
				return err
			}
			if (len(list) == 0) != none {
				return usage{errs.Field("rules", "give rules, or --none to allow nothing", "no rules are given, or both rules and --none")}
			}
			g, err := c.SecurityGroups.SetRules(cmd.Context(), &apiv1.SetSecurityGroupRulesRequest{Ref: args[0], Rules: list})
			if err != nil {
				return err
			}
			return n.changed(g, "updated")
		})}
	set.Flags().StringArrayVar(&setRules, "rule", nil, "a rule; may be repeated")
	set.Flags().BoolVar(&none, "none", false, "leave no rule: nothing passes")
	cmd.AddCommand(create, n.lsCommand(), n.showCommand(), set,
		n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
			return c.SecurityGroups.Delete(ctx, r)
		}, nil))
	return cmd
}

func parseRules(list []string) ([]*apiv1.Rule, error) {
	var out []*apiv1.Rule
	for _, s := range list {
		r, err := parseRule(s)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// withPorts are the protocols that have ports, or types, which stand in the same place.
var withPorts = []string{"tcp", "udp", "icmp", "icmpv6"}

// parseRule reads a rule as ruleHelp describes it.
func parseRule(text string) (*apiv1.Rule, error) {
	bad := func(why string) error {
		return errs.Field("rules", `write DIRECTION:PROTOCOL[:PORTS][:PEER], as in "in:tcp:22" or "in:tcp:5432:group=web"`, "rule %s: %s", ident.Quote(text), why)
	}
	direction, rest, ok := strings.Cut(text, ":")
	if !ok || direction != "in" && direction != "out" {
		return nil, bad(`it begins with neither "in:" nor "out:"`)
	}
	protocol, rest, more := strings.Cut(rest, ":")
	if _, err := strconv.ParseUint(protocol, 10, 8); err != nil && protocol != "any" && !slices.Contains(withPorts, protocol) {
		return nil, bad("the protocol is none of tcp, udp, icmp, icmpv6, any, nor a number")
	}
	r := &apiv1.Rule{Direction: direction, Protocol: protocol}
	if !more {
		return r, nil
	}
	ports, peer, hasPeer := strings.Cut(rest, ":")
	if from, to, err := portRange(ports); err == nil {
		if !slices.Contains(withPorts, protocol) {
			return nil, bad("this protocol has no ports")
		}
		r.PortFrom, r.PortTo = from, to
		if !hasPeer {
			return r, nil
		}
		rest = peer
	}
	if group, isGroup := strings.CutPrefix(rest, "group="); isGroup && group != "" {
		r.Group = group
		return r, nil
	}
	if !strings.Contains(rest, "/") {
		return nil, bad(ident.Quote(rest) + " is neither ports, nor a CIDR, nor group=NAME")
	}
	r.Cidr = rest
	return r, nil
}

func portRange(s string) (from, to uint32, err error) {
	lo, hi, isRange := strings.Cut(s, "-")
	if !isRange {
		hi = lo
	}
	a, err := strconv.ParseUint(lo, 10, 16)
	if err != nil {
		return 0, 0, err
	}
	b, err := strconv.ParseUint(hi, 10, 16)
	if err != nil {
		return 0, 0, err
	}
	if b < a {
		return 0, 0, strconv.ErrRange
	}
	return uint32(a), uint32(b), nil
}

// ruleText writes a rule as parseRule reads it.
func ruleText(r *apiv1.Rule) string {
	s := r.GetDirection() + ":" + r.GetProtocol()
	switch {
	case r.GetPortFrom() == 0 && r.GetPortTo() == 0:
	case r.GetPortTo() == r.GetPortFrom() || r.GetPortTo() == 0:
		s += fmt.Sprintf(":%d", r.GetPortFrom())
	default:
		s += fmt.Sprintf(":%d-%d", r.GetPortFrom(), r.GetPortTo())
	}
	switch {
	case r.GetGroup() != "":
		s += ":group=" + r.GetGroup()
	case r.GetCidr() != "":
		s += ":" + r.GetCidr()
	}
	return s
}
