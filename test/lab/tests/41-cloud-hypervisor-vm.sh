# A VM on a real cloud-hypervisor through the mvirt command, as installed: each program as its own user, network by
# vhost-user. Console, restart of the packet worker, memory snapshot, restore of the same VM and of a new one.
set -euo pipefail
ch=$(command -v cloud-hypervisor) || { echo "no cloud-hypervisor: name one in MVIRT_LAB_EXTRA"; exit 77; }
guest=/lab/in/guest
say() { echo "--- $*"; }
modprobe kvm-amd || true
modprobe tun || true
for u in mvirt mvirt-log mvirt-dir mvirt-vmm mvirt-worker; do
	useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin $u
done
getent group kvm >/dev/null || groupadd --system kvm
chown root:kvm /dev/kvm
chmod 660 /dev/kvm
install -d -m 755 /usr/lib/mvirt /etc/mvirt /var/lib/mvirt
for p in mvirt-log mvirt-dir mvirt-net mvirt-vmm; do install -m 755 "$(command -v $p)" /usr/lib/mvirt/$p; done
install -m 755 "$(command -v mvirtd)" /usr/sbin/mvirtd
install -m 755 "$ch" /usr/local/bin/cloud-hypervisor
# A plugin starts in milliseconds, but not where the machine itself is emulated and busy.
mvirtd --print-example-config | sed -e 's/mvirt-qemu/mvirt-vmm/; s/^\(\[plugin\..*\]\)$/\1\nstart_timeout = "2m"\nhealth_deadline = "30s"/' >/etc/mvirt/mvirt.toml
mvirtd --check-config
setsid mvirtd >/tmp/mvirtd.log 2>&1 </dev/null &
trap 'tail -40 /tmp/mvirtd.log; for v in web twin; do mvirt vm show $v || true; mvirt vm console $v --log | tail -20 || true; done; tail -20 /var/lib/mvirt/vmm/vm/*/hypervisor.log' ERR
for i in $(seq 300); do mvirt plugin ls -o json 2>/dev/null | jq -e '[(.plugins? // .)[] | .state] | length == 4 and all(. == "up" or . == "degraded")' >/dev/null && break; sleep 0.3; done
mvirt plugin ls

say create and start
mvirt template import guest "$guest/root.raw"
mvirt network create lan --nat --ipv4 10.77.0.0/24 --host-access
began=$(date +%s.%N)
mvirt vm create web --template guest --network lan --memory 192M --vsock 5 --kernel "$guest/vmlinuz" \
	--initramfs "$guest/initramfs.cpio" --cmdline "console=ttyS0 quiet root=LABEL=mvirt-root" --start
mvirt vm console web --read-only --replay all --until 'mvirt-guest: address eth0 10.77.0' --timeout 4m >/dev/null </dev/null
mvirt vm console web --read-only --replay all --until 'login:' --timeout 4m >/dev/null </dev/null
echo "started, with an address, after $(echo "$(date +%s.%N) $began" | awk '{ print $1 - $2 }') s"
mvirt vm show web
mvirt vm show web -o json | jq -e '.hypervisor | startswith("cloud-hypervisor")'
ip=$(mvirt vm show web -o json | jq -r '.nics[0].ipv4')
ls -la /run/mvirt/net* | head -20
ping -c 3 -W 10 "$ip"

say who runs as what, and holds no capability
plugin=$(pgrep -o -f '^/usr/lib/mvirt/mvirt-vmm|mvirt-vmm --data-dir')
hyper=$(mvirt vm show web -o json | jq -r .pid)
for p in $plugin $hyper; do
	echo "process $p: $(tr '\0' ' ' </proc/$p/cmdline | cut -c1-60)"
	grep -E '^(Uid|Gid|Groups|NoNewPrivs|Cap)' /proc/$p/status
	! grep -E '^Cap(Inh|Prm|Eff|Amb):' /proc/$p/status | grep -v 0000000000000000
	[ "$(awk '/^Uid/{print $2}' /proc/$p/status)" != 0 ]
done

# type LINE WANT: types a line at the guest's shell and waits for what it answers.
type_at() { printf '%s\n' "$2" | mvirt vm console "$1" --steal --replay 0 --until "$3" --timeout 2m >/dev/null; }
say console
type_at web root '/root # '
type_at web "X=remem''bered; echo before >/root/file; sync; echo is \$X" 'is remembered'

say 'the packet worker is killed: the network of the guest comes back by itself'
worker=$(pgrep -u mvirt-worker | head -1)
tr '\0' ' ' </proc/$worker/cmdline; echo
kill -9 "$worker"
for i in $(seq 60); do ping -c 1 -W 2 "$ip" >/dev/null && break; [ $i != 60 ]; done
ping -c 3 -W 10 "$ip"
[ "$(mvirt vm show web -o json | jq -r .pid)" = "$hyper" ]

say memory snapshot
mvirt vm snapshot create web warm
mvirt vm snapshot ls -o wide
mvirt snapshot ls
mvirt vm show web -o json | jq -e '.state == "running"'
type_at web "X=chan''ged; echo after >/root/file; sync; echo is \$X" 'is changed'
mvirt vm kill web

say the same VM goes on from there
mvirt vm restore web@warm
type_at web "echo is \$X \$(cat /root/file)" 'is remembered before'
ping -c 3 -W 10 "$ip"

say a new VM goes on from there
mvirt network create other --ipv4 10.78.0.0/24
mvirt vm restore web@warm --name twin --network other
type_at twin "echo is \$X \$(cat /root/file)" 'is remembered before'
mvirt vm ls
mvirt vm stop twin web --timeout 3m
mvirt vm ls
mvirt vm snapshot rm web@warm
mvirt vm rm twin web
! mvirt snapshot ls | grep warm
say done
