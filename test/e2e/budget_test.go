//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"os"
	"testing"
	"time"
)

// resident is the resident memory of the edgelet in KiB.
func resident(t *testing.T) int {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", site.Edgelet.PID()))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var kib int
		if n, _ := fmt.Sscanf(lines.Text(), "VmRSS: %d kB", &kib); n == 1 {
			return kib
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// TestMemoryBudget: at most 25 MiB resident when idle and 35 MiB with ten pods.
func TestMemoryBudget(t *testing.T) {
	ns := namespace(t)
	site.Edgelet.Kill()
	if err := site.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitConnected(t)
	settle := func(what string, limit int) {
		until(t, time.Minute, fmt.Sprintf("%s: at most %d KiB resident", what, limit), func() error {
			if kib := resident(t); kib > limit {
				return fmt.Errorf("%d KiB", kib)
			}
			return nil
		})
		t.Logf("%s: %.1f MiB resident", what, float64(resident(t))/1024)
	}
	settle("idle", 25<<10)
	apply(t, ns, `
apiVersion: apps/v1
kind: Deployment
metadata: {name: ten}
spec:
  replicas: 10
  selector: {matchLabels: {app: ten}}
  template:
    metadata: {labels: {app: ten}}
    spec:
      nodeSelector: {skerry.io/site: $SITE}
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: $IMAGE
          command: [sleep, "3600"]
          readinessProbe: {exec: {command: ["true"]}, periodSeconds: 10}
`)
	kubectl(t, "-n", ns, "rollout", "status", "deployment/ten", "--timeout=90s")
	settle("ten pods", 35<<10)
}

// awaitConnected waits until the provider serves the site's session.
func awaitConnected(t *testing.T) {
	t.Helper()
	until(t, 30*time.Second, "the provider reaches the site", func() error {
		_, err := shared.Kubectl(t.Context(), "get", "--raw", "/api/v1/nodes/"+siteName+"/proxy/healthz")
		return err
	})
}
