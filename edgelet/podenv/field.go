package podenv

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Field returns the field of pod that a downward API path names. Addresses are
// those of the pod's status.
func (r *Resolver) Field(pod *corev1.Pod, path string) (string, error) {
	ips := make([]string, 0, len(pod.Status.PodIPs))
	for _, ip := range pod.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	return r.field(pod, path, ips)
}

// field is Field of a pod that has the addresses ips, whatever its status says.
func (r *Resolver) field(pod *corev1.Pod, path string, ips []string) (string, error) {
	if base, key, ok := splitSubscript(path); ok {
		return subscripted(pod, path, base, key)
	}
	switch path {
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	case "metadata.labels":
		return formatMap(pod.Labels), nil
	case "metadata.annotations":
		return formatMap(pod.Annotations), nil
	case "spec.nodeName", "spec.host": // the second is the first's name of old
		if pod.Spec.NodeName == "" {
			return r.config.NodeName, nil
		}
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP", "status.hostIPs":
		return addresses(path, r.config.HostIPs()), nil
	case "status.podIP", "status.podIPs":
		return addresses(path, r.byFamily(ips)), nil
	}
	return "", fmt.Errorf("field label not supported: %s", path)
}

// addresses is the first of ips, or all of them if path ends in the plural.
func addresses(path string, ips []string) string {
	if len(ips) > 1 && !strings.HasSuffix(path, "s") {
		ips = ips[:1]
	}
	return strings.Join(ips, ",")
}

// byFamily puts the addresses first that are of the family of the node's
// primary address.
func (r *Resolver) byFamily(ips []string) []string {
	hosts := r.config.HostIPs()
	if len(hosts) == 0 || len(ips) < 2 {
		return ips
	}
	rank := func(ip string) int {
		if is6(ip) == is6(hosts[0]) {
			return 0
		}
		return 1
	}
	return slices.SortedStableFunc(slices.Values(ips), func(a, b string) int { return rank(a) - rank(b) })
}

func is6(ip string) bool {
	a, err := netip.ParseAddr(ip)
	return err == nil && a.Unmap().Is6()
}

func subscripted(pod *corev1.Pod, path, base, key string) (string, error) {
	var values map[string]string
	name := key
	switch base {
	case "metadata.labels":
		values = pod.Labels
	case "metadata.annotations":
		// Keys of annotations may have capitals in their prefix.
		values, name = pod.Annotations, strings.ToLower(key)
	default:
		return "", fmt.Errorf("field label does not support subscript: %s", path)
	}
	if problems := validation.IsQualifiedName(name); len(problems) > 0 {
		return "", fmt.Errorf("invalid key subscript in %s: %s", path, strings.Join(problems, ";"))
	}
	return values[key], nil
}

// splitSubscript cuts base['key'] apart. The key may contain anything.
func splitSubscript(path string) (base, key string, ok bool) {
	rest, ok := strings.CutSuffix(path, "']")
	if !ok {
		return "", "", false
	}
	base, key, ok = strings.Cut(rest, "['")
	return base, key, ok && base != ""
}

// formatMap writes a map as lines of key="value" in the order of the keys.
func formatMap(m map[string]string) string {
	var b strings.Builder
	for i, key := range slices.Sorted(maps.Keys(m)) {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(key + "=" + strconv.Quote(m[key]))
	}
	return b.String()
}
