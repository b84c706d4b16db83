# The storage contract as every plugin has to keep it, against mvirt-zfs as a process.
set -euo pipefail
modprobe zfs
cd /tmp
/lab/in/gotest/plugins_storage-zfs.test -test.v -test.timeout 35m
