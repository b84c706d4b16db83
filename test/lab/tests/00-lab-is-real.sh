# What the lab promises to every other test: a pool, a zvol with its udev link, snapshot and clone; kvm-amd;
# vhost-net; TAP; nftables.
set -euxo pipefail
disk=/dev/$(grep -l '^lab-disk0$' /sys/block/vd*/serial | cut -d/ -f4)
modprobe zfs
zpool create -f -O compression=off labtest "$disk"
zfs create -s -V 64M -o volblocksize=16k labtest/v
for i in $(seq 100); do [ -e /dev/zvol/labtest/v ] && break; sleep 0.05; done
dd if=/dev/urandom of=/dev/zvol/labtest/v bs=1M count=4 oflag=direct status=none
zfs snapshot labtest/v@s
zfs clone labtest/v@s labtest/c
for i in $(seq 100); do [ -e /dev/zvol/labtest/c ] && break; sleep 0.05; done
cmp -n 4194304 /dev/zvol/labtest/v /dev/zvol/labtest/c
zpool destroy labtest

modprobe kvm-amd
[ -c /dev/kvm ]
grep -qw svm /proc/cpuinfo

modprobe vhost-net
[ -c /dev/vhost-net ]
modprobe tun
ip tuntap add dev labtap mode tap
ip link del labtap
nft add table inet labtest
nft delete table inet labtest
ip netns add labns
ip netns del labns
