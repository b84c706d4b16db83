package guest

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

func TestCPIO(t *testing.T) {
	tr := tree{}
	tr.file("etc/a", 0o644, []byte("content"))
	tr.file("etc/long-name-to-pad", 0o755, []byte("x"))
	tr.link("etc/l", "a")
	var b bytes.Buffer
	if err := tr.writeCPIO(&b); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cpio", "-tv", "--quiet")
	cmd.Stdin = bytes.NewReader(b.Bytes())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio does not read it: %v: %s", err, out)
	}
	for _, want := range []string{"etc/a\n", "etc/l -> a\n", "etc/long-name-to-pad\n", "drwxr-xr-x"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func TestClosure(t *testing.T) {
	if _, err := closure(map[string][]byte{}, []string{"virtio_blk"}); err == nil {
		t.Error("a module that is not there is not missed")
	}
	if _, err := closure(map[string][]byte{"virtio_blk": []byte("no ELF")}, []string{"virtio_blk"}); err == nil {
		t.Error("junk was taken for a module")
	}
}
