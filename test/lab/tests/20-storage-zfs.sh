# storage-zfs on real pools: the whole contract (conformance), life cycle, import, rebuild of the metadata, pool
# states, and SIGKILL at random places (MVIRT_CRASH_POINTS of them; the nightly run takes 500).
set -euo pipefail
modprobe zfs
tests=/lab/in/gotest
"$tests/plugins_storage-zfs.test" -test.v -test.timeout 15m
"$tests/plugins_storage-zfs_internal_pool.test" -test.v -test.timeout 18m -test.run TestReal -crash-points "${MVIRT_CRASH_POINTS:-5}"
