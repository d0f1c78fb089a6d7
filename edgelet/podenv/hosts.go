package podenv

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

const (
	maxHostname  = 63 // bytes that Linux takes, less one
	maxFQDN      = 64
	maxHostsFile = 1 << 20 // bytes of the host's /etc/hosts that a pod sees
)

// Hostname returns the hostname of pod: "" for a pod in the host's network,
// which has the host's, the whole domain name if the pod asks for that.
func (r *Resolver) Hostname(pod *corev1.Pod) (string, error) {
	if pod.Spec.HostNetwork {
		return "", nil
	}
	host, domain, err := r.names(pod)
	if err != nil || domain == "" || !isTrue(pod.Spec.SetHostnameAsFQDN) {
		return host, err
	}
	fqdn := host + "." + domain
	if len(fqdn) > maxFQDN {
		return "", fmt.Errorf("failed to construct FQDN from pod hostname and cluster domain, FQDN %s is too long (%d characters is the max, %d characters requested)", fqdn, maxFQDN, len(fqdn))
	}
	return fqdn, nil
}

// names returns the short hostname of pod, and its domain if it has one.
func (r *Resolver) names(pod *corev1.Pod) (host, domain string, err error) {
	if o := pod.Spec.HostnameOverride; o != nil {
		if problems := validation.IsDNS1123Subdomain(*o); len(problems) > 0 {
			return "", "", fmt.Errorf("pod HostnameOverride %q is not a valid DNS subdomain: %s", *o, strings.Join(problems, ";"))
		}
		host, err = truncate(*o)
		return host, "", err
	}
	host = pod.Name
	if pod.Spec.Hostname != "" {
		host = pod.Spec.Hostname
		if problems := validation.IsDNS1123Label(host); len(problems) > 0 {
			return "", "", fmt.Errorf("pod Hostname %q is not a valid DNS label: %s", host, strings.Join(problems, ";"))
		}
	}
	if sub := pod.Spec.Subdomain; sub != "" {
		if problems := validation.IsDNS1123Label(sub); len(problems) > 0 {
			return "", "", fmt.Errorf("pod Subdomain %q is not a valid DNS label: %s", sub, strings.Join(problems, ";"))
		}
		domain = sub + "." + pod.Namespace + ".svc." + r.domain()
	}
	host, err = truncate(host)
	return host, domain, err
}

// truncate cuts a hostname to what Linux takes; it must not end in - or dot.
func truncate(host string) (string, error) {
	if len(host) <= maxHostname {
		return host, nil
	}
	short := strings.TrimRight(host[:maxHostname], "-.")
	if short == "" {
		return "", fmt.Errorf("hostname for pod was invalid: %q", host)
	}
	return short, nil
}

// Hosts returns the content of /etc/hosts of a pod that has the addresses ips:
// the host's own file for a pod in the host's network, else loopback and the pod
// itself; the pod's host aliases in any case.
func (r *Resolver) Hosts(pod *corev1.Pod, ips []string) []byte {
	var b bytes.Buffer
	if content, ok := r.hostHosts(pod); ok {
		b.WriteString("# Kubernetes-managed hosts file (host network).\n")
		b.Write(content)
	} else {
		b.WriteString("# Kubernetes-managed hosts file.\n" +
			"127.0.0.1\tlocalhost\n" +
			"::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::0\tip6-localnet\n" +
			"fe00::0\tip6-mcastprefix\n" +
			"fe00::1\tip6-allnodes\n" +
			"fe00::2\tip6-allrouters\n")
		// A hostname that is refused fails the sandbox before this is read.
		if host, domain, err := r.names(pod); err == nil {
			if domain != "" {
				host = host + "." + domain + "\t" + host
			}
			for _, ip := range ips {
				b.WriteString(ip + "\t" + host + "\n")
			}
		}
	}
	if len(pod.Spec.HostAliases) > 0 {
		b.WriteString("\n# Entries added by HostAliases.\n")
	}
	for _, alias := range pod.Spec.HostAliases {
		b.WriteString(alias.IP + "\t" + strings.Join(alias.Hostnames, "\t") + "\n")
	}
	return b.Bytes()
}

// hostHosts reads the host's own file for a pod that is to see it.
func (r *Resolver) hostHosts(pod *corev1.Pod) ([]byte, bool) {
	if !pod.Spec.HostNetwork {
		return nil, false
	}
	f, err := os.Open(r.config.HostsFile)
	if err != nil {
		r.config.Log.Warn("hosts file of the host, pods in its network see loopback only", "error", err)
		return nil, false
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxHostsFile))
	if err != nil {
		r.config.Log.Warn("hosts file of the host, pods in its network see loopback only", "error", err)
		return nil, false
	}
	return content, true
}
