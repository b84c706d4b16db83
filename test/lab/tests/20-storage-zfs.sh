# storage-zfs on real pools: life cycle, foreign datasets, import, rebuild of the metadata, every state that a pool
# can be in, and SIGKILL at random places (MVIRT_CRASH_POINTS of them).
set -euo pipefail
modprobe zfs
/lab/in/gotest/plugins_storage-zfs_internal_pool.test -test.v -test.timeout 35m -test.run TestReal \
	-test.skip TestRealFigures -crash-points "${MVIRT_CRASH_POINTS:-12}"
