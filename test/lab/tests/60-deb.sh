# The package under systemd: installs, serves, runs a VM; an upgrade and a crash leave the guest alone; removal
# is clean.
# lab: systemd
set -euo pipefail
deb=$(ls /lab/in/dist/*.deb 2>/dev/null | head -1)
[ -n "$deb" ] || { echo "dist/ holds no package: run make deb"; exit 77; }
guest=/lab/in/guest
say() { echo "--- $*"; }
hypervisor() { pgrep -f 'qemu-system-x86_64.*mvirt' | head -1; }
wait_up() { for i in $(seq 300); do mvirt plugin ls -o json 2>/dev/null | jq -e '[(.plugins? // .)[] | .state] | length == 4 and all(. == "up" or . == "degraded")' >/dev/null && return; sleep 0.3; done; mvirt status; return 1; }

say install
modprobe kvm-amd || true
dpkg -i "$deb"
systemctl is-active mvirtd
wait_up
mvirt status
systemd-analyze security --no-pager mvirtd.service | tail -1

# A plugin starts in milliseconds, but not where the machine itself is emulated and busy.
sed -i 's/^\(\[plugin\..*\]\)$/\1\nstart_timeout = "2m"\nhealth_deadline = "30s"/' /etc/mvirt/mvirt.toml
mvirtd --check-config
systemctl restart mvirtd
wait_up

say a VM
mvirt template import guest "$guest/root.qcow2"
mvirt network create lan --mode nat --subnet 10.77.0.0/24 --host-access
mvirt vm create web --template guest --disk 256M --memory 256M --network lan --kernel "$guest/vmlinuz" \
	--initramfs "$guest/initramfs.cpio" --cmdline "console=ttyS0 quiet root=LABEL=mvirt-root" --start
for i in $(seq 200); do mvirt vm console web --log 2>/dev/null | grep -q 'mvirt-guest: ready' && break; sleep 0.5; done
mvirt vm console web --log | grep 'mvirt-guest: ready'
pid=$(mvirt vm show web -o json | jq -r .pid)
[ -d "/proc/$pid" ]
same() { [ "$(mvirt vm show web -o json | jq -r .pid)" = "$pid" ] && [ -d "/proc/$pid" ] && mvirt vm ls | grep -q 'web.*running'; }

say restart of the service
systemctl restart mvirtd
wait_up
same
say upgrade
dpkg -i "$deb"
wait_up
same
say kill -9 of the launcher
kill -9 "$(systemctl show -p MainPID --value mvirtd)"
sleep 2
wait_up
same
ping -c 2 -W 5 10.77.0.2

say removal with a VM running leaves it
dpkg -r mvirt
[ -d "/proc/$pid" ]
[ ! -e /usr/sbin/mvirtd ]
dpkg -i "$deb"
wait_up
same

say clean removal
mvirt vm rm web --force
mvirt network rm lan
mvirt template rm guest
dpkg -P mvirt 2>&1 | tee /tmp/purge.log
[ ! -e /etc/mvirt ] && [ ! -e /usr/bin/mvirt ]
! pgrep -f qemu-system || { pgrep -af qemu-system; exit 1; }
! ip netns | grep mvirt
grep -q 'holds volumes and definitions' /tmp/purge.log
say done
