# Ratios against the bare commands on the same pool; absolute times in the lab mean nothing.
set -euo pipefail
modprobe zfs
/lab/in/gotest/plugins_storage-zfs_internal_pool.test -test.v -test.timeout 35m -test.run TestRealFigures
[ -x /lab/in/bin/bench-storage ] || { echo "bench-storage is not in bin/: make bin/bench-storage puts it there"; exit 1; }
disk=/dev/$(grep -l '^lab-disk0$' /sys/block/vd*/serial | cut -d/ -f4)
zpool create -f -O compression=off labbench "$disk"
bench-storage -zvol labbench -size $((512 << 20)) -rounds 3
zpool destroy labbench
