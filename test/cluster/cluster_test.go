//go:build e2e

package cluster

import (
	"context"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// TestHardened sees that a cluster is as strict as the tests that run on it assume.
func TestHardened(t *testing.T) {
	c, err := Start(t.Context(), Options{Dir: t.TempDir(), Out: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	config, err := c.Config()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("an administrator is served", func(t *testing.T) {
		out, err := exec.Command(c.Kubectl, "--kubeconfig", c.Kubeconfig, "get", "namespaces").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "kube-system") {
			t.Errorf("kubectl get namespaces: %v\n%s", err, out)
		}
	})
	t.Run("nobody is refused", func(t *testing.T) {
		anonymous := kubernetes.NewForConfigOrDie(rest.AnonymousClientConfig(config))
		_, err := anonymous.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{})
		if !apierrors.IsUnauthorized(err) {
			t.Errorf("anonymous list: %v, want %d", err, http.StatusUnauthorized)
		}
	})
	t.Run("a node reads no secret that its pods do not use", func(t *testing.T) {
		admin := kubernetes.NewForConfigOrDie(config)
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "canary"}}
		if _, err := admin.CoreV1().Secrets("default").Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		node := rest.CopyConfig(config)
		node.Impersonate.UserName = "system:node:a"
		node.Impersonate.Groups = []string{"system:nodes"}
		_, err := kubernetes.NewForConfigOrDie(node).CoreV1().Secrets("default").Get(t.Context(), "canary", metav1.GetOptions{})
		if !apierrors.IsForbidden(err) {
			t.Errorf("secret read by a node: %v, want Forbidden", err)
		}
	})
	t.Run("the API server comes back after kill -9", func(t *testing.T) {
		c.Process("kube-apiserver").Kill()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := c.StartAPIServer(ctx); err != nil {
			t.Error(err)
		}
	})
}
