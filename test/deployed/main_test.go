//go:build e2e

package deployed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/test/cluster"
	"github.com/skerry-io/skerry/test/containerd"
	"github.com/skerry-io/skerry/test/lab"
)

const (
	siteName = "shop-1"
	nodeName = "cloud-1" // the cluster's own node
	balancer = "10.98.5.100"
	account  = "system:serviceaccount:" + lab.Namespace + ":skerry-provider"
)

// What the steps of the test share.
var (
	shared *lab.Lab
	node   *containerd.Instance // of the cluster's own node
	site   *lab.Site
	admin  *kubernetes.Clientset
)

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	defer func() {
		if err := tearDown(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintln(os.Stderr, "deployed:", err)
			code = 1
		}
	}()
	if err := setUp(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "deployed:", err)
		return 1
	}
	return m.Run()
}

// setUp starts a control plane and a node of its own that has the provider's image.
func setUp(ctx context.Context) (err error) {
	archive := filepath.Join(lab.Root(), "dist", "skerry-provider.oci.tar")
	if _, err := os.Stat(archive); err != nil {
		return fmt.Errorf("the image of the provider: %w; run make images", err)
	}
	if shared, err = lab.Start(ctx, lab.Options{Net: 5, Out: os.Stderr}); err != nil {
		return err
	}
	config, err := shared.Cluster.Config()
	if err != nil {
		return err
	}
	if admin, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	node, err = containerd.Start(ctx, containerd.Options{Dir: filepath.Join(shared.Dir, "n"), Archives: []string{archive}})
	if err != nil {
		return err
	}
	err = shared.Cluster.StartNode(ctx, cluster.Node{
		Name: nodeName, Runtime: node.Endpoint, Address: shared.Address, PodCIDR: node.Network.Subnet,
	})
	if err == nil {
		_, err = shared.Kubectl(ctx, "wait", "--for=condition=Ready", "--timeout=120s", "node/"+nodeName)
	}
	if err != nil {
		err = fmt.Errorf("%w%s", err, logs("kubelet", "kube-proxy"))
	}
	return err
}

// tearDown removes everything: the kubelet before its runtime, which it would fill
// with pods again.
func tearDown(ctx context.Context) error {
	var errs []error
	if shared == nil {
		return nil
	}
	if shared.Cluster != nil {
		errs = append(errs, shared.Cluster.StopNode(ctx))
	}
	if node != nil {
		errs = append(errs, node.Stop(ctx))
	}
	return errors.Join(append(errs, shared.Close(ctx))...)
}

// logs are the ends of the output of components.
func logs(components ...string) string {
	var b strings.Builder
	for _, name := range components {
		if p := shared.Cluster.Process(name); p != nil {
			fmt.Fprintf(&b, "\n--- %s\n%s", name, p.Tail())
		}
	}
	return b.String()
}

// diagnose says, after a failure, what the parts have last said.
func diagnose(t *testing.T) {
	if !t.Failed() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "nodes,pods,services,endpointslices", "-A", "-o", "wide"},
		{"-n", lab.Namespace, "describe", "pods"},
		{"-n", lab.Namespace, "logs", "deployment/skerry-provider", "--tail=30"},
	} {
		out, err := shared.Kubectl(ctx, args...)
		t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	t.Log(logs("kubelet", "kube-proxy"))
	if site != nil && site.Edgelet != nil {
		t.Logf("--- edgelet\n%s", site.Edgelet.Tail())
	}
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

// until waits for check to be nil.
func until(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	if err := shared.Until(t.Context(), limit, what, check); err != nil {
		t.Fatal(err)
	}
}

// onePod returns the pod of a Deployment that isn't on its way out.
func onePod(t *testing.T, namespace, selector string) corev1.Pod {
	t.Helper()
	list, err := admin.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		t.Fatal(err)
	}
	var found []corev1.Pod
	for _, pod := range list.Items {
		if pod.DeletionTimestamp == nil {
			found = append(found, pod)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d pods are %s, want 1", len(found), selector)
	}
	return found[0]
}

// runtime is a client of a containerd.
func runtime(t *testing.T, i *containerd.Instance) cri.RuntimeServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(i.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return cri.NewRuntimeServiceClient(conn)
}
