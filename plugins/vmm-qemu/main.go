// Command mvirt-qemu is the vmm plugin that runs VMs with QEMU.
package main

import (
	"github.com/mvirt/mvirt/plugins/vmm-qemu/internal/program"
	"github.com/mvirt/mvirt/sdk/plugin"
)

func main() { plugin.Main(program.New()) }
