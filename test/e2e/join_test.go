//go:build e2e

package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skerry-io/skerry/test/lab"
)

// join runs edgelet join in a folder of its own and returns what it says.
func join(t *testing.T, args ...string) (string, error) {
	t.Helper()
	dir := t.TempDir()
	args = append(args, "--data-dir="+filepath.Join(dir, "data"), "--config="+filepath.Join(dir, "config.yaml"),
		"--runtime-endpoint="+site.Containerd.Endpoint, "--start=false")
	out, err := exec.CommandContext(t.Context(), filepath.Join(lab.Root(), "bin", "edgelet"), append([]string{"join"}, args...)...).CombinedOutput()
	return string(out), err
}

func TestJoinSaysWhatToDo(t *testing.T) {
	server := "https://" + shared.ProviderAddress()
	// token makes a token and returns the arguments of join.
	token := func(args ...string) []string {
		line, err := shared.Token(t.Context(), append(args, "--server="+server)...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(line)[2:]
	}
	used := token("--site=join-once")
	if out, err := join(t, used...); err != nil {
		t.Fatalf("a good token: %v: %s", err, out)
	}
	good := token()
	pin := good[len(good)-1]
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"a wrong pin":             {append(good[:len(good)-1:len(good)-1], "sha256:"+strings.Repeat("0", 64), "--site=x"), "nothing was sent"},
		"a used token":            {used, "token create"},
		"an unknown token":        {[]string{server, "--token=aaaaaa.bbbbbbbbbbbbbbbb", "--ca-cert-hash=" + pin, "--site=x"}, "token create"},
		"a name that is taken":    {append(good[:len(good):len(good)], "--site="+siteName), "--replace"},
		"a name that is no name":  {append(good[:len(good):len(good)], "--site=Not_A_Name"), "lower"},
		"an unreachable provider": {[]string{"https://" + shared.Address + ":1", "--token=aaaaaa.bbbbbbbbbbbbbbbb", "--ca-cert-hash=" + pin, "--site=x"}, "reach"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := join(t, tt.args...)
			if err == nil || !strings.Contains(out, tt.want) {
				t.Errorf("%v, says %q; want something about %q", err, out, tt.want)
			}
			t.Log(strings.TrimSpace(out))
		})
	}
}

func TestRevokedSiteIsCutOff(t *testing.T) {
	provider := func(args ...string) {
		t.Helper()
		args = append(args, "--kubeconfig="+shared.Cluster.Kubeconfig)
		if out, err := exec.CommandContext(t.Context(), filepath.Join(lab.Root(), "bin", "skerry-provider"), args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	connected := func(want bool) func() error {
		return func() error {
			_, err := shared.Kubectl(t.Context(), "get", "--raw", "/api/v1/nodes/"+siteName+"/proxy/healthz")
			if (err == nil) != want {
				return fmt.Errorf("healthz through the tunnel: %v", err)
			}
			return nil
		}
	}
	provider("site", "revoke", siteName, "--why=stolen")
	defer provider("site", "restore", siteName)
	start := time.Now()
	until(t, 10*time.Second, "the session has ended", connected(false))
	t.Logf("cut off after %s", time.Since(start).Round(10*time.Millisecond))
	until(t, 20*time.Second, "the edgelet knows why", func() error {
		out, err := site.Command(t.Context(), "status").CombinedOutput()
		if err == nil && !strings.Contains(string(out), "stolen") {
			err = fmt.Errorf("edgelet status:\n%s", out)
		}
		return err
	})
	provider("site", "restore", siteName)
	until(t, 90*time.Second, "the site is back", connected(true))
}
