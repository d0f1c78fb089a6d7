package server

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// An authority signs certificates of tests.
type authority struct {
	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	a := &authority{t: t, key: key}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return a
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

func (a *authority) issue(subject pkix.Name, usage x509.ExtKeyUsage, change func(*x509.Certificate)) *tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(a.t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: subject, ExtKeyUsage: []x509.ExtKeyUsage{usage}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	must(a.t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fakeReviews knows tokens by name and permissions by "user verb subresource".
type fakeReviews struct {
	mu       sync.Mutex
	tokens   map[string]User
	allowed  map[string]bool
	failing  error
	asked    []string // what was authorized, in order
	reviewed int      // tokens
}

func (f *fakeReviews) Authenticate(_ context.Context, token string) (User, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reviewed++
	if f.failing != nil {
		return User{}, f.failing
	}
	if user, ok := f.tokens[token]; ok {
		return user, nil
	}
	return User{}, ErrUnauthenticated
}

func (f *fakeReviews) Authorize(_ context.Context, user User, what Attributes) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, fmt.Sprintf("%s %s %s %s", user.Name, what.Verb, what.Subresource, what.Site))
	if f.failing != nil {
		return false, f.failing
	}
	return f.allowed[user.Name+" "+what.Verb+" "+what.Subresource] || f.allowed[user.Name+" *"], nil
}

// fakeSites have pods by "namespace/name/site".
type fakeSites struct {
	mu    sync.Mutex
	sites map[string]http.RoundTripper
	pods  map[string]bool
}

func (f *fakeSites) Site(name string) (http.RoundTripper, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if rt := f.sites[name]; rt != nil {
		return rt, nil
	}
	return nil, fmt.Errorf("site %s is disconnected since noon", name)
}

func (f *fakeSites) HasPod(namespace, name, site string) bool {
	return f.pods[namespace+"/"+name+"/"+site]
}

// A fixture is a server with the sites berlin and oslo, which a handler of the test
// answers for, and clients by what they show.
type fixture struct {
	t       *testing.T
	server  *Server
	sites   *fakeSites
	reviews *fakeReviews
	ca      *authority
	clients map[string]*tls.Certificate
	metrics *prometheus.Registry
}

func newFixture(t *testing.T, edge http.Handler) *fixture {
	ca, other := newAuthority(t), newAuthority(t)
	serving := ca.issue(pkix.Name{CommonName: "provider"}, x509.ExtKeyUsageServerAuth, nil)
	f := &fixture{t: t, ca: ca, metrics: prometheus.NewRegistry(),
		sites: &fakeSites{sites: map[string]http.RoundTripper{}, pods: map[string]bool{"ns/web/berlin": true, "ns/db/oslo": true}},
		reviews: &fakeReviews{
			tokens:  map[string]User{"t-none": {Name: "nobody"}, "t-get-proxy": {Name: "reader"}, "t-metrics": {Name: "scraper"}, "t-admin": {Name: "admin"}},
			allowed: map[string]bool{"reader get proxy": true, "scraper get metrics": true, "scraper get stats": true, "apiserver *": true, "admin *": true},
		},
		clients: map[string]*tls.Certificate{
			"the API server's certificate": ca.issue(pkix.Name{CommonName: "apiserver", Organization: []string{"kubeadm:cluster-admins"}}, x509.ExtKeyUsageClientAuth, nil),
			"a certificate of another CA":  other.issue(pkix.Name{CommonName: "apiserver"}, x509.ExtKeyUsageClientAuth, nil),
			"a serving certificate":        ca.issue(pkix.Name{CommonName: "apiserver"}, x509.ExtKeyUsageServerAuth, nil),
			"a certificate without a name": ca.issue(pkix.Name{}, x509.ExtKeyUsageClientAuth, nil),
			"an expired certificate": ca.issue(pkix.Name{CommonName: "apiserver"}, x509.ExtKeyUsageClientAuth, func(c *x509.Certificate) {
				c.NotAfter = time.Now().Add(-time.Minute)
			}),
		},
	}
	if edge != nil {
		site := httptest.NewServer(edge)
		t.Cleanup(site.Close)
		f.sites.sites["berlin"], f.sites.sites["oslo"] = dialing(site.Listener.Addr().String()), dialing(site.Listener.Addr().String())
	}
	var err error
	f.server, err = New(Config{
		Sites: f.sites, Authenticator: f.reviews, Authorizer: f.reviews, ClientCAs: ca.pool,
		Certificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return serving, nil },
		Address:     "127.0.0.1", FirstPort: 21000, LastPort: 21999, Registerer: f.metrics,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	must(t, err)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f.server.Run(ctx) }()
	t.Cleanup(func() { stop(); must(t, <-done) })
	return f
}

// dialing is a way to one address, as a session is to its site.
func dialing(addr string) http.RoundTripper {
	return &http.Transport{DisableCompression: true, MaxResponseHeaderBytes: maxHeader, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}}
}

// as returns a client that shows a certificate by name, or else nothing.
func (f *fixture) as(who string) *http.Client {
	config := &tls.Config{RootCAs: f.ca.pool()}
	if c := f.clients[who]; c != nil {
		config.Certificates = []tls.Certificate{*c}
	}
	tr := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, DisableKeepAlives: true}
	f.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

const apiServer = "the API server's certificate"

func (f *fixture) url(site, path string) string {
	port, err := f.server.Port(site)
	must(f.t, err)
	return fmt.Sprintf("https://127.0.0.1:%d%s", port, path)
}

// get asks for a path of a site as the API server.
func (f *fixture) get(site, path string) (int, string) {
	f.t.Helper()
	resp, err := f.as(apiServer).Get(f.url(site, path))
	must(f.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(f.t, err)
	return resp.StatusCode, string(body)
}

// upgrade sends a request to upgrade over a connection of its own, and returns it with
// the answer.
func (f *fixture) upgrade(who, method, site, path, protocol string, header ...string) (net.Conn, *bufio.Reader, *http.Response) {
	f.t.Helper()
	config := &tls.Config{RootCAs: f.ca.pool(), NextProtos: []string{"http/1.1"}, ServerName: "127.0.0.1"}
	if c := f.clients[who]; c != nil {
		config.Certificates = []tls.Certificate{*c}
	} else if who != "nobody" {
		header = append(header, "Authorization: Bearer "+who)
	}
	port, err := f.server.Port(site)
	must(f.t, err)
	conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), config)
	must(f.t, err)
	f.t.Cleanup(func() { conn.Close() })
	must(f.t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	lines := append([]string{method + " " + path + " HTTP/1.1", "Host: node", "Connection: Upgrade", "Upgrade: " + protocol}, header...)
	_, err = io.WriteString(conn, strings.Join(lines, "\r\n")+"\r\n\r\n")
	must(f.t, err)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	must(f.t, err)
	return conn, r, resp
}

// echo upgrades and sends back what comes, and else says what it was asked.
func echo(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") == "" {
		fmt.Fprintf(w, "%s %s as %s", r.Method, r.URL, r.Header.Get(userHeader))
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nSet-Cookie: evil\r\n\r\n", r.Header.Get("Upgrade"))
	io.Copy(conn, rw)
}
