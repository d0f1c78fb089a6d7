package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/certificate/csr"

	"github.com/skerry-io/skerry/internal/backoff"
)

// ServingConfig configures the certificate of the kubelet API. All fields but
// Life and Log are required.
type ServingConfig struct {
	Client  kubernetes.Interface
	Replica string        // name of this replica
	Address string        // IP address that the Nodes of this replica show
	Life    time.Duration // asked for; default 7 days
	Log     *slog.Logger  // default slog.Default()
}

// Serving keeps the certificate with which a replica serves the kubelet API: one
// of the cluster's own CA (signer kubernetes.io/kubelet-serving), so that an API
// server with --kubelet-certificate-authority trusts it. Run obtains and renews it.
type Serving struct {
	config  ServingConfig
	current atomic.Pointer[tls.Certificate]
}

// NewServing returns a Serving that has no certificate until Run has obtained one.
func NewServing(config ServingConfig) (*Serving, error) {
	if config.Client == nil || config.Replica == "" || net.ParseIP(config.Address) == nil {
		return nil, fmt.Errorf("serving certificate: Client, Replica and an IP address are required, have %q and %q", config.Replica, config.Address)
	}
	if config.Life == 0 {
		config.Life = 7 * 24 * time.Hour
	}
	if config.Log == nil {
		config.Log = slog.Default()
	}
	return &Serving{config: config}, nil
}

// GetCertificate is for a tls.Config.
func (s *Serving) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if cert := s.current.Load(); cert != nil {
		return cert, nil
	}
	return nil, errors.New("the serving certificate has not been issued yet")
}

// Ready is nil once there is a certificate.
func (s *Serving) Ready() error {
	_, err := s.GetCertificate(nil)
	return err
}

// Run obtains the certificate, and another at two thirds of its life, until ctx is
// done, which is no error.
func (s *Serving) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		for n := range backoff.Retry(ctx, time.Second, time.Minute) {
			cert, err := s.obtain(ctx)
			if err == nil {
				s.current.Store(cert)
				break
			}
			if ctx.Err() == nil {
				s.config.Log.Warn("no certificate for the kubelet API yet, trying again", "attempt", n+1, "err", err)
			}
		}
		cert := s.current.Load()
		if cert == nil {
			return nil // ctx is done
		}
		life := cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(cert.Leaf.NotBefore.Add(life * 2 / 3))):
		}
	}
	return nil
}

func (s *Serving) obtain(ctx context.Context) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	// What the signer demands of a kubelet's name.
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:     pkix.Name{CommonName: "system:node:skerry-provider-" + s.config.Replica, Organization: []string{"system:nodes"}},
		IPAddresses: []net.IP{net.ParseIP(s.config.Address)},
	}, key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	usages := []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}
	name, uid, err := csr.RequestCertificate(s.config.Client, text, "", certificatesv1.KubeletServingSignerName, &s.config.Life, usages, key)
	if err != nil {
		return nil, err
	}
	if err := s.approve(ctx, name); err != nil {
		return nil, err
	}
	chain, err := csr.WaitForCertificate(ctx, s.config.Client, name, uid)
	if err != nil {
		return nil, fmt.Errorf("%w (does the controller manager sign, and may the provider approve kubernetes.io/kubelet-serving?)", err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(chain, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
	if err != nil {
		return nil, err
	}
	return &cert, nil
}

// approve approves the request that this replica has just made.
func (s *Serving) approve(ctx context.Context, name string) error {
	requests := s.config.Client.CertificatesV1().CertificateSigningRequests()
	request, err := requests.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	request.Status.Conditions = append(request.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue,
		Reason: "SkerryProvider", Message: "the kubelet API of this provider's sites",
	})
	_, err = requests.UpdateApproval(ctx, name, request, metav1.UpdateOptions{})
	return err
}
