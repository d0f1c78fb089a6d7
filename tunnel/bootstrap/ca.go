package bootstrap

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"time"
)

// pinPrefix begins a pin; the rest is the [KeyID] of the CA.
const pinPrefix = "sha256:"

// backdate is how long before its issue a certificate is valid, for machines
// whose clocks are somewhat slow.
const backdate = 24 * time.Hour

// A CA signs the certificates of sites and of the provider. It is immutable and
// safe for concurrent use.
type CA struct {
	cert   *x509.Certificate
	key    crypto.Signer
	bundle []*x509.Certificate // cert first, then older CAs that are still trusted
}

// NewCA makes a self-signed CA that is valid for life from now.
func NewCA(now time.Time, life time.Duration) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("new ca: %w", err)
	}
	serial, err := newSerial(now, nil)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "skerry-ca"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("new ca: %w", err)
	}
	return &CA{cert: cert, key: key, bundle: []*x509.Certificate{cert}}, nil
}

// ParseCA reads a CA: its certificate, its key (PKCS #8 or EC), and, for a change
// of CA, further CAs that sites and provider go on trusting; all PEM.
func ParseCA(certPEM, keyPEM, olderPEM []byte) (*CA, error) {
	certs, err := parseCertificates(certPEM)
	if err != nil {
		return nil, fmt.Errorf("parse ca: %w", err)
	}
	pair, err := tls.X509KeyPair(certificatePEM(certs[0]), keyPEM)
	if err != nil {
		return nil, fmt.Errorf("parse ca: %w", err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !certs[0].IsCA {
		return nil, errors.New("parse ca: must be a CA with an ECDSA key")
	}
	ca := &CA{cert: certs[0], key: key, bundle: certs[:1]}
	if len(olderPEM) > 0 {
		older, err := parseCertificates(olderPEM)
		if err != nil {
			return nil, fmt.Errorf("parse ca: older: %w", err)
		}
		ca.bundle = append(ca.bundle, older...)
	}
	return ca, nil
}

// PEM returns the CA's certificate and key, to be kept where nobody reads them.
func (ca *CA) PEM() (certPEM, keyPEM []byte, err error) {
	der, err := x509.MarshalPKCS8PrivateKey(ca.key)
	if err != nil {
		return nil, nil, fmt.Errorf("ca key: %w", err)
	}
	return certificatePEM(ca.cert), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// Certificate returns the CA's certificate, which the caller must not change.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// Bundle returns all CAs that are trusted, PEM, the signing one first.
func (ca *CA) Bundle() []byte { return certificatePEM(ca.bundle...) }

// Pool returns all CAs that are trusted, to verify sites' certificates with.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, cert := range ca.bundle {
		pool.AddCert(cert)
	}
	return pool
}

// Pin returns what [JoinConfig].CACertHash must be: sha256: and the hex SHA-256 of
// the CA's public key, as kubeadm prints it.
func (ca *CA) Pin() string { return pinOf(ca.cert) }

func pinOf(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return fmt.Sprintf("%s%x", pinPrefix, sum)
}

// IssueSite signs the certificate of a site as record says, for public. Asked
// twice for one record it gives the same certificate but for the signature.
func (ca *CA) IssueSite(site string, record Record, public any) (*x509.Certificate, error) {
	if err := errors.Join(ValidateSite(site), checkKey(public)); err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	serial, err := parseSerial(record.Serial)
	if err != nil {
		return nil, fmt.Errorf("issue certificate of %s: %w", site, err)
	}
	return sign(&x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: site, Organization: []string{Organization}},
		NotBefore:             record.NotBefore,
		NotAfter:              record.NotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{siteURI(site)},
	}, ca.cert, public, ca.key)
}

// IssueServer makes a key and a certificate for a provider: for [ServerName], by
// which sites know it, and for further names, which are DNS names and IP
// addresses. The chain that it shows includes the CA, which joining sites look for.
func (ca *CA) IssueServer(names []string, now time.Time, life time.Duration) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("issue server certificate: %w", err)
	}
	serial, err := newSerial(now, nil)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "skerry-provider"},
		NotBefore:             later(now.Add(-backdate), ca.cert.NotBefore),
		NotAfter:              earlier(now.Add(life), ca.cert.NotAfter),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	all := slices.Concat([]string{ServerName}, names)
	slices.Sort(all)
	for _, name := range slices.Compact(all) {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	leaf, err := sign(template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, fmt.Errorf("issue server certificate: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, ca.cert.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// sign makes a certificate and reads it back.
func sign(template, parent *x509.Certificate, public any, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// verifySite checks that this CA issued cert to a site, at whatever time.
func (ca *CA) verifySite(cert *x509.Certificate) (site string, err error) {
	_, err = cert.Verify(x509.VerifyOptions{
		Roots:       ca.Pool(),
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime: cert.NotBefore.Add(backdate),
	})
	if err != nil {
		return "", err
	}
	return SiteFromCertificate(cert)
}

// timeMessage is what the CA key signs to tell the time. No certificate begins
// like this, so the signature is good for nothing else.
func timeMessage(nonce string, now time.Time) []byte {
	sum := sha256.Sum256(fmt.Appendf(nil, "skerry.io bootstrap time v1\n%s\n%s\n", nonce, now.UTC().Format(time.RFC3339Nano)))
	return sum[:]
}

func (ca *CA) signTime(nonce string, now time.Time) ([]byte, error) {
	return ca.key.Sign(rand.Reader, timeMessage(nonce, now), crypto.SHA256)
}

// verifyTime checks the signature of a time under any of the trusted CAs.
func verifyTime(cas []*x509.Certificate, nonce string, now time.Time, signature []byte) error {
	for _, ca := range cas {
		if key, ok := ca.PublicKey.(*ecdsa.PublicKey); ok && ecdsa.VerifyASN1(key, timeMessage(nonce, now), signature) {
			return nil
		}
	}
	return errors.New("time: not signed by the CA")
}

// proofMessage is what the old key signs to renew: the new request, for the old
// certificate.
func proofMessage(csrDER, oldDER []byte) []byte {
	csr, old := sha256.Sum256(csrDER), sha256.Sum256(oldDER)
	sum := sha256.Sum256(fmt.Appendf(nil, "skerry.io bootstrap renew v1\n%x\n%x\n", csr, old))
	return sum[:]
}

// newSerial returns a serial that is higher than last, which may be nil.
func newSerial(now time.Time, last *big.Int) (*big.Int, error) {
	serial := big.NewInt(now.UnixMicro())
	if serial.Sign() <= 0 {
		serial.SetInt64(1)
	}
	if last != nil {
		if next := new(big.Int).Rsh(last, 64); next.Cmp(serial) >= 0 {
			serial.Add(next, big.NewInt(1))
		}
	}
	low, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 64))
	if err != nil {
		return nil, fmt.Errorf("serial: %w", err)
	}
	return serial.Or(serial.Lsh(serial, 64), low), nil
}

// maxSerial bounds what is read as a serial: X.509 allows 20 octets.
const maxSerial = 40

func parseSerial(text string) (*big.Int, error) {
	serial, ok := new(big.Int).SetString(text, 16)
	if !ok || len(text) > maxSerial || serial.Sign() <= 0 {
		return nil, fmt.Errorf("serial %.50q: not a positive hexadecimal number", text)
	}
	return serial, nil
}

// Serial writes the serial of a certificate as records keep it.
func Serial(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
