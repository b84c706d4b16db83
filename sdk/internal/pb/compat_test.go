// Package pb_test holds the protos of the contracts to "within v1 only additions".
package pb_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/mvirt/mvirt/sdk/internal/pb/hostpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/netpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/storagepb"
	"github.com/mvirt/mvirt/sdk/internal/pb/vmmpb"
	"github.com/mvirt/mvirt/sdk/sdktest/protocompat"
)

var rewrite = flag.Bool("rewrite", false, "record additions")

var files = []protoreflect.FileDescriptor{pluginpb.File_mvirt_plugin_v1_plugin_proto, hostpb.File_mvirt_host_v1_host_proto,
	storagepb.File_mvirt_storage_v1_storage_proto, netpb.File_mvirt_net_v1_net_proto, vmmpb.File_mvirt_vmm_v1_vmm_proto, logpb.File_mvirt_log_v1_log_proto}

func TestOnlyAdditions(t *testing.T) {
	if err := protocompat.Compare("testdata/v1.golden", *rewrite, files...); err != nil {
		t.Error(err)
	}
}

// TestTheCheckItself changes the golden text in the three ways that matter.
func TestTheCheckItself(t *testing.T) {
	lines := protocompat.Shape(files...)
	path := filepath.Join(t.TempDir(), "golden")
	put := func(lines []string) {
		if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(append([]string{"field mvirt.log.v1.Entry.gone = 99 optional string"}, lines...))
	for _, add := range []bool{false, true} {
		if err := protocompat.Compare(path, add, files...); err == nil || !strings.Contains(err.Error(), "Entry.gone") {
			t.Errorf("removal, add %v: %v", add, err)
		}
	}
	put(lines[1:])
	if err := protocompat.Compare(path, false, files...); err == nil || !strings.Contains(err.Error(), "-rewrite") {
		t.Errorf("addition: %v", err)
	}
	if err := protocompat.Compare(path, true, files...); err != nil {
		t.Errorf("recording an addition: %v", err)
	}
	if err := protocompat.Compare(path, false, files...); err != nil {
		t.Errorf("after recording: %v", err)
	}
}
