# Ratios against the bare commands on the same pool; absolute times in the lab mean nothing.
set -euo pipefail
modprobe zfs
/lab/in/gotest/plugins_storage-zfs_internal_pool.test -test.v -test.timeout 35m -test.run TestRealFigures
