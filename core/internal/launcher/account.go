package launcher

import (
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"

	"github.com/mvirt/mvirt/sdk/errs"
)

// identity is who a process runs as. Groups are exactly these, ascending, whatever /etc/group says besides.
type identity struct {
	UID    uint32
	GID    uint32
	Groups []uint32
}

// accounts looks users and groups up; tests replace it.
type accounts struct {
	user  func(nameOrID string) (uid, gid uint32, err error) // gid is ^0 when a number has no entry
	group func(nameOrID string) (uint32, error)
}

const noGID = ^uint32(0)

// systemAccounts asks /etc/passwd and /etc/group.
func systemAccounts() accounts { return accounts{user: lookupUser, group: lookupGroup} }

func lookupUser(s string) (uint32, uint32, error) {
	n, nerr := strconv.ParseUint(s, 10, 32)
	var u *user.User
	var err error
	if nerr == nil {
		u, err = user.LookupId(s)
		var unknown user.UnknownUserIdError
		if errors.As(err, &unknown) {
			return uint32(n), noGID, nil
		}
	} else {
		u, err = user.Lookup(s)
		var unknown user.UnknownUserError
		if errors.As(err, &unknown) {
			return 0, 0, errs.New(errs.Precondition, "there is no user %s", s).Because("USER_MISSING").
				Do("useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin " + s)
		}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("looking up user %s: %w", s, err)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	return uint32(uid), uint32(gid), errors.Join(err1, err2)
}

func lookupGroup(s string) (uint32, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return uint32(n), nil
	}
	g, err := user.LookupGroup(s)
	var unknown user.UnknownGroupError
	if errors.As(err, &unknown) {
		return 0, errs.New(errs.Precondition, "there is no group %s", s).Because("GROUP_MISSING").Do("groupadd --system " + s)
	}
	if err != nil {
		return 0, fmt.Errorf("looking up group %s: %w", s, err)
	}
	n, err := strconv.ParseUint(g.Gid, 10, 32)
	return uint32(n), err
}

// identity resolves the names of one process. key is the configuration table they stand in, for messages.
func (a accounts) identity(key, usr, grp string, groups []string) (id identity, err error) {
	if usr == "" {
		return id, errs.New(errs.Precondition, "%s.user: missing; mvirtd runs as root and must know who this runs as", key).
			Because("USER_MISSING").Do(`add user = "…" to [` + key + `]`)
	}
	var problems []error
	if id.UID, id.GID, err = a.user(usr); err != nil {
		problems = append(problems, errs.Wrap(errs.Precondition, err, "%s.user", key))
	}
	if grp != "" {
		if id.GID, err = a.group(grp); err != nil {
			problems = append(problems, errs.Wrap(errs.Precondition, err, "%s.group", key))
		}
	} else if id.GID == noGID {
		problems = append(problems, errs.New(errs.Precondition, "%s.user: the number %s has no entry in /etc/passwd, so its group is unknown", key, usr).
			Do(`add group = "…" to [`+key+`]`))
	}
	for _, g := range groups {
		n, err := a.group(g)
		if err != nil {
			problems = append(problems, errs.Wrap(errs.Precondition, err, "%s.groups", key))
		}
		id.Groups = append(id.Groups, n)
	}
	slices.Sort(id.Groups)
	id.Groups = slices.Compact(id.Groups)
	return id, errors.Join(problems...)
}
