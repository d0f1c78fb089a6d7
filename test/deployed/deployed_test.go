//go:build e2e

package deployed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/test/lab"
)

const provider = "app.kubernetes.io/name=skerry-provider"

// TestDeployed goes the way of a person who installs Skerry; each step needs those
// before it.
func TestDeployed(t *testing.T) {
	t.Cleanup(func() { diagnose(t) })
	for _, step := range []struct {
		name string
		do   func(*testing.T)
	}{
		{"the manifests install a provider that becomes ready", install},
		{"the provider runs confined", confined},
		{"a site joins through the Service", join},
		{"a Deployment runs at the site", deploy},
		{"kubectl works on its pod", useKubectl},
		{"the provider's account can do no more than it must", rights},
		{"the provider's pod is replaced and nobody at the site notices", replace},
		{"the provider is upgraded and nobody at the site notices", upgrade},
	} {
		if !t.Run(step.name, step.do) {
			return
		}
	}
}

func install(t *testing.T) {
	kubectl(t, "apply", "-k", filepath.Join(lab.Root(), "manifests"))
	// What a load balancer's controller does once it has set up an address.
	kubectl(t, "-n", lab.Namespace, "patch", "service", "skerry-provider", "--subresource=status", "--type=merge",
		"-p", `{"status":{"loadBalancer":{"ingress":[{"ip":"`+balancer+`"}]}}}`)
	kubectl(t, "-n", lab.Namespace, "rollout", "status", "deployment/skerry-provider", "--timeout=180s")
	pod := onePod(t, lab.Namespace, provider)
	if pod.Spec.NodeName != nodeName || pod.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("on %s after %d restarts", pod.Spec.NodeName, pod.Status.ContainerStatuses[0].RestartCount)
	}
}

// confined looks at the process itself, not at what was asked for.
func confined(t *testing.T) {
	pod := onePod(t, lab.Namespace, provider)
	_, id, _ := strings.Cut(pod.Status.ContainerStatuses[0].ContainerID, "://")
	status, err := runtime(t, node).ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		PID         int `json:"pid"`
		RuntimeSpec struct {
			Root  struct{ Readonly bool }
			Linux struct {
				Resources struct{ Memory struct{ Limit int64 } }
			}
		} `json:"runtimeSpec"`
	}
	if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", info.PID))
	if err != nil {
		t.Fatal(err)
	}
	for name, line := range map[string]string{
		"an ordinary user":         "Uid:\t65532\t65532\t65532\t65532",
		"no capabilities":          "CapBnd:\t0000000000000000",
		"no way to get privileges": "NoNewPrivs:\t1",
		"system calls filtered":    "Seccomp:\t2",
	} {
		if !strings.Contains(string(data), line+"\n") {
			t.Errorf("%s: no %q in\n%s", name, line, data)
		}
	}
	if !info.RuntimeSpec.Root.Readonly || info.RuntimeSpec.Linux.Resources.Memory.Limit <= 0 {
		t.Errorf("root file system or memory not limited: %+v", info.RuntimeSpec)
	}
	c := pod.Spec.Containers[0]
	if c.ReadinessProbe == nil || c.LivenessProbe == nil {
		t.Error("a probe is missing")
	}
}

func join(t *testing.T) {
	line := strings.TrimSpace(kubectl(t, "-n", lab.Namespace, "exec", "deploy/skerry-provider", "--",
		"/skerry-provider", "token", "create", "--site", siteName))
	if want := "edgelet join https://" + balancer + " --token "; !strings.HasPrefix(line, want) {
		t.Fatalf("printed %q, want %q…", line, want)
	}
	var err error
	if site, err = shared.JoinSite(t.Context(), siteName, line); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "wait", "--for=create", "--timeout=60s", "node/"+siteName)
	kubectl(t, "wait", "--for=condition=Ready", "--timeout=60s", "node/"+siteName)
	// The API server reaches the site through the provider's pod.
	n, err := admin.CoreV1().Nodes().Get(t.Context(), siteName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: onePod(t, lab.Namespace, provider).Status.PodIP}
	if !slices.Contains(n.Status.Addresses, want) {
		t.Errorf("the Node is at %v, want the provider's pod, %v", n.Status.Addresses, want)
	}
}

// workload serves a Secret's value, which the site gets because its pod names it.
const workload = `
apiVersion: v1
kind: Secret
metadata: {name: used}
stringData: {word: tide}
---
apiVersion: v1
kind: Secret
metadata: {name: canary}
stringData: {word: canary}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {skerry.io/site: ` + siteName + `}
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: ` + lab.Busybox + `
          command: [sh, -c, 'mkdir /www; echo $WORD > /www/index.html; echo serving; exec httpd -f -p 8080 -h /www']
          env: [{name: WORD, valueFrom: {secretKeyRef: {name: used, key: word}}}]
          readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
`

func deploy(t *testing.T) {
	if _, err := shared.KubectlInput(t.Context(), workload, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "rollout", "status", "deployment/web", "--timeout=120s")
	if pod := onePod(t, "default", "app=web"); pod.Spec.NodeName != siteName {
		t.Errorf("the pod is on %s, want %s", pod.Spec.NodeName, siteName)
	}
}

func useKubectl(t *testing.T) {
	if out := kubectl(t, "logs", "deployment/web"); out != "serving\n" {
		t.Errorf("logs printed %q", out)
	}
	if out := kubectl(t, "exec", "deployment/web", "--", "hostname"); strings.TrimSpace(out) != onePod(t, "default", "app=web").Name {
		t.Errorf("exec printed %q", out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := shared.Command(ctx, "port-forward", "deployment/web", ":8080")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	var port int
	if _, err := fmt.Fscanf(out, "Forwarding from 127.0.0.1:%d -> 8080\n", &port); err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "tide\n" {
		t.Errorf("the forwarded port answered %q, %v", body, err)
	}
}

func replace(t *testing.T) {
	unnoticed(t, func() { kubectl(t, "-n", lab.Namespace, "delete", "pod", onePod(t, lab.Namespace, provider).Name) })
	// The new replica takes changes to the site, too.
	kubectl(t, "scale", "deployment/web", "--replicas=2")
	kubectl(t, "rollout", "status", "deployment/web", "--timeout=120s")
}

// upgrade has two replicas for a moment, as any new version of the manifests does.
func upgrade(t *testing.T) {
	unnoticed(t, func() { kubectl(t, "-n", lab.Namespace, "rollout", "restart", "deployment/skerry-provider") })
	kubectl(t, "scale", "deployment/web", "--replicas=1")
	kubectl(t, "wait", "--for=jsonpath={.status.replicas}=1", "deployment/web", "--timeout=60s")
	until(t, time.Minute, "one container is left at the site", func() error {
		if n := len(running(t)); n != 1 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
}

// unnoticed does something by which the provider's pod is replaced, and sees that
// the cloud comes back to the site and the site goes on as if nothing had been.
func unnoticed(t *testing.T, disturb func()) {
	t.Helper()
	before, containers := onePod(t, lab.Namespace, provider), running(t)
	if len(containers) == 0 {
		t.Fatal("nothing runs at the site")
	}
	began := time.Now()
	disturb()
	kubectl(t, "-n", lab.Namespace, "rollout", "status", "deployment/skerry-provider", "--timeout=180s")
	after := onePod(t, lab.Namespace, provider)
	if after.UID == before.UID {
		t.Fatal("the provider's pod is still the same")
	}
	t.Logf("a new provider is ready after %s", time.Since(began).Round(time.Millisecond))
	until(t, 2*time.Minute, "the site is Ready and reached through the new pod", func() error {
		n, err := admin.CoreV1().Nodes().Get(t.Context(), siteName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if at := n.Status.Addresses[0].Address; at != after.Status.PodIP {
			return fmt.Errorf("the Node is at %s, want %s", at, after.Status.PodIP)
		}
		return errors.Join(holds(n, corev1.NodeReady), holds(n, "EdgeConnected"))
	})
	t.Logf("the site is Ready after %s", time.Since(began).Round(time.Millisecond))
	if out := kubectl(t, "exec", "deployment/web", "--", "echo", "again"); out != "again\n" {
		t.Errorf("exec printed %q", out)
	}
	if now := running(t); !slices.Equal(now, containers) {
		t.Errorf("containers at the site: %v, before %v", now, containers)
	}
	pods, err := admin.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods.Items {
		c := pod.Status.ContainerStatuses[0]
		if !c.Ready || c.RestartCount != 0 || !slices.Contains(containers, strings.TrimPrefix(c.ContainerID, "containerd://")) {
			t.Errorf("pod %s: its status is %+v", pod.Name, c)
		}
	}
	select {
	case <-site.Edgelet.Done():
		t.Errorf("the edgelet has ended:\n%s", site.Edgelet.Tail())
	default:
	}
}

func holds(n *corev1.Node, condition corev1.NodeConditionType) error {
	for _, c := range n.Status.Conditions {
		if c.Type == condition && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return fmt.Errorf("%s does not hold: %+v", condition, n.Status.Conditions)
}

// running lists the containers that run at the site, as its runtime knows them.
func running(t *testing.T) (ids []string) {
	t.Helper()
	list, err := runtime(t, site.Containerd).ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list.Containers {
		ids = append(ids, c.Id)
	}
	slices.Sort(ids)
	return ids
}
