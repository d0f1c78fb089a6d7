package probe

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"net/url"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// newHTTPClient returns the client of probes or hooks: no proxy, no connection
// kept, no header added, redirects followed only on the same host.
func newHTTPClient(clearHTTP2 bool) *http.Client {
	transport := &http.Transport{
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	if clearHTTP2 {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	} else {
		transport.TLSClientConfig = anyCertificate()
		transport.ForceAttemptHTTP2 = true
	}
	return &http.Client{Transport: transport, CheckRedirect: sameHost}
}

// anyCertificate accepts whatever certificate a container shows. Kubernetes
// promises that to probes and hooks: a pod serves with a certificate that it has
// made itself or that names a Service, never the pod's address, and its spec has
// no field for a CA. What is asked for is a sign of life, from an address that
// the pod itself declares; nothing secret is sent but the headers written in the
// pod's spec, and nothing of the answer is believed but its status. Nothing else
// of the edgelet may use this.
func anyCertificate() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
}

func sameHost(req *http.Request, via []*http.Request) error {
	if req.URL.Hostname() != via[0].URL.Hostname() {
		return http.ErrUseLastResponse
	}
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	return nil
}

// newRequest makes the request of a probe or hook.
func newRequest(ctx context.Context, action *corev1.HTTPGetAction, container *corev1.Container, ip, agent string) (*http.Request, error) {
	host, err := address(action.Host, ip, action.Port, container)
	if err != nil {
		return nil, err
	}
	target, err := url.Parse(action.Path)
	if err != nil {
		target = &url.URL{Path: action.Path}
	}
	target = &url.URL{ // no more of it than a path and a query: not a host, not a user
		Scheme:   strings.ToLower(cmp.Or(string(action.Scheme), "http")),
		Host:     host,
		Path:     target.Path,
		RawPath:  target.RawPath,
		RawQuery: target.RawQuery,
		Fragment: target.Fragment,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, h := range action.HTTPHeaders {
		req.Header.Add(h.Name, h.Value)
	}
	req.Host = req.Header.Get("Host")
	if _, given := req.Header["User-Agent"]; !given {
		req.Header.Set("User-Agent", agent)
	}
	if _, given := req.Header["Accept"]; !given {
		req.Header.Set("Accept", "*/*")
	} else if req.Header.Get("Accept") == "" {
		req.Header.Del("Accept")
	}
	return req, nil
}
