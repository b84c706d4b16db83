// Command mvirt-vmm is the vmm plugin that runs VMs with cloud-hypervisor.
package main

import (
	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/program"
	"github.com/mvirt/mvirt/sdk/plugin"
)

func main() { plugin.Main(program.New()) }
