package bootstrap

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"time"
)

// An Identity is a site's key, certificate and trusted CAs, kept in a directory.
// It is safe for concurrent use; a renewal shows in it at once.
type Identity struct {
	site  string
	dir   string
	clock *clock
	step  func(string) // see files

	renewing sync.Mutex // held while a renewal runs: there is one pending key

	mu      sync.Mutex // guards what follows
	current bundle
}

// Load reads the identity that [Join] left in dir. The error is fs.ErrNotExist if
// there is none.
func Load(dir string) (*Identity, error) {
	f, err := openFiles(dir, false)
	if err != nil {
		return nil, fmt.Errorf("load identity: %w", err)
	}
	defer f.close()
	b, err := f.load()
	if err != nil {
		return nil, fmt.Errorf("load identity from %s: %w", dir, err)
	}
	return newIdentity(dir, b, newClock())
}

func newIdentity(dir string, b bundle, c *clock) (*Identity, error) {
	site, err := b.check(b.cas)
	if err != nil {
		return nil, fmt.Errorf("identity in %s: %w", dir, err)
	}
	id := &Identity{site: site, dir: dir, clock: c}
	id.set(b)
	return id, nil
}

func (id *Identity) set(b bundle) {
	id.clock.atLeast(b.cert.NotBefore.Add(backdate))
	id.mu.Lock()
	defer id.mu.Unlock()
	id.current = b
}

func (id *Identity) get() bundle {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.current
}

// Site returns the name of the site.
func (id *Identity) Site() string { return id.site }

// Certificate returns the certificate now in use, which must not be changed.
func (id *Identity) Certificate() *x509.Certificate { return id.get().cert }

// Now returns the time as far as the site knows it: the machine's clock, but no
// earlier than the certificate's issue, or the provider's time if that has shown
// the machine's clock to be wrong by more than five minutes.
func (id *Identity) Now() time.Time { return id.clock.Now() }

// TLSConfig returns a client configuration for one connection to the provider
// known as serverName: TLS 1.3, the site's certificate, whichever is in use at
// that moment, and the trusted CAs. The caller sets NextProtos. Take a new one
// for each connection, as the CAs may change.
func (id *Identity) TLSConfig(serverName string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: serverName,
		RootCAs:    poolOf(id.get().cas),
		Time:       id.clock.Now,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return id.get().tls(), nil
		},
	}
}

// due is when the certificate should be renewed: between 0.62 and 0.72 of its
// life, at a point that is the certificate's own, so that sites that joined
// together do not renew together and a restart changes nothing.
func (id *Identity) due() time.Time {
	cert := id.get().cert
	issued := cert.NotBefore.Add(backdate)
	point := 0.62 + 0.1*float64(cert.SerialNumber.Uint64()&0xffff)/0x10000
	return issued.Add(time.Duration(point * float64(cert.NotAfter.Sub(issued))))
}

// accept checks the answer to a request for key, and returns what to store.
func accept(site string, b bundle, answer issuedAnswer) (bundle, error) {
	certs, err := parseCertificates([]byte(answer.Certificate))
	if err != nil {
		return b, err
	}
	cas, err := parseCertificates([]byte(answer.CA))
	if err != nil {
		return b, err
	}
	if slices.ContainsFunc(cas, func(c *x509.Certificate) bool { return !c.IsCA }) {
		return b, fmt.Errorf("the CA bundle holds what is no CA")
	}
	b.cert, b.cas = certs[0], cas
	got, err := b.check(cas)
	if err != nil {
		return b, err
	}
	if got != site {
		return b, fmt.Errorf("the certificate is for site %q", got)
	}
	return b, nil
}
