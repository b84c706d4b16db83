package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/test/system"
)

// certificates makes an authority, a server's certificate for 127.0.0.1 and clients' by their common names.
func certificates(t *testing.T, dir string, clients ...string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range append([]string{"ca", "server"}, clients...) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		check(err)
		tpl := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
		switch name {
		case "ca":
			tpl.IsCA, tpl.BasicConstraintsValid, tpl.KeyUsage = true, true, x509.KeyUsageCertSign
			ca, caKey = tpl, key
		case "server":
			tpl.IPAddresses, tpl.ExtKeyUsage = []net.IP{net.IPv4(127, 0, 0, 1)}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		default:
			tpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}
		der, err := x509.CreateCertificate(rand.Reader, tpl, ca, &key.PublicKey, caKey)
		check(err)
		raw, err := x509.MarshalECPrivateKey(key)
		check(err)
		check(os.WriteFile(filepath.Join(dir, name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
		check(os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw}), 0o644))
	}
}

// freePort is a TCP port that nobody uses now.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// TestAccess tries roles by user, certificate and token with the real programs: on the socket and over TCP.
func TestAccess(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "e2e-tls-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	certificates(t, dir, "boss", "nobody")
	port := freePort(t)
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("s3cret\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("s3cret"))
	place := system.RootPlace("e2e-acc")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	defer system.Sweep(context.Background(), place)
	s, err := system.Start(ctx, system.Options{Place: place, Bin: shared.bin, Kinds: []string{"log", "storage", "vmm"}, Config: func(text string) string {
		text = strings.Replace(text, `socket_mode = "0660"`, `socket_mode = "0666"`, 1)
		return text + fmt.Sprintf(`
[tls]
listen = "127.0.0.1:%d"
cert = %q
key = %q
client_ca = %q
[[access]]
name = "bosses"
role = "admin"
certs = ["cn:boss"]
[[access]]
name = "lookers"
role = "viewer"
users = ["mvirt-worker"]
[[access]]
name = "one volume"
role = "admin"
tokens = ["sha256:%s"]
objects = ["volume:mine"]
`, port, dir+"/server.pem", dir+"/server.key", dir+"/ca.pem", hex.EncodeToString(sum[:]))
	}})
	if err != nil {
		t.Fatal(err)
	}
	remote := func(who string, args ...string) []string {
		return append([]string{"--host", fmt.Sprintf("127.0.0.1:%d", port), "--tls-cert", dir + "/" + who + ".pem", "--tls-key", dir + "/" + who + ".key", "--tls-ca", dir + "/ca.pem"}, args...)
	}
	ok := func(args ...string) string {
		t.Helper()
		out, err := s.CLI(ctx, args...)
		if err != nil {
			t.Error(err)
		}
		return out
	}
	denied := func(what string, out []byte, err error) {
		t.Helper()
		if err == nil || !strings.Contains(string(out)+err.Error(), "you may not") && !strings.Contains(string(out)+err.Error(), "nothing is granted") {
			t.Errorf("%s: %s %v", what, out, err)
		}
	}
	ok("volume", "create", "mine", "--size", "1M")
	ok(remote("boss", "volume", "create", "other", "--size", "1M")...)
	_, err = s.CLI(ctx, remote("nobody", "volume", "ls")...)
	denied("a certificate without a grant", nil, err)
	if _, err := s.CLI(ctx, remote("boss", "template", "import", "x", token)...); err == nil || !strings.Contains(err.Error(), "own host") {
		t.Errorf("a file over TCP: %v", err)
	}
	if out := ok("--token-file", token, "volume", "ls", "-o", "name"); strings.TrimSpace(out) != "mine" {
		t.Errorf("by token: %q", out)
	}
	_, err = s.CLI(ctx, "--token-file", token, "volume", "rm", "other")
	denied("a volume that the token does not hold", nil, err)
	cred := looker(t)
	as := func(args ...string) ([]byte, error) {
		cmd := s.Command(ctx, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
		return cmd.CombinedOutput()
	}
	if out, err := as("volume", "ls"); err != nil || !strings.Contains(string(out), "other") {
		t.Errorf("a viewer looks: %s %v", out, err)
	}
	out, err := as("volume", "rm", "mine")
	denied("a viewer deletes", out, err)
	cred = &syscall.Credential{Uid: 65534, Gid: 65534}
	out, err = as("volume", "ls")
	denied("a user without a grant", out, err)
	ok("--token-file", token, "volume", "rm", "mine")
	ok(remote("boss", "volume", "rm", "other")...)
	audit := ok("logs", "--level-only", "audit", "--all", "-o", "json")
	for _, want := range []string{`"who":"cn:boss"`, `"who":"cn:nobody"`, `"who":"root by token one volume"`, `"who":"mvirt-worker"`, `"outcome":"refused"`} {
		if !strings.Contains(strings.ReplaceAll(audit, `": "`, `":"`), want) {
			t.Errorf("the audit trail lacks %s:\n%s", want, audit)
		}
	}
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// looker is the user mvirt-worker.
func looker(t *testing.T) *syscall.Credential {
	t.Helper()
	c := &syscall.Credential{}
	for flag, to := range map[string]*uint32{"-u": &c.Uid, "-g": &c.Gid} {
		out, err := exec.Command("id", flag, "mvirt-worker").Output()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(out), to); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// TestFrozenPlugin stops each plugin in turn: lists of what the others have answer as always, and a call that
// needs the frozen one fails within a bounded time instead of hanging.
func TestFrozenPlugin(t *testing.T) {
	s := shared.sys
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	names := map[string]string{"storage": "mvirt-dir", "net": "mvirt-net", "vmm": "mvirt-qemu", "log": "mvirt-log"}
	lists := map[string][]string{"storage": {"volume", "ls"}, "net": {"network", "ls"}, "vmm": {"vm", "ls"}, "log": {"logs", "stats"}}
	for frozen, name := range names {
		procs, err := system.Processes(s.Place)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range procs {
			if p.Name == name && p.User != "mvirt-worker" {
				if err := syscall.Kill(p.PID, syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				defer syscall.Kill(p.PID, syscall.SIGCONT)
			}
		}
		// The health check finds it after fifteen seconds and starts another; these calls come before and after.
		for kind, args := range lists {
			begin := time.Now()
			lctx, cancel := context.WithTimeout(ctx, time.Minute)
			_, err := s.CLI(lctx, args...)
			cancel()
			took := time.Since(begin)
			t.Logf("%s frozen: mvirt %s after %v: %v", frozen, strings.Join(args, " "), took.Round(time.Millisecond), err)
			if kind != frozen && (err != nil || took > 10*time.Second) {
				t.Errorf("%s frozen: mvirt %s took %v: %v", frozen, strings.Join(args, " "), took, err)
			}
			if took > 45*time.Second {
				t.Errorf("%s frozen: mvirt %s took %v", frozen, strings.Join(args, " "), took)
			}
		}
		if err := s.WaitUp(ctx, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
}
