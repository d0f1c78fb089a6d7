package bootstrap

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"
)

// ServerConfig configures the certificate that a provider shows.
type ServerConfig struct {
	CA    *CA           // required
	Names []string      // DNS names and IP addresses besides ServerName, for others than sites; may be empty
	Life  time.Duration // default 30 days
	Log   *slog.Logger  // default slog.Default()
}

// A ServerCertificate is the certificate that one replica of the provider shows.
// Its key lives in memory only; it is issued anew at two thirds of its life. It
// is safe for concurrent use.
type ServerCertificate struct {
	ServerConfig

	mu   sync.Mutex // guards what follows
	cert *tls.Certificate
	due  time.Time
}

// NewServerCertificate issues the first certificate.
func NewServerCertificate(config ServerConfig) (*ServerCertificate, error) {
	config.Life = cmp.Or(config.Life, 30*24*time.Hour)
	config.Log = cmp.Or(config.Log, slog.Default())
	if config.CA == nil || config.Life < time.Minute {
		return nil, errors.New("server certificate: a CA is required, and a life of a minute or more")
	}
	for _, name := range config.Names {
		host := strings.TrimPrefix(strings.ToLower(name), "*.")
		if net.ParseIP(name) == nil && !validHost(host) {
			return nil, fmt.Errorf("server certificate: %q is neither an IP address nor a DNS name", name)
		}
	}
	s := &ServerCertificate{ServerConfig: config}
	_, err := s.GetCertificate(nil)
	return s, err
}

// validHost reports whether name is a DNS name of at most 253 characters.
func validHost(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		if len(label) > maxSite || ValidateSite(label) != nil {
			return false
		}
	}
	return len(name) <= 253
}

// GetCertificate is for tls.Config.
func (s *ServerCertificate) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.cert != nil && now.Before(s.due) {
		return s.cert, nil
	}
	cert, err := s.CA.IssueServer(s.Names, now, s.Life)
	if err != nil {
		return nil, err
	}
	s.cert, s.due = cert, dueAt(now, cert.Leaf.NotAfter)
	s.Log.Info("server certificate issued", "names", s.Names, "until", cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	return cert, nil
}
