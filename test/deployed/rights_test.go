//go:build e2e

package deployed

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/test/lab"
)

func rights(t *testing.T) {
	t.Run("no role that it has is all-powerful", boundRoles)
	t.Run("it may not", mayNot)
	t.Run("of certificates it may", signers)
	t.Run("it is refused", refused)
}

// boundRoles looks at all that is bound to the account.
func boundRoles(t *testing.T) {
	mine := func(subjects []rbacv1.Subject) bool {
		return slices.ContainsFunc(subjects, func(s rbacv1.Subject) bool {
			return s.Kind == rbacv1.ServiceAccountKind && s.Name == "skerry-provider" && s.Namespace == lab.Namespace
		})
	}
	rbac := admin.RbacV1()
	clusterBindings, err := rbac.ClusterRoleBindings().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, b := range clusterBindings.Items {
		if !mine(b.Subjects) {
			continue
		}
		found++
		role, err := rbac.ClusterRoles().Get(t.Context(), b.RoleRef.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		checkRules(t, role.Name, role.Rules)
	}
	if found == 0 {
		t.Error("nothing is bound: the test looks in the wrong place")
	}
	bindings, err := rbac.RoleBindings("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range bindings.Items {
		if mine(b.Subjects) && b.RoleRef.Kind != "Role" {
			t.Errorf("binding %s/%s is to the %s %s", b.Namespace, b.Name, b.RoleRef.Kind, b.RoleRef.Name)
		}
	}
}

// checkRules refuses wildcards, and rights by which an account gives itself more.
func checkRules(t *testing.T, role string, rules []rbacv1.PolicyRule) {
	t.Helper()
	if role == "cluster-admin" {
		t.Error("it is cluster-admin")
	}
	for _, rule := range rules {
		for _, word := range slices.Concat(rule.Verbs, rule.Resources, rule.APIGroups) {
			if slices.Contains([]string{"*", "escalate", "bind", "impersonate"}, word) {
				t.Errorf("%s: %q in %+v", role, word, rule)
			}
		}
	}
}

// mayNot asks the API server's authorizers.
func mayNot(t *testing.T) {
	canI := func(question ...string) string {
		t.Helper()
		// can-i ends with 1 when the answer is no.
		out, err := shared.Command(t.Context(), append([]string{"auth", "can-i", "--as=" + account}, question...)...).Output()
		if _, ok := err.(*exec.ExitError); err != nil && !ok {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	for name, question := range map[string][]string{
		"get secrets in default":       {"get", "secrets", "-n", "default"},
		"list secrets in default":      {"list", "secrets", "-n", "default"},
		"watch secrets everywhere":     {"watch", "secrets", "-A"},
		"get secrets in kube-system":   {"get", "secrets", "-n", "kube-system"},
		"get config maps in default":   {"get", "configmaps", "-n", "default"},
		"impersonate users":            {"impersonate", "users"},
		"impersonate groups":           {"impersonate", "groups"},
		"impersonate service accounts": {"impersonate", "serviceaccounts", "-A"},
		"create tokens of accounts":    {"create", "serviceaccounts", "--subresource=token", "-n", "default"},
		"create pods":                  {"create", "pods", "-n", "default"},
		"delete pods in its own name":  {"delete", "pods", "-n", "default"},
		"exec into pods":               {"create", "pods", "--subresource=exec", "-n", "default"},
		"delete nodes":                 {"delete", "nodes"},
		"bind roles":                   {"create", "clusterrolebindings"},
		"use the proxy of other nodes": {"get", "nodes", "--subresource=proxy"},
		"delete signing requests":      {"delete", "certificatesigningrequests"},
		"everything":                   {"*", "*"},
	} {
		t.Run(name, func(t *testing.T) {
			if answer := canI(question...); answer != "no" {
				t.Errorf("can-i %s: %q", strings.Join(question, " "), answer)
			}
		})
	}
	// Questions of the same kind with the other answer, so that a "no" means something.
	for _, question := range [][]string{
		{"get", "secrets", "-n", lab.Namespace},
		{"patch", "pods", "-n", "default"},
	} {
		if answer := canI(question...); answer != "yes" {
			t.Errorf("can-i %s: %q", strings.Join(question, " "), answer)
		}
	}
}

// signers asks about certificates, in the API, since kubectl knows no such resource.
func signers(t *testing.T) {
	for name, test := range map[string]struct {
		verb, signer string
		want         bool
	}{
		"approve its own serving certificate":    {"approve", "kubernetes.io/kubelet-serving", true},
		"sign certificates of sites":             {"sign", "skerry.io/edge-client", true},
		"sign serving certificates":              {"sign", "kubernetes.io/kubelet-serving", false},
		"approve clients of the API server":      {"approve", "kubernetes.io/kube-apiserver-client", false},
		"sign clients of the API server":         {"sign", "kubernetes.io/kube-apiserver-client", false},
		"approve kubelets as clients":            {"approve", "kubernetes.io/kube-apiserver-client-kubelet", false},
		"approve what any other signer may sign": {"approve", "example.com/any", false},
	} {
		t.Run(name, func(t *testing.T) {
			review, err := admin.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
				Spec: authorizationv1.SubjectAccessReviewSpec{User: account, ResourceAttributes: &authorizationv1.ResourceAttributes{
					Verb: test.verb, Group: "certificates.k8s.io", Resource: "signers", Name: test.signer,
				}},
			}, metav1.CreateOptions{})
			if err != nil || review.Status.Allowed != test.want {
				t.Errorf("allowed: %v, %v; want %v", review.Status.Allowed, err, test.want)
			}
		})
	}
}

// refused tries, with the account's own token.
func refused(t *testing.T) {
	token := strings.TrimSpace(kubectl(t, "-n", lab.Namespace, "create", "token", "skerry-provider"))
	// The administrator's kubeconfig has a client certificate, which would win.
	try := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), shared.Cluster.Kubectl, append([]string{"--kubeconfig=/dev/null",
			"--server=" + shared.Cluster.Server, "--certificate-authority=" + shared.Cluster.CA(), "--token=" + token}, args...)...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	asSite := "--as=system:node:" + siteName
	for name, args := range map[string][]string{
		"a secret in its own name":                     {"get", "secret", "used"},
		"secrets everywhere":                           {"get", "secrets", "-A"},
		"as the site, a secret that no pod there uses": {asSite, "get", "secret", "canary"},
		"as the site, all secrets":                     {asSite, "get", "secrets"},
		"as another node, a secret of the site":        {"--as=system:node:" + nodeName, "get", "secret", "used"},
		"as an administrator":                          {"--as=admin", "--as-group=system:masters", "get", "secret", "used"},
		"as somebody":                                  {"--as=alice", "get", "pods"},
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := try(args...); err == nil || !strings.Contains(out, "orbidden") {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	if out, err := try(asSite, "get", "secret", "used", "-o", "jsonpath={.metadata.name}"); err != nil || out != "used" {
		t.Errorf("as the site, a secret that its pod uses: %q, %v", out, err)
	}
}
