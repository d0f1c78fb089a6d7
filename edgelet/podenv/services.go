package podenv

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// services returns the variables of the services that pod is told of: the API
// server in any case, those of its namespace unless it declines service links.
// The API server's service comes with those of every namespace.
func (r *Resolver) services(pod *corev1.Pod) ([]variable, error) {
	services, err := r.config.Objects.Services(pod.Namespace)
	if err != nil && !errors.Is(err, edge.ErrAbsent) {
		// A container without the address of the API server would fail in ways
		// that are hard to understand: wait instead, as a kubelet does.
		return nil, fmt.Errorf("services of namespace %q, cannot construct envvars: %w", pod.Namespace, err)
	}
	links := pod.Spec.EnableServiceLinks == nil || *pod.Spec.EnableServiceLinks
	var vars []variable
	for _, s := range slices.SortedFunc(slices.Values(services), func(a, b edge.Service) int { return cmp.Compare(a.Name, b.Name) }) {
		if hasIP(s) && len(s.Ports) > 0 && (links || s.Name == "kubernetes") {
			vars = appendService(vars, s)
		}
	}
	return vars, nil
}

func hasIP(s edge.Service) bool { return s.ClusterIP != "" && s.ClusterIP != corev1.ClusterIPNone }

// appendService appends NAME_SERVICE_HOST and _PORT, and the variables that
// Docker links had.
func appendService(vars []variable, s edge.Service) []variable {
	put := func(name, value string) { vars = append(vars, variable{name, value}) }
	name := envName(s.Name)
	put(name+"_SERVICE_HOST", s.ClusterIP)
	put(name+"_SERVICE_PORT", strconv.Itoa(int(s.Ports[0].Port)))
	for _, p := range s.Ports {
		if p.Name != "" {
			put(name+"_SERVICE_PORT_"+envName(p.Name), strconv.Itoa(int(p.Port)))
		}
	}
	for i, p := range s.Ports {
		protocol, port := string(cmp.Or(p.Protocol, corev1.ProtocolTCP)), strconv.Itoa(int(p.Port))
		url := strings.ToLower(protocol) + "://" + net.JoinHostPort(s.ClusterIP, port)
		if i == 0 {
			put(name+"_PORT", url)
		}
		link := name + "_PORT_" + port + "_" + strings.ToUpper(protocol)
		put(link, url)
		put(link+"_PROTO", strings.ToLower(protocol))
		put(link+"_PORT", port)
		put(link+"_ADDR", s.ClusterIP)
	}
	return vars
}

func envName(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }
