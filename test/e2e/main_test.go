//go:build e2e

// Package e2e tests Skerry as a user has it: real kubectl against a real control
// plane, the real provider and edgelets, pods on real containerd.
package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/test/lab"
)

// The lab that the tests share, and the name of the site in it.
var (
	shared *lab.Lab
	site   *lab.Site
)

const siteName = "shop-1"

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	var err error
	if shared, err = lab.Start(ctx, lab.Options{Net: 7, Out: os.Stderr}); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	defer func() {
		if err := shared.Close(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			code = 1
		}
	}()
	if err = shared.StartProvider(ctx); err == nil {
		site, err = shared.AddSite(ctx, siteName)
	}
	if err == nil {
		_, err = shared.Kubectl(ctx, "wait", "--for=create", "--timeout=60s", "node/"+siteName)
	}
	if err == nil {
		_, err = shared.Kubectl(ctx, "wait", "--for=condition=Ready", "--timeout=60s", "node/"+siteName)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		diagnose(os.Stderr.WriteString)
		return 1
	}
	if code = m.Run(); code != 0 {
		diagnose(os.Stderr.WriteString)
	}
	return code
}

// diagnose writes the ends of the logs of provider and edgelet.
func diagnose(write func(string) (int, error)) {
	if shared.Provider != nil {
		write("--- provider\n" + shared.Provider.Tail() + "\n")
	}
	if site != nil && site.Edgelet != nil {
		write("--- edgelet\n" + site.Edgelet.Tail() + "\n")
	}
}

// client is an administrator's client.
func client(t *testing.T) *kubernetes.Clientset {
	t.Helper()
	config, err := shared.Cluster.Config()
	if err != nil {
		t.Fatal(err)
	}
	return kubernetes.NewForConfigOrDie(config)
}

// namespace makes a namespace for one test and deletes it afterwards, waiting until
// its pods are gone: that they go is part of every test.
func namespace(t *testing.T) string {
	t.Helper()
	name := strings.ToLower(strings.ReplaceAll(strings.ReplaceAll(t.Name(), "/", "-"), "_", "-"))
	name = strings.Trim(name[:min(len(name), 60)], "-")
	kubectl(t, "create", "namespace", name)
	kubectl(t, "-n", name, "wait", "--for=create", "--timeout=30s", "serviceaccount/default")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if t.Failed() {
			out, _ := shared.Kubectl(ctx, "-n", name, "describe", "pods")
			t.Log(out)
		}
		if _, err := shared.Kubectl(ctx, "delete", "namespace", name, "--timeout=90s"); err != nil {
			t.Errorf("namespace does not go: %v", err)
		}
	})
	return name
}

// kubectl runs kubectl, fails the test if that fails, and returns its output.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := shared.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// apply applies a manifest in a namespace. $SITE and $IMAGE are replaced.
func apply(t *testing.T, namespace, manifest string) {
	t.Helper()
	if _, err := shared.KubectlInput(t.Context(), expand(manifest), "-n", namespace, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

func expand(manifest string) string {
	return strings.NewReplacer("$SITE", siteName, "$IMAGE", lab.Busybox).Replace(manifest)
}

// until waits for check to be nil.
func until(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	if err := shared.Until(t.Context(), limit, what, check); err != nil {
		t.Fatal(err)
	}
}

// jsonpath reads one value of an object, as pod/web.
func jsonpath(t *testing.T, namespace, object, path string) string {
	t.Helper()
	return kubectl(t, "-n", namespace, "get", object, "-o", "jsonpath={"+path+"}")
}

// awaitPath waits until a value of an object is want.
func awaitPath(t *testing.T, namespace, object, path, want string) {
	t.Helper()
	until(t, time.Minute, object+" "+path+" is "+want, func() error {
		out, err := shared.Kubectl(t.Context(), "-n", namespace, "get", object, "-o", "jsonpath={"+path+"}")
		if err == nil && out != want {
			err = fmt.Errorf("it is %q", out)
		}
		return err
	})
}

// sleeper is a pod that waits to be used by exec, and ends at once when told to.
const sleeper = `
apiVersion: v1
kind: Pod
metadata: {name: sleeper, labels: {app: sleeper}}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  terminationGracePeriodSeconds: 10
  containers:
    - name: main
      image: $IMAGE
      command: [sh, -c, 'trap exit TERM; echo started; while true; do sleep 3600 & wait $!; done']
`

// startSleeper makes a namespace with a ready sleeper in it.
func startSleeper(t *testing.T) (namespaceName string) {
	t.Helper()
	ns := namespace(t)
	apply(t, ns, sleeper)
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/sleeper")
	return ns
}
