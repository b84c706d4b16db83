# mvirt-vmm's driver with a real cloud-hypervisor under nested KVM, and the conformance suite of vmm plugins.
set -euo pipefail
ch=$(command -v cloud-hypervisor) || { echo "no cloud-hypervisor: name one in MVIRT_LAB_EXTRA"; exit 77; }
modprobe kvm-amd || true
modprobe tun || true
cloud-hypervisor --version
export MVIRT_CLOUD_HYPERVISOR=$ch MVIRT_TEST_GUEST=/lab/in/guest MVIRT_VMM_BIN=/lab/in/bin/mvirt-vmm
/lab/in/gotest/plugins_vmm-cloudhypervisor_internal_ch.test -test.v -test.timeout 40m -test.run 'TestReal'
/lab/in/gotest/plugins_vmm-cloudhypervisor.test -test.v -test.timeout 40m -test.run TestConformance
