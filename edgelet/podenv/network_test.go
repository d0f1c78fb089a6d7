package podenv

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/api/edge"
)

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDNS(t *testing.T) {
	node := "# a comment\nnameserver 192.0.2.53 # the router\nnameserver 192.0.2.54\nsearch old\nsearch lan. example.com .\noptions ndots:2 timeout:1\noptions ndots:3 rotate\n"
	clusterSearch := []string{"shop.svc.cluster.local", "svc.cluster.local", "cluster.local"}
	long := strings.Repeat("a.", 128) + "aa" // 258 bytes
	tests := map[string]struct {
		policy  corev1.DNSPolicy
		host    bool
		own     *corev1.PodDNSConfig
		cluster edge.Cluster
		want    *cri.DNSConfig
	}{
		"default: the node's": {policy: corev1.DNSDefault,
			want: &cri.DNSConfig{Servers: []string{"192.0.2.53", "192.0.2.54"}, Searches: []string{"lan", "example.com"}, Options: []string{"ndots:3", "timeout:1", "rotate"}}},
		"cluster first": {policy: corev1.DNSClusterFirst, cluster: edge.Cluster{DNS: []string{"10.96.0.10"}},
			want: &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: append(clusterSearch[:3:3], "lan", "example.com"), Options: []string{"ndots:5"}}},
		"another domain": {policy: corev1.DNSClusterFirst, cluster: edge.Cluster{DNS: []string{"10.96.0.10"}, Domain: "lan"},
			want: &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"shop.svc.lan", "svc.lan", "lan", "example.com"}, Options: []string{"ndots:5"}}},
		"cluster first without cluster DNS: the node's": {policy: corev1.DNSClusterFirst,
			want: &cri.DNSConfig{Servers: []string{"192.0.2.53", "192.0.2.54"}, Searches: []string{"lan", "example.com"}, Options: []string{"ndots:3", "timeout:1", "rotate"}}},
		"cluster first in the host's network: the node's": {policy: corev1.DNSClusterFirst, host: true, cluster: edge.Cluster{DNS: []string{"10.96.0.10"}},
			want: &cri.DNSConfig{Servers: []string{"192.0.2.53", "192.0.2.54"}, Searches: []string{"lan", "example.com"}, Options: []string{"ndots:3", "timeout:1", "rotate"}}},
		"cluster first with host network": {policy: corev1.DNSClusterFirstWithHostNet, host: true, cluster: edge.Cluster{DNS: []string{"10.96.0.10"}},
			want: &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: append(clusterSearch[:3:3], "lan", "example.com"), Options: []string{"ndots:5"}}},
		"none: only what the pod says": {policy: corev1.DNSNone, cluster: edge.Cluster{DNS: []string{"10.96.0.10"}},
			own:  &corev1.PodDNSConfig{Nameservers: []string{"1.1.1.1"}, Searches: []string{"a.b"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: new("1")}, {Name: "debug"}}},
			want: &cri.DNSConfig{Servers: []string{"1.1.1.1"}, Searches: []string{"a.b"}, Options: []string{"ndots:1", "debug"}}},
		"merged, each once, the pod's options count": {policy: corev1.DNSClusterFirst, cluster: edge.Cluster{DNS: []string{"10.96.0.10"}},
			own:  &corev1.PodDNSConfig{Nameservers: []string{"10.96.0.10", "1.1.1.1"}, Searches: []string{"lan", "x"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: new("2")}, {Name: "edns0"}}},
			want: &cri.DNSConfig{Servers: []string{"10.96.0.10", "1.1.1.1"}, Searches: append(clusterSearch[:3:3], "lan", "example.com", "x"), Options: []string{"ndots:2", "edns0"}}},
		"more than resolvers take is left out": {policy: corev1.DNSNone,
			own:  &corev1.PodDNSConfig{Nameservers: []string{"1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"}, Searches: []string{"a", long, "b"}},
			want: &cri.DNSConfig{Servers: []string{"1.1.1.1", "1.1.1.2", "1.1.1.3"}, Searches: []string{"a", "b"}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := resolver(&objects{cluster: tt.cluster})
			r.resolv = []string{write(t, "resolv.conf", node)}
			pod := web()
			pod.Spec.DNSPolicy, pod.Spec.DNSConfig, pod.Spec.HostNetwork = tt.policy, tt.own, tt.host
			got, err := r.DNS(pod)
			if err != nil || !reflect.DeepEqual(got.Servers, tt.want.Servers) || !reflect.DeepEqual(got.Searches, tt.want.Searches) || !reflect.DeepEqual(got.Options, tt.want.Options) {
				t.Errorf("DNS = %v, %v\nwant %v", got, err, tt.want)
			}
		})
	}
}

func TestDNSSearchLimits(t *testing.T) {
	config := &cri.DNSConfig{}
	for i := range 40 {
		config.Searches = append(config.Searches, fmt.Sprintf("%s%02d", strings.Repeat("a", 98), i))
	}
	if !limitDNS(config) || len(strings.Join(config.Searches, " ")) > maxSearchesBytes || len(config.Searches) != 20 {
		t.Errorf("%d searches of 100 bytes are left, want the 20 that fit in %d bytes", len(config.Searches), maxSearchesBytes)
	}
	config.Searches = strings.Fields(strings.Repeat("a ", 33))
	if !limitDNS(config) || len(config.Searches) != 32 {
		t.Errorf("%d searches are left, want 32", len(config.Searches))
	}
	if limitDNS(config) {
		t.Error("32 searches were cut")
	}
}

func TestDNSSkipsALoopbackStub(t *testing.T) {
	stub, real := write(t, "stub", "nameserver 127.0.0.53\nsearch lan\n"), write(t, "real", "nameserver 192.0.2.53\n")
	tests := map[string]struct {
		files []string
		host  bool
		want  []string
	}{
		"a pod gets the servers behind the stub": {[]string{stub, real}, false, []string{"192.0.2.53"}},
		"the host's network has the stub":        {[]string{stub, real}, true, []string{"127.0.0.53"}},
		"there is nothing behind the stub":       {[]string{stub, "/nonexistent"}, false, []string{"127.0.0.53"}},
		"a file that was asked for is used":      {[]string{stub}, false, []string{"127.0.0.53"}},
		"a host without any":                     {[]string{"/nonexistent"}, false, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := resolver(&objects{})
			r.resolv = tt.files
			pod := web()
			pod.Spec.DNSPolicy, pod.Spec.HostNetwork = corev1.DNSDefault, tt.host
			got, err := r.DNS(pod)
			if err != nil || !reflect.DeepEqual(got.Servers, tt.want) {
				t.Errorf("DNS = %v, %v, want %v", got, err, tt.want)
			}
		})
	}
}

func TestHostname(t *testing.T) {
	long := strings.Repeat("a", 62) + "-bcd"
	tests := map[string]struct {
		name string
		spec corev1.PodSpec
		want string // or the error
		fqdn string // what the hosts file has
	}{
		"the pod's name":              {name: "web-1", want: "web-1", fqdn: "web-1"},
		"a hostname":                  {name: "web-1", spec: corev1.PodSpec{Hostname: "h"}, want: "h", fqdn: "h"},
		"a long name is cut":          {name: long, want: strings.Repeat("a", 62), fqdn: strings.Repeat("a", 62)},
		"a subdomain":                 {name: "web-1", spec: corev1.PodSpec{Subdomain: "s"}, want: "web-1", fqdn: "web-1.s.shop.svc.cluster.local\tweb-1"},
		"the whole name":              {name: "web-1", spec: corev1.PodSpec{Subdomain: "s", SetHostnameAsFQDN: new(true)}, want: "web-1.s.shop.svc.cluster.local", fqdn: "web-1.s.shop.svc.cluster.local\tweb-1"},
		"the whole name of no domain": {name: "web-1", spec: corev1.PodSpec{SetHostnameAsFQDN: new(true)}, want: "web-1", fqdn: "web-1"},
		"an override":                 {name: "web-1", spec: corev1.PodSpec{HostnameOverride: new("o.example.com"), Subdomain: "s"}, want: "o.example.com", fqdn: "o.example.com"},
		"a whole name that is too long": {name: strings.Repeat("a", 50), spec: corev1.PodSpec{Subdomain: "s", SetHostnameAsFQDN: new(true)},
			want: "failed to construct FQDN from pod hostname and cluster domain, FQDN " + strings.Repeat("a", 50) + ".s.shop.svc.cluster.local is too long (64 characters is the max, 75 characters requested)",
			fqdn: strings.Repeat("a", 50) + ".s.shop.svc.cluster.local\t" + strings.Repeat("a", 50)},
		"a bad hostname":  {name: "web-1", spec: corev1.PodSpec{Hostname: "a\n1.2.3.4 b"}, want: `pod Hostname "a\n1.2.3.4 b" is not a valid DNS label`},
		"a bad subdomain": {name: "web-1", spec: corev1.PodSpec{Subdomain: "A B"}, want: `pod Subdomain "A B" is not a valid DNS label`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			pod := web()
			pod.Name, pod.Spec = tt.name, tt.spec
			got, err := resolver(held()).Hostname(pod)
			if err != nil {
				got, _, _ = strings.Cut(err.Error(), ": a lowercase")
				got, _, _ = strings.Cut(got, ": a DNS-1123")
			}
			if got != tt.want {
				t.Errorf("Hostname = %q, want %q", got, tt.want)
			}
			line := "10.0.0.9\t" + tt.fqdn + "\n"
			if got := string(resolver(held()).Hosts(pod, []string{"10.0.0.9"})); strings.Contains(got, line) != (tt.fqdn != "") {
				t.Errorf("Hosts = %q, want the line %q", got, line)
			}
		})
	}
}

func TestHosts(t *testing.T) {
	aliases := []corev1.HostAlias{{IP: "1.2.3.4", Hostnames: []string{"a", "b"}}, {IP: "1.2.3.5", Hostnames: []string{"c"}}}
	pod := web()
	pod.Spec.HostAliases = aliases
	want := "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n" +
		"10.0.0.9\tweb-1\nfd00::9\tweb-1\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n1.2.3.5\tc\n"
	if got := string(resolver(held()).Hosts(pod, []string{"10.0.0.9", "fd00::9"})); got != want {
		t.Errorf("Hosts = %q\nwant %q", got, want)
	}
	pod.Spec.HostNetwork = true
	r := resolver(held())
	r.config.HostsFile = write(t, "hosts", "192.0.2.7 site-a\n")
	want = "# Kubernetes-managed hosts file (host network).\n192.0.2.7 site-a\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n1.2.3.5\tc\n"
	if got := string(r.Hosts(pod, []string{"192.0.2.7"})); got != want {
		t.Errorf("Hosts = %q\nwant %q", got, want)
	}
	if host, err := r.Hostname(pod); host != "" || err != nil {
		t.Errorf("Hostname in the host's network = %q, %v, want the host's own", host, err)
	}
}
