# The story of `make demo` with storage-zfs: two VMs cloned from one template, whose disks are zvols, under KVM.
set -euo pipefail
modprobe zfs
modprobe kvm-amd
modprobe vhost-net
disk=/dev/$(grep -l '^lab-disk0$' /sys/block/vd*/serial | cut -d/ -f4)
zpool create -f -m /mnt/labdemo labdemo "$disk"
demo -zfs-pool labdemo -guest /lab/in/guest -slow 4 -want-accel kvm
zpool destroy labdemo
