package podenv

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What a resolver accepts; what is beyond is left out and logged.
const (
	maxNameservers   = 3
	maxSearches      = 32
	maxSearchesBytes = 2048
	maxResolvConf    = 1 << 20 // bytes of a resolv.conf
)

// DNS returns the resolver configuration of pod. A pod that asks for the
// cluster's DNS gets the node's if the cluster has none that the site can reach.
func (r *Resolver) DNS(pod *corev1.Pod) (*cri.DNSConfig, error) {
	cluster := r.config.Objects.Cluster()
	config := &cri.DNSConfig{}
	if pod.Spec.DNSPolicy != corev1.DNSNone {
		var err error
		if config, err = r.nodeDNS(pod.Spec.HostNetwork); err != nil {
			return nil, err
		}
		if usesClusterDNS(pod) && len(cluster.DNS) > 0 {
			domain := r.domain()
			own := []string{pod.Namespace + ".svc." + domain, "svc." + domain, domain}
			config = &cri.DNSConfig{
				Servers:  slices.Clone(cluster.DNS),
				Searches: unique(append(own, config.Searches...)),
				Options:  []string{"ndots:5"},
			}
		}
	}
	if own := pod.Spec.DNSConfig; own != nil {
		config.Servers = unique(append(config.Servers, own.Nameservers...))
		config.Searches = unique(append(config.Searches, own.Searches...))
		for _, o := range own.Options {
			option := o.Name
			if o.Value != nil && *o.Value != "" {
				option += ":" + *o.Value
			}
			config.Options = setOption(config.Options, option)
		}
	}
	if limitDNS(config) {
		r.config.Log.Warn("DNS limits were exceeded, some entries have been omitted",
			"pod", pod.Namespace+"/"+pod.Name, "nameservers", config.Servers, "searches", len(config.Searches))
	}
	return config, nil
}

func usesClusterDNS(pod *corev1.Pod) bool {
	switch pod.Spec.DNSPolicy {
	case corev1.DNSDefault:
		return false
	case corev1.DNSClusterFirstWithHostNet:
		return true
	}
	return !pod.Spec.HostNetwork
}

// nodeDNS reads the node's resolver configuration. One that names only servers
// on loopback is of no use outside the host's network, so that the next file is
// tried then. A host without any such file has no configuration, and pods start
// all the same.
func (r *Resolver) nodeDNS(hostNetwork bool) (*cri.DNSConfig, error) {
	first := &cri.DNSConfig{}
	for i, name := range r.resolv {
		config, err := readResolvConf(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if i == 0 {
			first = config
		}
		if hostNetwork || !onlyLoopback(config.Servers) {
			return config, nil
		}
	}
	return first, nil
}

func onlyLoopback(servers []string) bool {
	return !slices.ContainsFunc(servers, func(s string) bool {
		a, err := netip.ParseAddr(s)
		return err != nil || !a.IsLoopback()
	})
}

func readResolvConf(name string) (*cri.DNSConfig, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	config, err := parseResolvConf(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return config, nil
}

// parseResolvConf reads the format of resolv.conf(5): nameservers add up, the
// last search line counts, options add up with the last of a name counting.
func parseResolvConf(r io.Reader) (*cri.DNSConfig, error) {
	config := &cri.DNSConfig{}
	lines := bufio.NewScanner(io.LimitReader(r, maxResolvConf))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			config.Servers = append(config.Servers, fields[1])
		case "search", "domain": // domain is a search list of one
			config.Searches = nil
			for _, s := range fields[1:] {
				if s = strings.TrimSuffix(s, "."); s != "" {
					config.Searches = append(config.Searches, s)
				}
			}
		case "options":
			for _, o := range fields[1:] {
				config.Options = setOption(config.Options, o)
			}
		}
	}
	return config, lines.Err()
}

// setOption replaces the option of the same name, or appends.
func setOption(options []string, option string) []string {
	name, _, _ := strings.Cut(option, ":")
	i := slices.IndexFunc(options, func(o string) bool { n, _, _ := strings.Cut(o, ":"); return n == name })
	if i < 0 {
		return append(options, option)
	}
	options[i] = option
	return options
}

func unique(list []string) []string {
	var out []string
	for _, s := range list {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// limitDNS cuts config to what resolvers accept and reports whether it had to.
func limitDNS(config *cri.DNSConfig) (cut bool) {
	servers, searches := len(config.Servers), len(config.Searches)
	config.Servers = config.Servers[:min(servers, maxNameservers)]
	config.Searches = config.Searches[:min(searches, maxSearches)]
	// glibc of before 2.29 aborts on a longer one.
	config.Searches = slices.DeleteFunc(config.Searches, func(s string) bool { return len(s) > validation.DNS1123SubdomainMaxLength })
	size := -1
	for i, s := range config.Searches {
		if size += 1 + len(s); size > maxSearchesBytes {
			config.Searches = config.Searches[:i]
			break
		}
	}
	return len(config.Servers) < servers || len(config.Searches) < searches
}
