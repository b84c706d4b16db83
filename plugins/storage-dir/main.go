// Command mvirt-dir is the storage plugin that keeps volumes as files in a directory.
package main

import (
	"github.com/mvirt/mvirt/plugins/storage-dir/internal/program"
	"github.com/mvirt/mvirt/sdk/plugin"
)

func main() { plugin.Main(program.New()) }
