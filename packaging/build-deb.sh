#!/bin/sh
# Builds dist/mvirt_<version>_<arch>.deb from bin/, with dpkg-deb alone. `make deb` calls it.
set -eu
cd "$(dirname "$0")/.."
version=${VERSION:-0.1.0}
arch=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
put() { install -D -m "$1" "$2" "$root/$3"; }
put 0755 bin/mvirtd usr/sbin/mvirtd
put 0755 bin/mvirt usr/bin/mvirt
for b in bin/mvirt-*; do
	put 0755 "$b" "usr/lib/mvirt/$(basename "$b")"
done
put 0644 core/internal/config/example.toml etc/mvirt/mvirt.toml
put 0644 packaging/mvirtd.service lib/systemd/system/mvirtd.service
put 0644 packaging/sysusers.conf usr/lib/sysusers.d/mvirt.conf
for s in bash:usr/share/bash-completion/completions/mvirt zsh:usr/share/zsh/vendor-completions/_mvirt; do
	install -d "$root/$(dirname "${s#*:}")"
	bin/mvirt completion "${s%%:*}" >"$root/${s#*:}"
	chmod 644 "$root/${s#*:}"
done
for d in docs/*.md README.md; do [ -e "$d" ] && put 0644 "$d" "usr/share/doc/mvirt/$(basename "$d")"; done
install -d "$root/DEBIAN"
for s in postinst prerm postrm; do install -m 0755 packaging/debian/$s "$root/DEBIAN/$s"; done
echo /etc/mvirt/mvirt.toml >"$root/DEBIAN/conffiles"
size=$(du -sk --exclude=DEBIAN "$root" | cut -f1)
cat >"$root/DEBIAN/control" <<C
Package: mvirt
Version: $version
Architecture: $arch
Maintainer: mvirt maintainers <maintainers@mvirt.invalid>
Installed-Size: $size
Depends: libc6, passwd, qemu-system-x86, nftables
Suggests: zfsutils-linux
Section: admin
Priority: optional
Description: small, fast, privilege-separated VM manager
 A supervisor starts storage, network, hypervisor and log services as
 processes of their own, each with its own user and no more privileges than
 it needs. Virtual machines outlive all of them.
C
(cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)
mkdir -p dist
out=dist/mvirt_${version}_$arch.deb
dpkg-deb --root-owner-group --build -Zxz -z1 "$root" "$out" >/dev/null
echo "$out"
