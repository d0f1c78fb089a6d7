//go:build e2e

package provider

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/test/cluster"
)

// control is the control plane that the tests of this file share; admin is an
// administrator of it and account the provider's own service account, with the
// rights of manifests/rbac and no more.
var (
	control *cluster.Cluster
	admin   kubernetes.Interface
	account *rest.Config
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "provider-e2e-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if control, err = cluster.Start(ctx, cluster.Options{Dir: dir, Out: os.Stderr}); err != nil {
		return 1, err
	}
	defer control.Stop()
	config, err := control.Config()
	if err != nil {
		return 1, err
	}
	if admin, err = kubernetes.NewForConfig(config); err != nil {
		return 1, err
	}
	out, err := exec.Command(control.Kubectl, "--kubeconfig", control.Kubeconfig, "apply", "-k", "../manifests/rbac").CombinedOutput()
	if err != nil {
		return 1, fmt.Errorf("apply manifests/rbac: %w: %s", err, out)
	}
	token, err := admin.CoreV1().ServiceAccounts("skerry-system").CreateToken(ctx, "skerry-provider",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: new(int64(7200))}}, metav1.CreateOptions{})
	if err != nil {
		return 1, err
	}
	account = rest.AnonymousClientConfig(config)
	account.BearerToken = token.Status.Token
	return m.Run(), nil
}

// startProvider runs a provider against the control plane until the test ends.
func startProvider(t *testing.T, replica string, change ...func(*Config)) *Provider {
	t.Helper()
	config := Config{Kubernetes: account, Namespace: "skerry-system", Replica: replica, Address: "10.9.8.7", Ports: fixedPort{}, Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))}
	for _, c := range change {
		c(&config)
	}
	p, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return p
}

type fixedPort struct{}

func (fixedPort) Port(string) (int32, error) { return 20001, nil }

// namespaceFor makes a namespace that is ready for pods.
func namespaceFor(t *testing.T) string {
	t.Helper()
	ns, err := admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the namespace has a service account", func() bool {
		_, err := admin.CoreV1().ServiceAccounts(ns.Name).Get(t.Context(), "default", metav1.GetOptions{})
		return err == nil
	})
	return ns.Name
}

func createPod(t *testing.T, namespace, name, site string, change ...func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			NodeSelector: map[string]string{LabelSite: site}, TerminationGracePeriodSeconds: new(int64(20)),
			Containers: []corev1.Container{{Name: "main", Image: "example.com/app"}},
		},
	}
	for _, c := range change {
		c(pod)
	}
	pod, err := admin.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func getPod(t *testing.T, namespace, name string) *corev1.Pod {
	t.Helper()
	pod, err := admin.CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func awaitReady(t *testing.T, namespace, name string) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	eventually(t, "pod "+name+" is Ready", func() bool {
		pod = getPod(t, namespace, name)
		c := podCondition(pod.Status.Conditions, corev1.PodReady)
		return c != nil && c.Status == corev1.ConditionTrue
	})
	return pod
}

func deletePod(t *testing.T, namespace, name string, grace *int64) {
	t.Helper()
	if err := admin.CoreV1().Pods(namespace).Delete(t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: grace}); err != nil {
		t.Fatal(err)
	}
}

func TestNodeOfASiteIsReadyWithItsTrueStatus(t *testing.T) {
	p := startProvider(t, "replica-node")
	f := newFakeSite("node-site")
	f.connect(t, p)
	var node *corev1.Node
	eventually(t, "the node is Ready and without taints", func() bool {
		var err error
		if node, err = admin.CoreV1().Nodes().Get(t.Context(), "node-site", metav1.GetOptions{}); err != nil {
			return false
		}
		c := nodeCondition(node.Status.Conditions, corev1.NodeReady)
		return c != nil && c.Status == corev1.ConditionTrue && len(node.Spec.Taints) == 0
	})
	for key, want := range map[string]string{
		LabelSite: "node-site", "type": "virtual-kubelet", "kubernetes.io/hostname": "node-site", "kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64",
		"node-role.kubernetes.io/edge": "", "rack": "7",
	} {
		if got, ok := node.Labels[key]; !ok || got != want {
			t.Errorf("label %s = %q, want %q", key, got, want)
		}
	}
	if node.Spec.ProviderID != "skerry://node-site" {
		t.Errorf("providerID = %q", node.Spec.ProviderID)
	}
	if a := node.Status.Addresses; len(a) != 1 || a[0].Type != corev1.NodeInternalIP || a[0].Address != "10.9.8.7" || node.Status.DaemonEndpoints.KubeletEndpoint.Port != 20001 {
		t.Errorf("addresses = %v, port = %d", a, node.Status.DaemonEndpoints.KubeletEndpoint.Port)
	}
	if v := node.Status.NodeInfo.KubeletVersion; v != kubernetesVersion+"-skerry-dev" {
		t.Errorf("kubeletVersion = %q", v)
	}
	if c := nodeCondition(node.Status.Conditions, EdgeConnected); c == nil || c.Status != corev1.ConditionTrue || c.Reason == "" {
		t.Errorf("EdgeConnected = %v", c)
	}
	eventually(t, "the node's lease is held", func() bool {
		lease, err := admin.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(t.Context(), "node-site", metav1.GetOptions{})
		return err == nil && lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity == "node-site"
	})
	t.Run("and EdgeConnected is false when the session ends", func(t *testing.T) {
		f.session.Close()
		eventually(t, "EdgeConnected is false", func() bool {
			node, err := admin.CoreV1().Nodes().Get(t.Context(), "node-site", metav1.GetOptions{})
			c := nodeCondition(node.Status.Conditions, EdgeConnected)
			return err == nil && c.Status == corev1.ConditionFalse
		})
		_, err := p.Site("node-site")
		if want := "site node-site is disconnected since "; err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("Site = %v, want %q…", err, want)
		}
	})
}

func TestPodRunsAtItsSiteWithAllThatItRefersTo(t *testing.T) {
	p := startProvider(t, "replica-pod")
	f := newFakeSite("pod-site")
	f.runs = true
	f.connect(t, p)
	ns := namespaceFor(t)
	if _, err := admin.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "key"}, StringData: map[string]string{"k": "one"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	pod := createPod(t, ns, "web", "pod-site", func(pod *corev1.Pod) {
		pod.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "key"}}},
			{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}, Optional: new(true)}}}
	})
	ready := awaitReady(t, ns, "web")
	t.Logf("create to Ready: %v", time.Since(begun))
	if ready.Status.HostIP != "192.168.7.7" || ready.Status.PodIP != "10.1.2.3" || podCondition(ready.Status.Conditions, corev1.PodScheduled) == nil {
		t.Errorf("status = %+v", ready.Status)
	}
	secret := edge.Key{Kind: edge.KindSecret, Namespace: ns, Name: "key"}
	valueOf := func() string {
		o, ok := f.has(secret)
		var s corev1.Secret
		if !ok || o.Decode(&s) != nil {
			return ""
		}
		return string(s.Data["k"])
	}
	if valueOf() != "one" {
		t.Errorf("secret at the site = %q", valueOf())
	}
	for _, key := range []edge.Key{{Kind: edge.KindCluster}, {Kind: edge.KindNode, Name: "pod-site"}, {Kind: edge.KindServices, Namespace: ns}, {Kind: edge.KindConfigMap, Namespace: ns, Name: "kube-root-ca.crt"}} {
		if o, ok := f.has(key); !ok || o.Absent {
			t.Errorf("site holds %s: %v, absent %v", key, ok, o.Absent)
		}
	}
	if o, ok := f.has(edge.Key{Kind: edge.KindConfigMap, Namespace: ns, Name: "none"}); !ok || !o.Absent {
		t.Errorf("optional ConfigMap: held %v, %+v", ok, o)
	}
	var token edge.Token
	o, ok := f.has(edge.Key{Kind: edge.KindToken, Namespace: ns, Name: edge.TokenName("default", "", 3607), UID: pod.UID})
	if !ok || o.Decode(&token) != nil || token.Token == "" {
		t.Errorf("token: held %v, %v", ok, token.Expires)
	}
	var services []edge.Service
	o, _ = f.has(edge.Key{Kind: edge.KindServices, Namespace: ns})
	if err := o.Decode(&services); err != nil || len(services) != 1 || services[0].Name != "kubernetes" {
		t.Errorf("services = %v, %v", services, err)
	}

	t.Run("a changed Secret follows within a second", func(t *testing.T) {
		begun := time.Now()
		if _, err := admin.CoreV1().Secrets(ns).Patch(t.Context(), "key", types.MergePatchType, []byte(`{"stringData":{"k":"two"}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the new value is at the site", func() bool { return valueOf() == "two" })
		if d := time.Since(begun); d > time.Second {
			t.Errorf("it took %v", d)
		}
	})
	t.Run("a ConfigMap that comes later follows too", func(t *testing.T) {
		if _, err := admin.CoreV1().ConfigMaps(ns).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "none"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is not absent any more", func() bool {
			o, _ := f.has(edge.Key{Kind: edge.KindConfigMap, Namespace: ns, Name: "none"})
			return !o.Absent
		})
	})
	t.Run("writing the status does not send the pod again", func(t *testing.T) {
		if n := f.upserts(podKey(pod)); n > 2 { // once, and once more when its tolerations are lifted
			t.Errorf("the pod was sent %d times", n)
		}
	})
	t.Run("the default tolerations are lifted", func(t *testing.T) {
		eventually(t, "no toleration has an end", func() bool {
			for _, toleration := range getPod(t, ns, "web").Spec.Tolerations {
				if toleration.TolerationSeconds != nil {
					return false
				}
			}
			return true
		})
	})
	t.Run("nothing of another site's is read", func(t *testing.T) {
		other := newFakeSite("other-site")
		other.connect(t, p)
		_, err := p.objects.get(as(t.Context(), "other-site"), secret)
		if !apierrors.IsForbidden(err) {
			t.Errorf("as the other site: %v, want Forbidden", err)
		}
		if _, err := p.objects.get(t.Context(), secret); !apierrors.IsForbidden(err) {
			t.Errorf("as the provider: %v, want Forbidden", err)
		}
	})
	t.Run("deleting it leaves nothing at the site", func(t *testing.T) {
		deletePod(t, ns, "web", nil)
		eventually(t, "the site holds nothing of the namespace", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			for key := range f.held {
				if key.Namespace == ns {
					return false
				}
			}
			return true
		})
	})
}
