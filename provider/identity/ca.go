package identity

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// DefaultNamespace is the provider's own namespace.
const DefaultNamespace = "skerry-system"

// caKey is where a CA's Secret holds further CAs; the others are Kubernetes' own.
const caKey = "ca.crt"

// CAConfig says where the CA is kept.
type CAConfig struct {
	Client    kubernetes.Interface // required
	Namespace string               // default DefaultNamespace
	Name      string               // of the Secret; default skerry-ca
	Life      time.Duration        // of a CA that is made; default 10 years
	Log       *slog.Logger         // default slog.Default()
}

// LoadCA returns the CA of this cluster's sites. It makes one if there is none;
// replicas that do so at once end up with the same.
func LoadCA(ctx context.Context, config CAConfig) (*bootstrap.CA, error) {
	if config.Client == nil {
		return nil, errors.New("load ca: Client is required")
	}
	namespace := cmp.Or(config.Namespace, DefaultNamespace)
	name := cmp.Or(config.Name, "skerry-ca")
	log := cmp.Or(config.Log, slog.Default())
	secrets := config.Client.CoreV1().Secrets(namespace)
	secret, err := secrets.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if secret, err = newCA(name, cmp.Or(config.Life, 10*365*24*time.Hour)); err != nil {
			return nil, fmt.Errorf("load ca: %w", err)
		}
		made, createErr := secrets.Create(ctx, secret, metav1.CreateOptions{})
		switch {
		case createErr == nil:
			log.Info("made the CA of this cluster's sites", "namespace", namespace, "secret", name)
			secret = made
		case apierrors.IsAlreadyExists(createErr): // by another replica
			secret, err = secrets.Get(ctx, name, metav1.GetOptions{})
		default:
			err = createErr
		}
	}
	if err != nil {
		return nil, fmt.Errorf("load ca from secret %s/%s: %w", namespace, name, err)
	}
	ca, err := bootstrap.ParseCA(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey], secret.Data[caKey])
	if err != nil {
		return nil, fmt.Errorf("load ca from secret %s/%s: %w", namespace, name, err)
	}
	if end := ca.Certificate().NotAfter; time.Until(end) < 365*24*time.Hour {
		log.Warn("the CA of this cluster's sites ends soon: no certificate outlives it", "until", end)
	}
	return ca, nil
}

func newCA(name string, life time.Duration) (*corev1.Secret, error) {
	ca, err := bootstrap.NewCA(time.Now(), life)
	if err != nil {
		return nil, err
	}
	cert, key, err := ca.PEM()
	if err != nil {
		return nil, err
	}
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Type:       corev1.SecretTypeTLS,
		Data:       map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key},
	}, nil
}
