package bootstrap

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

const (
	// Organization is the O of every site's certificate.
	Organization = "skerry:sites"

	sitePath   = "/site/"
	siteDomain = "skerry.io" // SPIFFE trust domain

	// maxSite is the longest site name: it is the value of labels of the Node.
	maxSite = 63
)

// oidAltName is the extension subjectAltName.
var oidAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// ValidateSite reports whether name can name a site: a lower-case DNS subdomain
// (RFC 1123) of at most 63 characters, as it becomes a Node and a label's value.
func ValidateSite(name string) error {
	if name == "" || len(name) > maxSite {
		return fmt.Errorf("site name %.80q: must have 1 to %d characters", name, maxSite)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("site name %q: each part between dots must start and end with a letter or digit", name)
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return fmt.Errorf("site name %q: only a-z, 0-9, '-' and '.' are allowed", name)
			}
		}
	}
	return nil
}

// siteURI is the SPIFFE ID of a site.
func siteURI(site string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: siteDomain, Path: sitePath + site}
}

// SiteFromCertificate returns the site that cert names. It takes only
// certificates of our own shape, compared byte for byte: one URI as the only
// alternative name, the same name in the subject, for client authentication
// only. The caller has verified the chain.
func SiteFromCertificate(cert *x509.Certificate) (string, error) {
	site := cert.Subject.CommonName
	if err := ValidateSite(site); err != nil {
		return "", fmt.Errorf("certificate of a site: %w", err)
	}
	if !slices.Equal(cert.Subject.Organization, []string{Organization}) || len(cert.Subject.Names) != 2 {
		return "", errors.New("certificate of a site: the subject is not one of a site")
	}
	want, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(siteURI(site).String())}})
	if err != nil {
		return "", fmt.Errorf("certificate of a site: %w", err)
	}
	names := slices.IndexFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidAltName) })
	if names < 0 || !bytes.Equal(cert.Extensions[names].Value, want) {
		return "", fmt.Errorf("certificate of a site: %s is not its only alternative name", siteURI(site))
	}
	if cert.IsCA || !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) || len(cert.UnknownExtKeyUsage) != 0 {
		return "", errors.New("certificate of a site: must be for client authentication only")
	}
	return site, nil
}

// KeyID names a public key: the lower-case hex SHA-256 of its SubjectPublicKeyInfo.
func KeyID(public any) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// newKey makes a site's key.
func newKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// newCSR asks for a certificate for key. The subject is for people to read: the
// provider takes nothing but the key.
func newCSR(site string, key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: site, Organization: []string{Organization}},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// parseCSR reads a certificate request from the wire. Its key is of a kind that
// is cheap to check, and its signature proves that the sender holds the key.
func parseCSR(text string) (*x509.CertificateRequest, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, errors.New("csr: not one PEM block CERTIFICATE REQUEST")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr: the sender does not hold its key: %w", err)
	}
	return csr, nil
}

// checkKey accepts the keys that sites may have: ECDSA on P-256 or P-384.
func checkKey(public any) error {
	key, ok := public.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
		return errors.New("key must be ECDSA P-256 or P-384")
	}
	return nil
}

// parseCertificates reads all certificates of a PEM text, at most 16.
func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	const most = 16
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		if certs = append(certs, cert); len(certs) > most {
			return nil, fmt.Errorf("more than %d certificates", most)
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate")
	}
	return certs, nil
}

func certificatePEM(certs ...*x509.Certificate) []byte {
	var text []byte
	for _, cert := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return text
}
