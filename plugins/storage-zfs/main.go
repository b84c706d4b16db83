// Command mvirt-zfs is the storage plugin that keeps volumes as zvols of a ZFS pool.
package main

import (
	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/program"
	"github.com/mvirt/mvirt/sdk/plugin"
)

func main() { plugin.Main(program.New()) }
