package apiv1_test

import (
	"flag"
	"testing"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/sdktest/protocompat"
)

var rewrite = flag.Bool("rewrite", false, "write what has been added into testdata/v1.golden")

// Within v1 the public API only grows: a message, field or method that was there stays as it was.
func TestOnlyAdditions(t *testing.T) {
	if err := protocompat.Compare("testdata/v1.golden", *rewrite, apiv1.File_mvirt_v1_mvirt_proto); err != nil {
		t.Fatal(err)
	}
}
