package cli

import (
	"context"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

// labels reads --label key=value flags.
func labels(list []string) (map[string]string, error) {
	if len(list) == 0 {
		return nil, nil
	}
	out := map[string]string{}
	for _, s := range list {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, errs.Field("labels", `give "key=value"`, "label %s has no key and value", ident.Quote(s))
		}
		if _, twice := out[k]; twice {
			return nil, errs.Field("labels", "give each key once", "label %s is given twice", ident.Quote(k))
		}
		out[k] = v
	}
	return out, nil
}

func labelFlag(cmd *cobra.Command, to *[]string) {
	cmd.Flags().StringArrayVar(to, "label", nil, "label, as key=value; may be repeated")
}

func idFlag(cmd *cobra.Command, to *string) {
	cmd.Flags().StringVar(to, "id", "", "id to use (a UUIDv7): the same command twice then makes one object")
}

// options splits "a,key=value,flag" into its words; keys must be known. The first word may stand without a
// key and is given as first. A comma cannot be part of a value: none of the values may contain one.
func options(field, text string, known ...string) (first string, opts map[string]string, err error) {
	opts = map[string]string{}
	for i, word := range strings.Split(text, ",") {
		k, v, has := strings.Cut(word, "=")
		switch {
		case !has && i == 0:
			first = word
			continue
		case !slices.Contains(known, k):
			return "", nil, errs.Field(field, "use "+strings.Join(known, ", "), "%s %s has an unknown option %s", field, ident.Quote(text), ident.Quote(k))
		}
		if _, twice := opts[k]; twice {
			return "", nil, errs.Field(field, "give it once", "%s %s has the option %s twice", field, ident.Quote(text), k)
		}
		opts[k] = v
	}
	return first, opts, nil
}

// maxText is the largest text file (cloud-init data) that is read, in bytes.
const maxText = 1 << 20

// readText reads a file of the caller that goes into a request as text; "-" is standard input.
func (a *app) readText(field, path string) (string, error) {
	if path == "" {
		return "", nil
	}
	in := a.std.In
	if path != "-" {
		f, err := openFile(field, path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxText+1))
	if err != nil {
		return "", errs.Wrap(errs.Unknown, err, "reading %s", path)
	}
	if len(b) > maxText {
		return "", errs.Field(field, "give a smaller file", "%s is larger than 1M", path)
	}
	if len(b) == 0 {
		return "", errs.Field(field, "give a file with something in it", "%s is empty", path)
	}
	return string(b), nil
}

// openFile opens a file that the caller named, with errors that say which flag it was.
func openFile(field, path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		e := &errs.Error{Kind: errs.KindOf(err), Field: field, Message: "cannot open " + ident.Quote(path), Remedy: "check the path"}
		switch e.Kind {
		case errs.NotFound:
			e.Message = "there is no file " + ident.Quote(path)
		case errs.Denied:
			e.Message, e.Remedy = "you may not read "+ident.Quote(path), "the file is opened as you, not as mvirtd: make it readable for yourself"
		default:
			e.Err = err
		}
		return nil, e
	}
	st, err := f.Stat()
	if err == nil && st.IsDir() {
		err = errs.Field(field, "give a file", "%s is a directory", ident.Quote(path))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// handOver opens a file of the caller and gives it to the core; the token goes into the request. The daemon
// so reads nothing that the caller could not.
func (a *app) handOver(ctx context.Context, c *client.Client, field, path string) (string, error) {
	f, err := openFile(field, path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if c.FDSocket() == "" {
		return "", errs.New(errs.Unsupported, "a file can only be handed over on the core's own host").Do("run the command there, or import from a URL")
	}
	return a.std.HandOver(ctx, c.FDSocket(), f)
}

func (a *app) age(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return units.Age(a.std.Now(), t.AsTime())
}

// when writes a point in time with its age.
func (a *app) when(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().In(a.std.Now().Location()).Format("2006-01-02 15:04:05 MST") + " (" + a.age(t) + " ago)"
}

func duration(d time.Duration, set bool) *durationpb.Duration {
	if !set {
		return nil
	}
	return durationpb.New(d)
}

// labelText writes labels as sorted key=value words.
func labelText(m map[string]string) string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for i, k := range keys {
		keys[i] = k + "=" + m[k]
	}
	return strings.Join(keys, " ")
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

// state is a state with its reason, on one line.
func state(s, reason string) string {
	if reason != "" {
		return s + " (" + reason + ")"
	}
	return s
}

func firstOf(words ...string) string {
	for _, w := range words {
		if w != "" {
			return w
		}
	}
	return ""
}

// nonEmpty drops empty words: --dns "" gives none.
func nonEmpty(list []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == "" })
}

// nothingToChange is the error of an update without a flag.
func nothingToChange(cmd *cobra.Command) error {
	return usage{errs.New(errs.Invalid, "%s: nothing to change is given", cmd.CommandPath()).Do("give a flag; see " + cmd.CommandPath() + " --help")}
}
