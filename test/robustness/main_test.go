//go:build e2e

package robustness

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/test/lab"
)

var (
	binaries = flag.String("bin", "", "folder of skerry-provider and edgelet; default bin at the root of the source tree")
	seed     = flag.Uint64("seed", 0, "of all that is random; default another each time")
)

// The lab that the tests share, and its sites.
var (
	shared *lab.Lab
	sites  []*lab.Site
	admin  *kubernetes.Clientset
)

// realSites is how many sites have an edgelet; with the hostile one there are ten.
const realSites = 9

func siteName(i int) string { return fmt.Sprintf("site-%d", i) }

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	fmt.Fprintf(os.Stderr, "seed: repeat with -seed=%d\n", *seed)
	var err error
	if shared, err = lab.Start(ctx, lab.Options{Net: 4, Bin: *binaries, Out: os.Stderr}); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	defer func() {
		if err := shared.Close(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			code = 1
		}
	}()
	if err := setUp(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		diagnose()
		return 1
	}
	if code = m.Run(); code != 0 {
		diagnose()
	}
	return code
}

func setUp(ctx context.Context) error {
	config, err := shared.Cluster.Config()
	if err != nil {
		return err
	}
	if admin, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	return shared.StartProvider(ctx)
}

// needSites adds sites until there are n, and waits until their Nodes are Ready.
func needSites(t *testing.T, n int) {
	t.Helper()
	for len(sites) < n {
		begun := time.Now()
		site, err := shared.AddSite(t.Context(), siteName(len(sites)))
		if err != nil {
			t.Fatal(err)
		}
		sites = append(sites, site)
		t.Logf("%s has joined in %.1f s", site.Name, time.Since(begun).Seconds())
	}
	for _, site := range sites {
		kubectl(t, "wait", "--for=create", "--timeout=60s", "node/"+site.Name)
		kubectl(t, "wait", "--for=condition=Ready", "--timeout=60s", "node/"+site.Name)
	}
}

// diagnose writes what is known of the nodes, and the ends of logs.
func diagnose() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	nodes, err := shared.Kubectl(ctx, "get", "nodes", "-o", "yaml", "--request-timeout=5s")
	fmt.Fprintln(os.Stderr, "--- nodes", err, "\n"+nodes[:min(len(nodes), 8000)])
	for _, name := range []string{"kube-scheduler", "kube-controller-manager"} {
		fmt.Fprintln(os.Stderr, "--- "+name+"\n"+shared.Cluster.Process(name).Tail())
	}
	if shared.Provider != nil {
		fmt.Fprintln(os.Stderr, "--- provider\n"+ending(shared.Provider))
	}
	for _, site := range sites[:min(len(sites), 2)] {
		if site.Edgelet != nil {
			fmt.Fprintln(os.Stderr, "--- edgelet "+site.Name+"\n"+ending(site.Edgelet))
		}
	}
}

// namespace makes a namespace for one test, and deletes it afterwards: that all its
// pods go is part of every test.
func namespace(t *testing.T) string {
	t.Helper()
	name := strings.ToLower(t.Name())
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

// apply applies a manifest in a namespace.
func apply(t *testing.T, namespace, manifest string) {
	t.Helper()
	if _, err := shared.KubectlInput(t.Context(), manifest, "-n", namespace, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// until waits for check to be nil.
func until(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	if err := shared.Until(t.Context(), limit, what, check); err != nil {
		t.Fatal(err)
	}
}
