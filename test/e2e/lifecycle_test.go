//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// gone waits until a pod has left the API and returns how long that took.
func gone(t *testing.T, ns, pod string, limit time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	until(t, limit, pod+" has left the API", func() error {
		out, err := shared.Kubectl(t.Context(), "-n", ns, "get", "pod", pod, "--ignore-not-found", "-o", "name")
		if err == nil && out != "" {
			err = fmt.Errorf("it is there")
		}
		return err
	})
	return time.Since(start)
}

// running lists the sleepers' processes on this machine by a marker in their command line.
func running(t *testing.T, marker string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if line, err := os.ReadFile("/proc/" + e.Name() + "/cmdline"); err == nil && strings.HasPrefix(string(line), "sh\x00-c\x00: "+marker) {
			n++
		}
	}
	return n
}

// marked is a pod whose process can be found by marker; it ends by then.
func marked(name, marker, then string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  terminationGracePeriodSeconds: 30
  containers:
    - {name: main, image: $IMAGE, command: [sh, -c, ': %s; trap "%s" TERM; while true; do sleep 3600 & wait $!; done']}
`, name, marker, then)
}

func TestDeleteIsAsFastAsThePodEnds(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, marked("quick", "marker-quick", "exit"))
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/quick")
	kubectl(t, "-n", ns, "delete", "pod", "quick", "--wait=false")
	if took := gone(t, ns, "quick", 20*time.Second); took > 5*time.Second {
		t.Errorf("took %s of a grace of 30 s, though the process ended at once", took)
	}
	if n := running(t, "marker-quick"); n != 0 {
		t.Errorf("%d processes run", n)
	}
}

func TestForcedDeleteKillsAtOnce(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, marked("stubborn", "marker-stubborn", ":"))
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/stubborn")
	if n := running(t, "marker-stubborn"); n != 1 {
		t.Fatalf("%d processes run, want 1", n)
	}
	kubectl(t, "-n", ns, "delete", "pod", "stubborn", "--force", "--grace-period=0")
	until(t, 15*time.Second, "the process is gone", func() error {
		if n := running(t, "marker-stubborn"); n != 0 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
}

// TestSameNameAgain is what breaks virtual-kubelet's own controller: a forced
// delete and a new pod of the same name at once.
func TestSameNameAgain(t *testing.T) {
	ns := namespace(t)
	for i := range 5 {
		apply(t, ns, marked("again", fmt.Sprintf("marker-again-%d", i), ":"))
		kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/again")
		kubectl(t, "-n", ns, "delete", "pod", "again", "--force", "--grace-period=0")
	}
	apply(t, ns, marked("again", "marker-again-last", "exit"))
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/again")
	until(t, 20*time.Second, "only the last runs", func() error {
		for i := range 5 {
			if n := running(t, fmt.Sprintf("marker-again-%d", i)); n != 0 {
				return fmt.Errorf("%d of the %d. run", n, i+1)
			}
		}
		return nil
	})
	if n := running(t, "marker-again-last"); n != 1 {
		t.Errorf("%d processes of the last run", n)
	}
}

func TestDeleteWhileTheSiteIsOffline(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, marked("away", "marker-away", "exit"))
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/away")
	site.Link.Cut()
	defer site.Link.Heal()
	kubectl(t, "-n", ns, "delete", "pod", "away", "--wait=false", "--grace-period=1")
	// The pod may not leave the API while nobody knows whether it runs: watch it
	// for much longer than its grace.
	for deadline := time.Now().Add(6 * time.Second); time.Now().Before(deadline); {
		if out := kubectl(t, "-n", ns, "get", "pod", "away", "--ignore-not-found", "-o", "name"); out == "" {
			t.Fatal("the pod left the API while its site was offline")
		}
	}
	if n := running(t, "marker-away"); n != 1 {
		t.Fatalf("%d processes run offline, want 1", n)
	}
	site.Link.Heal()
	gone(t, ns, "away", 30*time.Second)
	if n := running(t, "marker-away"); n != 0 {
		t.Errorf("%d processes run after the delete", n)
	}
}

func TestAgentRestartTouchesNoContainer(t *testing.T) {
	ns := startSleeper(t)
	before := jsonpath(t, ns, "pod/sleeper", ".status.containerStatuses[0].containerID")
	site.Link.Cut()
	defer site.Link.Heal()
	site.Edgelet.Kill()
	if err := site.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, 20*time.Second, "the edgelet answers without a link", func() error {
		out, err := site.Command(t.Context(), "ps").CombinedOutput()
		if err == nil && !strings.Contains(string(out), "sleeper") {
			err = fmt.Errorf("edgelet ps: %s", out)
		}
		return err
	})
	if out, err := site.Command(t.Context(), "exec", "-n", ns, "sleeper", "--", "echo", "alive").CombinedOutput(); err != nil || string(out) != "alive\n" {
		t.Errorf("edgelet exec: %v: %s", err, out)
	}
	if out, err := site.Command(t.Context(), "logs", "-n", ns, "sleeper").CombinedOutput(); err != nil || string(out) != "started\n" {
		t.Errorf("edgelet logs: %v: %s", err, out)
	}
	site.Link.Heal()
	until(t, 30*time.Second, "kubectl reaches the pod", func() error {
		_, err := shared.Kubectl(t.Context(), "-n", ns, "exec", "sleeper", "--", "true")
		return err
	})
	if after := jsonpath(t, ns, "pod/sleeper", ".status.containerStatuses[0].containerID"); after != before {
		t.Errorf("container %s became %s", before, after)
	}
}

func TestOfflineSiteIsSaidToBe(t *testing.T) {
	ns := startSleeper(t)
	site.Link.Cut()
	defer site.Link.Heal()
	until(t, 45*time.Second, "kubectl logs says that the site is offline", func() error {
		_, err := shared.Kubectl(t.Context(), "-n", ns, "logs", "sleeper", "--request-timeout=5s")
		if err == nil || !strings.Contains(err.Error(), siteName) {
			return fmt.Errorf("kubectl logs: %v", err)
		}
		return nil
	})
	awaitPath(t, "default", "node/"+siteName, `.status.conditions[?(@.type=="EdgeConnected")].status`, "False")
	start := time.Now()
	site.Link.Heal()
	awaitPath(t, "default", "node/"+siteName, `.status.conditions[?(@.type=="EdgeConnected")].status`, "True")
	t.Logf("connected %s after the link healed", time.Since(start).Round(100*time.Millisecond))
}
