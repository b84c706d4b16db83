# SIGKILL of the plugin at 500 random places of import, clone, delete and all other changes, or at as many as fit
# into MVIRT_CRASH_TIME.
set -euo pipefail
modprobe zfs
/lab/in/gotest/plugins_storage-zfs_internal_pool.test -test.v -test.timeout 38m -test.run 'TestRealKill$' \
	-crash-points "${MVIRT_CRASH_POINTS:-500}" -crash-time "${MVIRT_CRASH_TIME:-30m}"
