//go:build e2e

package arch

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSystemdUnit has systemd itself read the unit.
func TestSystemdUnit(t *testing.T) {
	unit, err := os.ReadFile(filepath.Join(root, "manifests", "systemd", "edgelet.service"))
	if err != nil {
		t.Fatal(err)
	}
	// The binary is elsewhere on this machine.
	file := filepath.Join(t.TempDir(), "edgelet.service")
	text := strings.Replace(string(unit), "/usr/local/bin/edgelet", "/bin/true", 1)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", file).CombinedOutput()
	if err != nil || strings.Contains(string(out), "edgelet.service:") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, line := range []string{"Type=notify", "KillMode=process", "Restart=always"} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no %s: pods would not survive the agent", line)
		}
	}
}
