//go:build e2e

package robustness

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/edgelet/store"
	"github.com/skerry-io/skerry/test/lab"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

const hostileName = "hostile"

// A canary is a random text in a Secret, that can't be found by chance.
type canary string

func newCanary(t *testing.T) canary {
	var b [24]byte
	if _, err := rand.Read(b[:]); err != nil {
		t.Fatal(err)
	}
	return canary(hex.EncodeToString(b[:]))
}

// in reports whether data has the canary, plain or as Secrets are encoded.
func (c canary) in(data []byte) bool {
	return bytes.Contains(data, []byte(c)) || bytes.Contains(data, []byte(base64.StdEncoding.EncodeToString([]byte(c))))
}

// TestSitesAreApart runs ten sites in one provider, each with a Secret of its own
// that one pod of it refers to, and lets one of them try to get more than its own.
func TestSitesAreApart(t *testing.T) {
	needSites(t, realSites)
	ns := namespace(t)
	h := joinHostile(t, hostileName)
	h.connect(t)
	kubectl(t, "wait", "--for=create", "--timeout=30s", "node/"+hostileName)
	h.report(t, `{"node":{"seq":1,"capacity":{"cpu":"1","memory":"1Gi","pods":"10"},"allocatable":{"cpu":"1","memory":"1Gi","pods":"10"},"info":{"architecture":"amd64","operatingSystem":"linux"}}}`)

	canaries := map[string]canary{}
	for _, name := range append(realNames(), hostileName) {
		canaries[name] = newCanary(t)
		kubectl(t, "-n", ns, "create", "secret", "generic", "secret-of-"+name, "--from-literal=key="+string(canaries[name]))
		apply(t, ns, sleeper("pod-of-"+name, name, `
      env: [{name: KEY, valueFrom: {secretKeyRef: {name: secret-of-`+name+`, key: key}}}]
      volumeMounts: [{name: secret, mountPath: /secret}]
  volumes: [{name: secret, secret: {secretName: secret-of-`+name+`}}]
`))
	}
	for _, name := range realNames() {
		kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=90s", "pod/pod-of-"+name)
		if got := kubectl(t, "-n", ns, "exec", "pod-of-"+name, "--", "cat", "/secret/key"); got != string(canaries[name]) {
			t.Errorf("%s reads %q", name, got)
		}
	}
	until(t, 30*time.Second, "the hostile site has its own Secret", func() error {
		if !h.has(base64.StdEncoding.EncodeToString([]byte(canaries[hostileName]))) {
			return errors.New("it has not")
		}
		return nil
	})

	before := apiState(t, ns)
	t.Run("reports of others' pods", func(t *testing.T) { reportOthers(t, h, ns) })
	t.Run("claims to hold what is others'", func(t *testing.T) { claimOthers(t, h, ns) })
	t.Run("paths of the provider", func(t *testing.T) { askPaths(t, h, ns) })
	t.Run("certificate elsewhere", func(t *testing.T) { showCertificate(t, h) })
	for key, state := range apiState(t, ns) {
		if before[key] != state {
			t.Errorf("%s was changed\nfrom %s\nto   %s", key, before[key], state)
		}
		delete(before, key)
	}
	for key := range before {
		t.Errorf("%s is gone", key)
	}
	t.Run("what each site has", func(t *testing.T) {
		h.mu.Lock()
		defer h.mu.Unlock()
		for name, c := range canaries {
			if got := c.in(h.received.Bytes()); got != (name == hostileName) {
				t.Errorf("the hostile site has the canary of %s: %v", name, got)
			}
		}
		lookInto(t, ns, canaries)
	})
}

func realNames() (names []string) {
	for _, s := range sites[:realSites] {
		names = append(names, s.Name)
	}
	return names
}

// apiState is what may not change: the pods and nodes of the honest sites, the
// Secrets, and which events there are of them.
func apiState(t *testing.T, ns string) map[string]string {
	t.Helper()
	state := map[string]string{}
	pods, err := admin.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.Spec.NodeName != hostileName {
			data, _ := json.Marshal(p.Status)
			state["pod "+p.Name] = fmt.Sprint(p.UID, p.Labels, p.Annotations, p.OwnerReferences, p.Spec.NodeName, p.DeletionTimestamp, string(data))
		}
	}
	nodes, err := admin.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes.Items {
		if n.Name != hostileName {
			ready := ""
			for _, c := range n.Status.Conditions {
				ready += fmt.Sprint(c.Type, c.Status, c.Reason, " ")
			}
			state["node "+n.Name] = fmt.Sprint(n.UID, n.Labels, n.OwnerReferences, n.Spec, n.Status.Capacity, n.Status.Addresses, ready)
		}
	}
	events, err := admin.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		if strings.Contains(e.Reason, "Forged") || strings.Contains(e.Message, "Forged") {
			state["event "+e.Namespace+"/"+e.Name] = e.Message
		}
	}
	return state
}

// podOfFirst is the pod of the first honest site.
func podOfFirst(t *testing.T, ns string) *corev1.Pod {
	t.Helper()
	pod, err := admin.CoreV1().Pods(ns).Get(t.Context(), "pod-of-"+siteName(0), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func reportOthers(t *testing.T, h *hostile, ns string) {
	v := podOfFirst(t, ns)
	own, err := admin.CoreV1().Pods(ns).Get(t.Context(), "pod-of-"+hostileName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const status = `{"phase":"Failed","reason":"Forged","message":"Forged","podIP":"6.6.6.6","hostIP":"6.6.6.6","containerStatuses":[{"name":"main","restartCount":66,"state":{"terminated":{"exitCode":66}}}]}`
	seq := 1
	pod := func(uid types.UID, namespace, name, more string) {
		seq++
		h.report(t, fmt.Sprintf(`{"pods":[{"uid":%q,"namespace":%q,"name":%q,"seq":%d,"status":%s%s}]}`, uid, namespace, name, seq, status, more))
	}
	pod(v.UID, ns, v.Name, "")
	pod(v.UID, ns, v.Name, `,"gone":true`)
	pod(own.UID, ns, v.Name, `,"gone":true`)  // its own identity, another's name
	pod(v.UID, ns, own.Name, `,"gone":true`)  // the other way round
	pod("", ns, v.Name, `,"gone":true`)       // any of that name
	pod("forged", ns, v.Name, `,"gone":true`) // none
	pod(v.UID, "", v.Name, "")
	pod(v.UID, ns, "../"+ns+"/pods/"+v.Name, "")
	pod(v.UID, ns, v.Name+"/status", "")
	pod(own.UID, ns, own.Name, fmt.Sprintf(`,"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":%q,"uid":"x"}],"labels":{"forged":"yes"}},"spec":{"nodeName":%q}`, siteName(0), siteName(0)))
	event := func(namespace, kind, name string, uid types.UID) {
		seq++
		h.report(t, fmt.Sprintf(`{"events":[{"seq":%d,"object":{"kind":%q,"namespace":%q,"name":%q,"uid":%q},"type":"Warning","reason":"Forged","message":"Forged","firstTime":"2026-01-01T00:00:00Z","lastTime":"2026-01-01T00:00:00Z","count":1}]}`,
			seq, kind, namespace, name, uid))
	}
	event(ns, "Pod", v.Name, v.UID)
	event(ns, "Pod", v.Name, own.UID)
	event(ns, "Pod", v.Name, "forged")
	event("kube-system", "Pod", "forged", "forged")
	event("", "Node", siteName(0), types.UID(siteName(0)))
	event("kube-system", "Secret", "forged", "forged")
	seq++
	h.report(t, fmt.Sprintf(`{"node":{"seq":%d,"name":%q,"capacity":{"cpu":"1","memory":"1Gi","pods":"10"},"allocatable":{"cpu":"1","memory":"1Gi","pods":"10"},"addresses":["10.98.4.1","6.6.6.6"],
		"labels":{"skerry.io/site":%q,"kubernetes.io/hostname":%q,"node-role.kubernetes.io/control-plane":"","node.kubernetes.io/exclude-from-external-load-balancers":"no"},
		"info":{"architecture":"amd64","operatingSystem":"linux"}}}`, seq, siteName(0), siteName(0), siteName(0)))

	own, err = admin.CoreV1().Pods(ns).Get(t.Context(), own.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("its own pod, of which it has said that it failed: %v", err)
	}
	if own.Status.Phase != corev1.PodFailed || own.Status.Reason != "Forged" {
		t.Errorf("of its own pod it may say what it likes, but its phase is %s", own.Status.Phase) // else the test reports nothing
	}
	if len(own.OwnerReferences) > 0 || own.Labels["forged"] != "" || own.Spec.NodeName != hostileName {
		t.Errorf("its own pod has owners %v, labels %v, node %s", own.OwnerReferences, own.Labels, own.Spec.NodeName)
	}
	node, err := admin.CoreV1().Nodes().Get(t.Context(), hostileName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if node.Labels["skerry.io/site"] != hostileName || node.Labels[corev1.LabelHostname] != hostileName {
		t.Errorf("its node has labels %v", node.Labels)
	}
	if _, ok := node.Labels["node-role.kubernetes.io/control-plane"]; ok {
		t.Error("its node is a control plane")
	}
	for _, a := range node.Status.Addresses {
		if a.Address == "6.6.6.6" {
			t.Error("its node has an address by which the API server would go elsewhere")
		}
	}
}

// claimOthers pretends to hold others' objects, and to be unable to let go of them:
// what a site says it holds gives no right to it.
func claimOthers(t *testing.T, h *hostile, ns string) {
	v := podOfFirst(t, ns)
	forged := types.UID("forged-uid")
	claims := []edge.Held{
		{Key: edge.Key{Kind: edge.KindSecret, Namespace: ns, Name: "secret-of-" + siteName(0)}, Version: "1"},
		{Key: edge.Key{Kind: edge.KindPod, Namespace: ns, Name: v.Name, UID: v.UID}, Version: "1"},
		{Key: edge.Key{Kind: edge.KindPod, Namespace: ns, Name: v.Name, UID: forged}, Version: "1"},
		{Key: edge.Key{Kind: edge.KindPod, Namespace: "kube-system", Name: "forged", UID: forged}, Version: "1"},
		{Key: edge.Key{Kind: edge.KindToken, Namespace: ns, Name: edge.TokenName("default", "", 3600), UID: v.UID}, Version: edge.TokenVersion(time.Unix(0, 0), time.Unix(1, 0))},
		{Key: edge.Key{Kind: "Forged", Namespace: "../..", Name: "../../x", UID: "../x"}, Version: "1"},
	}
	seq := 100
	for _, refuse := range []error{errors.New("no"), nil} {
		h.claim(t, refuse, claims...)
		for range 20 { // at any moment of the exchange
			for _, object := range []string{
				fmt.Sprintf(`{"kind":"Pod","namespace":%q,"name":%q,"uid":%q}`, ns, v.Name, v.UID),
				fmt.Sprintf(`{"kind":"Pod","namespace":%q,"name":%q,"uid":%q}`, ns, v.Name, forged),
				fmt.Sprintf(`{"kind":"Pod","namespace":"kube-system","name":"forged","uid":%q}`, forged),
			} {
				seq++
				h.report(t, fmt.Sprintf(`{"events":[{"seq":%d,"object":%s,"type":"Warning","reason":"Forged","message":"Forged","firstTime":"2026-01-01T00:00:00Z","lastTime":"2026-01-01T00:00:00Z","count":1}]}`, seq, object))
			}
			pause(t.Context(), 25*time.Millisecond)
		}
	}
	h.claim(t, nil)
}

// askPaths asks for all that any part of the product serves anywhere. Only reports
// are for a site to send.
func askPaths(t *testing.T, h *hostile, ns string) {
	pod := ns + "/pod-of-" + siteName(0)
	for _, path := range []string{
		"/", "/healthz", "/readyz", "/metrics", "/configz", "/debug/pprof/", "/debug/pprof/heap",
		"/pods", "/runningpods/", "/stats/summary", "/metrics/resource", "/logs/", "/spec/",
		"/containerLogs/" + pod + "/main", "/exec/" + pod + "/main?command=id&output=1", "/attach/" + pod + "/main", "/portForward/" + pod, "/run/" + pod + "/main?cmd=id", "/checkpoint/" + pod + "/main",
		"/skerry/v1/inventory", "/skerry/v1/changes", "/skerry/v1/status", "/skerry/v1/report/../inventory", "/skerry/v1/",
		"/v1/ca", "/v1/time", "/v1/join", "/v1/renew", "/tunnel",
		"/api/v1/namespaces/" + ns + "/secrets", "/api/v1/namespaces/" + ns + "/secrets/secret-of-" + siteName(0), "/api", "/apis", "/version",
		"//api/v1/secrets", "/..%2f..%2fapi/v1/secrets", "/sites/" + siteName(0) + "/pods", "/nodes/" + siteName(0) + "/proxy/pods",
	} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodConnect, http.MethodOptions} {
			if status, text := h.ask(t.Context(), method, path, "{}"); status >= 200 && status < 400 && status != http.StatusMovedPermanently && status != http.StatusTemporaryRedirect {
				t.Errorf("%s %s: %d %.200s", method, path, status, text)
			}
		}
	}
	for _, body := range []string{"", "null", "[]", "{", `{"pods":[{}]}`, `{"pods":null,"events":[{}],"node":{}}`, `{"pods":"x"}`, strings.Repeat(`{"pods":[`, 10000), `"` + strings.Repeat("x", 17<<20)} {
		if status, text := h.ask(t.Context(), http.MethodPost, "/skerry/v1/report", body); status >= 500 {
			t.Errorf("report of %.40q: %d %.200s", body, status, text)
		}
	}
	if h.report(t, "{}"); h.session.Err() != nil {
		t.Errorf("its session has ended: %v", h.session.Err())
	}
}

// showCertificate shows the site's certificate to others than the tunnel.
func showCertificate(t *testing.T, h *hostile) {
	config := h.identity.TLSConfig(bootstrap.ServerName)
	request, err := config.GetClientCertificate(&tls.CertificateRequestInfo{Version: tls.VersionTLS13, SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}})
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify:   true, // what the server does with the certificate is what counts
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return request, nil },
	}}}
	defer client.CloseIdleConnections()
	node, err := admin.CoreV1().Nodes().Get(t.Context(), siteName(0), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	kubelet := "https://" + net.JoinHostPort(shared.Address, fmt.Sprint(node.Status.DaemonEndpoints.KubeletEndpoint.Port))
	for _, url := range []string{
		shared.Cluster.Server + "/api", shared.Cluster.Server + "/version", shared.Cluster.Server + "/api/v1/secrets",
		kubelet + "/pods", kubelet + "/metrics", kubelet + "/healthz",
	} {
		resp, err := client.Get(url)
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %s, want 401", url, resp.Status)
		}
	}
}

// lookInto looks for canaries in what the edgelets of the honest sites have in memory
// and in their stores.
func lookInto(t *testing.T, ns string, canaries map[string]canary) {
	for i, site := range sites[:realSites] {
		memory := dump(t, site.Edgelet.PID())
		raw, err := os.ReadFile(filepath.Join(site.Dir, "data", "edgelet.db"))
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range canaries {
			if got := c.in(memory); got && name != site.Name {
				t.Errorf("%s has the canary of %s in memory", site.Name, name)
			} else if !got && name == site.Name {
				t.Errorf("%s does not have its own canary in memory: nothing else would be found there", site.Name)
			}
			if c.in(raw) {
				t.Errorf("the store of %s has the canary of %s in clear", site.Name, name)
			}
		}
		if i < 2 { // a restart each
			openStore(t, site, ns, canaries)
		}
	}
}

// dump returns what a process has in writable memory.
func dump(t *testing.T, pid int) []byte {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	var all []byte
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var mode string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); n == 3 && strings.HasPrefix(mode, "rw") && to-from <= 256<<20 {
			part := make([]byte, to-from)
			n, _ := mem.ReadAt(part, from) // what can't be read is not there
			all = append(all, part[:n]...)
		}
	}
	return all
}

// openStore opens the store of a site while its edgelet is down.
func openStore(t *testing.T, site *lab.Site, ns string, canaries map[string]canary) {
	t.Helper()
	site.Edgelet.Kill()
	defer func() {
		if err := site.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}()
	key, err := store.LoadKey(filepath.Join(site.Dir, "data", "store.key"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := store.Open(store.Options{Path: filepath.Join(site.Dir, "data", "edgelet.db"), Key: key})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	secrets, err := store.NewSealedTable[edge.Object](db, "sealed/desired/Secret").All()
	if err != nil {
		t.Fatal(err)
	}
	own := edge.Key{Kind: edge.KindSecret, Namespace: ns, Name: "secret-of-" + site.Name}.String()
	for name, o := range secrets {
		if name != own || !canaries[site.Name].in(o.Data) {
			t.Errorf("the store of %s has %s", site.Name, name)
		}
	}
	if len(secrets) != 1 {
		t.Errorf("the store of %s has %d Secrets, want its own", site.Name, len(secrets))
	}
}
