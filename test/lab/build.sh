#!/bin/bash
# Builds the lab: a Debian root file system with OpenZFS, QEMU and udev, its kernel and its initramfs.
#
#   build.sh print-key     the hash that names the cache entry
#   build.sh build         build it if the cache does not hold it; prints the cache folder
#
# Everything comes from Debian packages, by the sources that this host's apt already has (plus the component
# contrib, where zfs-dkms lives). The cache is outside the checkout: $MVIRT_LAB_CACHE, else
# /var/cache/mvirt/lab. An entry is named by the hash of this script, of the files it copies and of the
# versions of the packages that decide what is in it; entries of other hashes are removed after a good build.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${MVIRT_LAB_CACHE:-/var/cache/mvirt/lab}
suite=bookworm

# What the guest has. No recommends: each name is here on purpose.
packages="systemd systemd-sysv udev kmod iproute2 iputils-ping iputils-arping nftables procps psmisc acl
 zfsutils-linux qemu-system-x86 qemu-utils seabios ipxe-qemu busybox-static isc-dhcp-client dhcpcd5 tcpdump jq
 e2fsprogs dosfstools xz-utils zstd openssh-client socat netcat-openbsd dbus passwd login libcap2-bin strace"
keyed="linux-image-cloud-amd64 zfs-dkms zfsutils-linux qemu-system-x86 systemd udev"

say() { echo "lab: $*" >&2; }

need() {
	local missing=""
	for p in "$@"; do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"; done
	[ -z "$missing" ] && return
	say "installing$missing"
	apt-get update -qq -o Acquire::Retries=3
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Acquire::Retries=3 --no-install-recommends $missing >/dev/null
}

# The host's own Debian sources, with contrib added, as one-line sources for mmdebstrap.
sources() {
	local f
	for f in /etc/apt/sources.list.d/*.sources; do
		[ -e "$f" ] || continue
		awk '
			function flush() { if (uris && suites) { n = split(suites, s, " "); for (i = 1; i <= n; i++)
				print "deb [signed-by=" key "] " uris " " s[i] " main contrib" } uris = suites = "" }
			/^URIs:/ { uris = $2 } /^Suites:/ { sub(/^Suites: */, ""); suites = $0 }
			/^Signed-By:/ { key = $2 } /^$/ { flush() } END { flush() }' "$f"
	done
	[ -e /etc/apt/sources.list ] && sed -nE 's/^(deb (\[[^]]*\] )?[^ ]+ [^ ]+) .*/\1 main contrib/p' /etc/apt/sources.list
	true
}

# apt of the lab: own lists and state, so that the host's sources stay as they are.
labapt() {
	apt-get -o Dir::Etc::SourceList="$aptdir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State::Lists="$aptdir/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
}

prepare_apt() {
	aptdir=$cache/apt
	mkdir -p "$aptdir/lists/partial"
	sources | grep -E " $suite(-updates|-security)? " >"$aptdir/sources.list" || true
	if [ ! -s "$aptdir/sources.list" ]; then
		say "this host's apt has no source for Debian $suite; add one to /etc/apt/sources.list.d"
		exit 1
	fi
	# Lists that are there serve when the registry does not answer: a lab that is built needs nothing from it.
	if ! labapt update -qq -o Acquire::Retries=3 >&2; then
		if [ -z "$(find "$aptdir/lists" -maxdepth 1 -name '*_Packages*' -print -quit)" ]; then
			say "the package lists of Debian $suite cannot be fetched"
			exit 1
		fi
		say "the package lists cannot be fetched anew; going on with those of $(date -r "$aptdir/lists" +%F)"
	fi
}

policy() {
	apt-cache -o Dir::Etc::SourceList="$aptdir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State::Lists="$aptdir/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= policy "$@"
}

versions() {
	policy $keyed | awk '/^[a-z]/ { p = $1 } /Candidate:/ { print p, $2 }'
}

key() { { cat "$here/build.sh" "$here"/guest/*; echo "$packages"; versions; } | sha256sum | cut -c1-16; }

# unbuildable ends the build when a package that it needs is not to be had, and says which.
unbuildable() {
	local p have missing=""
	have=$(policy $packages $keyed mmdebstrap | awk '/^[^ ]/ { p = $1 } /Candidate:/ && $2 != "(none)" { print p }')
	for p in $packages $keyed mmdebstrap; do
		grep -qxF "$p:" <<<"$have" || missing="$missing $p"
	done
	[ -z "$missing" ] && return
	say "cannot be built: the registry has no$missing for Debian $suite"
	exit 1
}

build() {
	local k dest tmp root kver
	k=$(key)
	dest=$cache/$k
	if [ -e "$dest/ok" ]; then
		echo "$dest"
		return
	fi
	unbuildable
	need mmdebstrap e2fsprogs cpio zstd kmod busybox-static binutils
	tmp=$cache/tmp.$$
	root=$tmp/root
	mkdir -p "$tmp"
	trap 'umount -q "$root/proc" 2>/dev/null || true; rm -rf --one-file-system "$tmp"' EXIT
	say "key $k is not in the cache; building (about 10 minutes on 2 cores)"

	say "1/4 root file system"
	mmdebstrap --quiet --aptopt='Acquire::Retries "3"' --mode=root --variant=minbase --aptopt='APT::Install-Recommends "false"' \
		--dpkgopt=path-exclude='/usr/share/doc/*' --dpkgopt=path-exclude='/usr/share/man/*' \
		--dpkgopt=path-exclude='/usr/share/locale/*' --include="$(echo $packages linux-image-cloud-amd64 | tr ' ' ,)" \
		"$suite" "$root" "$aptdir/sources.list" >"$tmp/debootstrap.log" 2>&1 || { tail -20 "$tmp/debootstrap.log" >&2; exit 1; }
	kver=$(basename "$(ls -d "$root"/lib/modules/*-cloud-amd64)")

	say "2/4 OpenZFS modules for $kver (from the zfs-dkms source)"
	cp -a "$root" "$tmp/build"
	mount -t proc proc "$tmp/build/proc"
	trap 'umount -q "$tmp/build/proc" 2>/dev/null || true; rm -rf --one-file-system "$tmp"' EXIT
	cp /etc/resolv.conf "$tmp/build/etc/" 2>/dev/null || true
	for f in /etc/apt/apt.conf.d/*; do grep -qiE 'acquire|proxy' "$f" 2>/dev/null && cp "$f" "$tmp/build/etc/apt/apt.conf.d/"; done
	# dkms builds for the kernel named, not for the one that runs here.
	mkdir -p "$tmp/build/etc/dkms"
	{
		chroot "$tmp/build" apt-get update -qq
		DEBIAN_FRONTEND=noninteractive chroot "$tmp/build" apt-get install -y -qq --no-install-recommends \
			"linux-headers-$kver" dkms zfs-dkms || true
		zver=$(ls "$tmp/build/usr/src" | sed -n 's/^zfs-//p' | head -1)
		[ -n "$zver" ] || { echo "zfs-dkms is not unpacked"; exit 1; }
		if ! ls "$tmp/build/lib/modules/$kver/updates/dkms"/zfs.ko* >/dev/null 2>&1; then
			chroot "$tmp/build" dkms install -m zfs -v "$zver" -k "$kver" -j "$(nproc)" --force
		fi
	} >"$tmp/zfs.log" 2>&1 || { tail -30 "$tmp/zfs.log" >&2; exit 1; }
	umount "$tmp/build/proc"
	ls "$tmp/build/lib/modules/$kver/updates/dkms"/zfs.ko* >/dev/null || { say "no zfs.ko was built"; tail -30 "$tmp/zfs.log" >&2; exit 1; }
	mkdir -p "$root/lib/modules/$kver/updates/dkms"
	cp "$tmp/build/lib/modules/$kver/updates/dkms"/*.ko* "$root/lib/modules/$kver/updates/dkms/"
	for f in "$root/lib/modules/$kver/updates/dkms"/*.ko; do strip --strip-debug "$f"; done
	rm -rf --one-file-system "$tmp/build"
	depmod -b "$root" "$kver"

	say "3/4 kernel and initramfs"
	cp "$root/boot/vmlinuz-$kver" "$tmp/vmlinuz"
	mkdir -p "$tmp/ird"/{bin,dev,proc,sys,new,lib/modules}
	cp "$(command -v busybox)" "$tmp/ird/bin/busybox"
	cp "$here/guest/initramfs-init" "$tmp/ird/init"
	chmod 755 "$tmp/ird/init"
	# Only what it takes to mount the root disk, in load order.
	modprobe -d "$root" -S "$kver" --show-depends -a virtio_pci virtio_blk ext4 |
		awk '$1 == "insmod" { print $2 }' | awk '!seen[$0]++' >"$tmp/order"
	: >"$tmp/ird/lib/modules/order"
	while read -r m; do
		cp "$m" "$tmp/ird/lib/modules/"
		basename "$m" >>"$tmp/ird/lib/modules/order"
	done <"$tmp/order"
	(cd "$tmp/ird" && find . | cpio -o -H newc --quiet) | zstd -q -6 >"$tmp/initrd"

	say "4/4 disk image"
	mkdir -p "$root/lab" "$root/etc/systemd/system/multi-user.target.wants"
	cp "$here/guest/init" "$root/lab/init"
	cp "$here/guest/lab-run.service" "$root/etc/systemd/system/lab-run.service"
	ln -sf ../lab-run.service "$root/etc/systemd/system/multi-user.target.wants/lab-run.service"
	chmod 755 "$root/lab/init"
	echo lab >"$root/etc/hostname"
	printf '127.0.0.1 localhost lab\n::1 localhost\n' >"$root/etc/hosts"
	: >"$root/etc/fstab"
	chroot "$root" passwd -d root >/dev/null
	rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/boot/* "$root"/usr/lib/python3* 2>/dev/null || true
	local kb
	kb=$(du -sk --one-file-system "$root" | cut -f1)
	truncate -s $((kb * 5 / 4 + 1048576))K "$tmp/root.img"
	mke2fs -q -t ext4 -m 0 -L lab-root -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$tmp/root.img"
	echo "$kver" >"$tmp/kernel-version"
	versions >"$tmp/versions"
	rm -rf --one-file-system "$root" "$tmp/ird" "$tmp/order"
	touch "$tmp/ok"
	trap - EXIT
	mv "$tmp" "$dest"
	find "$cache" -mindepth 1 -maxdepth 1 -type d ! -name "$k" ! -name apt ! -name 'tmp.*' -mtime +1 -exec rm -rf {} +
	say "built $dest: root $(du -h --apparent-size "$dest/root.img" | cut -f1) ($(du -h "$dest/root.img" | cut -f1) on disk)"
	echo "$dest"
}

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
prepare_apt
case ${1:-} in
print-key) key ;;
build) build ;;
*) echo "usage: $0 print-key|build" >&2; exit 2 ;;
esac
