package conformance_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/sdk/conformance"
	"github.com/mvirt/mvirt/sdk/sdktest/fakeplugin"
	"github.com/mvirt/mvirt/sdk/service"
)

func TestMain(m *testing.M) {
	zooHook()
	fakeplugin.Hook()
	goleak.VerifyTestMain(m)
}

func config(t *testing.T, kind service.Kind) conformance.Config {
	return conformance.Config{Command: []string{"/proc/self/exe", "--data-dir", t.TempDir()}, Env: []string{fakeplugin.Env + "=" + string(kind)},
		ImportURL: true, Kernel: os.Args[0], BootMarker: "login: "}
}

func TestStorage(t *testing.T) { conformance.RunStorage(t, config(t, service.KindStorage)) }
func TestNet(t *testing.T)     { conformance.RunNet(t, config(t, service.KindNet)) }
func TestVMM(t *testing.T)     { conformance.RunVMM(t, config(t, service.KindVMM)) }
func TestLog(t *testing.T)     { conformance.RunLog(t, config(t, service.KindLog)) }
