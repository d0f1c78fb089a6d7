// Package tunneltest provides what tests of tunnels, and of what runs over
// them, need: a pair of sessions in memory ([Pair]), links with a rate and a
// delay that can be stalled and cut ([Network], [Pipe]), certificates ([CA]),
// and fake time ([Bubble]).
//
// The sessions are real ones: a Dialer and a Server shake hands by TLS.
package tunneltest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/tunnel"
)

// ServerName is the name in the certificates of [CA.Server].
const ServerName = "cloud.test"

// Bubble runs f under fake time, like synctest.Test. yamux keeps a pool of
// timers for the whole process, which must not pass from one bubble to the
// next: collecting garbage twice empties it.
func Bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	empty := func() {
		runtime.GC()
		runtime.GC()
	}
	empty()
	defer empty()
	synctest.Test(t, f)
}

// A CA signs certificates, good from 1999 to 2199, so also under fake time.
type CA struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA returns a new CA.
func NewCA(t testing.TB) *CA {
	t.Helper()
	ca := &CA{t: t}
	ca.cert, ca.key = ca.issue(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "test CA"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	})
	return ca
}

func (ca *CA) issue(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	ca.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		ca.t.Fatal(err)
	}
	template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		ca.t.Fatal(err)
	}
	template.NotBefore = time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)
	template.NotAfter = time.Date(2199, 1, 1, 0, 0, 0, 0, time.UTC)
	parent, signer := ca.cert, ca.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		ca.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return cert, key
}

func (ca *CA) pair(template *x509.Certificate) tls.Certificate {
	cert, key := ca.issue(template)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// Pool returns a pool with this CA in it.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// Server returns the configuration of a server of the given names, by default
// ServerName, that takes sites of this CA.
func (ca *CA) Server(names ...string) *tls.Config {
	if len(names) == 0 {
		names = []string{ServerName}
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: names[0]},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		KeyUsage:    x509.KeyUsageDigitalSignature,
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	return &tls.Config{Certificates: []tls.Certificate{ca.pair(template)}, ClientCAs: ca.Pool(), MinVersion: tls.VersionTLS13}
}

// Client returns the configuration of a site that trusts servers of this CA.
func (ca *CA) Client(site string) *tls.Config {
	cert := ca.pair(&x509.Certificate{
		Subject:     pkix.Name{CommonName: site},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "test", Path: "/site/" + site}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		KeyUsage:    x509.KeyUsageDigitalSignature,
	})
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: ca.Pool(), MinVersion: tls.VersionTLS13}
}

// Site returns the site that a certificate of [CA.Client] names; it is a
// [tunnel.Server]'s Authenticate.
func Site(state *tls.ConnectionState) (string, error) {
	return state.PeerCertificates[0].Subject.CommonName, nil
}

// A Network is a listener in memory and the way to it.
type Network struct {
	Link Link // of connections dialed from now on

	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once

	mu   sync.Mutex // guards the following
	ends []*Conn    // of the dialing side
	down bool
}

// NewNetwork returns a network.
func NewNetwork(link Link) *Network {
	return &Network{Link: link, conns: make(chan net.Conn), closed: make(chan struct{})}
}

// Dial connects to the listener, whatever address says. It is a [tunnel.Dialer]'s Net.
func (n *Network) Dial(ctx context.Context, _, _ string) (net.Conn, error) {
	n.mu.Lock()
	down := n.down
	a, b := Pipe(n.Link)
	n.mu.Unlock()
	if down {
		return nil, syscall.ECONNREFUSED
	}
	select {
	case n.conns <- b:
		n.mu.Lock()
		defer n.mu.Unlock()
		n.ends = append(n.ends, a)
		return a, nil
	case <-n.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Conns returns the dialing ends of all connections so far, the oldest first.
func (n *Network) Conns() []*Conn {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.ends)
}

// Down cuts all connections and refuses new ones, until Up.
func (n *Network) Down() {
	n.mu.Lock()
	n.down = true
	n.mu.Unlock()
	for _, c := range n.Conns() {
		c.Cut()
	}
}

// Up ends what Down began.
func (n *Network) Up() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = false
}

// Accept, Close and Addr make it a net.Listener.
func (n *Network) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

// Close refuses all further connections.
func (n *Network) Close() error {
	n.once.Do(func() { close(n.closed) })
	return nil
}

// Addr returns the name that certificates of [CA.Server] have.
func (n *Network) Addr() net.Addr { return addr(ServerName) }

// Pair returns the two ends of a session of site "site-a", which end with the test.
func Pair(t testing.TB) (cloud, edge *tunnel.Session) {
	t.Helper()
	cloud, edge, _ = PairOver(t, Link{})
	return cloud, edge
}

// PairOver is like Pair over a link, and returns the edge's end of it too.
func PairOver(t testing.TB, link Link) (cloud, edge *tunnel.Session, conn *Conn) {
	t.Helper()
	ca, network := NewCA(t), NewNetwork(link)
	log := slog.New(slog.DiscardHandler)
	sessions := make(chan *tunnel.Session, 1)
	server := &tunnel.Server{
		TLS:          ca.Server(),
		Authenticate: Site,
		Accept:       func(context.Context, string, tunnel.Hello) (uint64, error) { return 1, nil },
		Use: func(ctx context.Context, s *tunnel.Session) {
			sessions <- s
			<-s.Done()
		},
		Log: log,
	}
	dialer := &tunnel.Dialer{
		Server: ServerName, TLS: ca.Client("site-a"), Net: network.Dial, Log: log,
		Proxy: func(*url.URL) (*url.URL, error) { return nil, nil },
	}
	// Not t.Context, which ends before the cleanups.
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, network) }()
	t.Cleanup(func() {
		if edge != nil {
			edge.Close()
		}
		cancel()
		if err := <-served; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("tunnel server: %v", err)
		}
	})
	edge, err := dialer.Dial(ctx)
	if err != nil {
		t.Fatalf("dial tunnel: %v", err)
	}
	return <-sessions, edge, network.Conns()[0]
}
