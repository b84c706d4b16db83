package storagekit

import (
	"net/netip"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Flags are the command-line flags that all storage plugins have.
type Flags struct {
	workerUser   string
	allowRanges  []string
	maxImageSize uint64
	running      int
}

// Register adds the flags.
func (f *Flags) Register(fs *pflag.FlagSet) {
	fs.StringVar(&f.workerUser, "worker-user", DefaultWorkerUser, "user under whom images are converted, when started as root")
	fs.StringArrayVar(&f.allowRanges, "allow-source-range", nil,
		"address range (CIDR) that URLs of images may lead to although it is not public; may be repeated")
	fs.Uint64Var(&f.maxImageSize, "max-image-size", 16<<40, "largest disk, in bytes, that an imported image may have")
	fs.IntVar(&f.running, "imports", 2, "imports that run at the same time")
}

// Options turns the flags into options.
func (f *Flags) Options(log hclog.Logger) (Options, error) {
	o := Options{Log: log, WorkerUser: f.workerUser, Running: f.running}
	for _, r := range f.allowRanges {
		p, err := netip.ParsePrefix(r)
		if err != nil {
			return o, errs.Field("allow_source_range", "give a range such as 192.168.7.0/24", "--allow-source-range %s is no address range", r)
		}
		o.Fetch.Policy.Allow = append(o.Fetch.Policy.Allow, p.Masked())
	}
	if f.maxImageSize < sector || f.maxImageSize > maxSize {
		return o, errs.Field("max_image_size", "give a number of bytes from 512 to 2^60", "--max-image-size is %d", f.maxImageSize)
	}
	o.MaxImageSize = int64(f.maxImageSize)
	if f.running < 1 || f.running > 64 {
		return o, errs.Field("imports", "give a number from 1 to 64", "--imports is %d", f.running)
	}
	return o, nil
}
