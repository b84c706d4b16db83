#!/bin/sh
# Runs all fuzz targets of mvirt-net side by side for a while ($1, default 60s) each. What one finds is left in its
# testdata. They share the processors, so that this takes little more than that while.
set -u
cd "$(dirname "$0")/../.."
go=${GO:-go}
time=${1:-60s}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
pids=
for f in $(grep -rl --include='*_test.go' '^func Fuzz' plugins/net-tap); do
	dir=$(dirname "$f")
	bin=$tmp/$(echo "$dir" | tr / _)
	[ -e "$bin" ] || $go test -c -fuzz=. -o "$bin" "./$dir" || exit 1
	for t in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$f"); do
		(
			cd "$dir" && "$bin" -test.run '^$' -test.fuzz "^$t\$" -test.fuzztime "$time" -test.parallel 1 \
				-test.fuzzcachedir "$($go env GOCACHE)/fuzz/net-tap/$(basename "$dir")" >"$bin.$t.log" 2>&1
			echo $? >"$bin.$t.rc"
		) &
		pids="$pids $!"
	done
done
[ -n "$pids" ] || { echo "there are no fuzz targets" >&2; exit 1; }
wait
bad=0
for rc in "$tmp"/*.rc; do
	log=${rc%.rc}.log
	name=$(basename "${rc%.rc}")
	# The go command's fuzzing may end with its own deadline instead of in time (golang.org/issue/48591): that is no find.
	if [ "$(cat "$rc")" = 0 ] || { grep -q 'context deadline exceeded' "$log" && ! grep -q 'Failing input' "$log"; }; then
		echo "fuzz $name: $(grep -o 'execs: [0-9]*' "$log" | tail -1), $time"
	else
		echo "fuzz $name: FAILED"
		cat "$log"
		bad=1
	fi
done
exit $bad
