package server

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"sync/atomic"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	toolscache "k8s.io/client-go/tools/cache"
)

// Reviews asks the API server who may do what, by TokenReview and
// SubjectAccessReview. It is an [Authenticator] and an [Authorizer].
type Reviews struct{ Client kubernetes.Interface }

// Authenticate implements [Authenticator].
func (r Reviews) Authenticate(ctx context.Context, token string) (User, error) {
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}
	review, err := r.Client.AuthenticationV1().TokenReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return User{}, fmt.Errorf("token review: %w", err)
	}
	if !review.Status.Authenticated {
		return User{}, ErrUnauthenticated
	}
	info := review.Status.User
	user := User{Name: info.Username, UID: info.UID, Groups: info.Groups, Extra: map[string][]string{}}
	for k, v := range info.Extra {
		user.Extra[k] = v
	}
	return user, nil
}

// Authorize implements [Authorizer].
func (r Reviews) Authorize(ctx context.Context, user User, what Attributes) (bool, error) {
	spec := authorizationv1.SubjectAccessReviewSpec{
		User: user.Name, UID: user.UID, Groups: user.Groups, Extra: map[string]authorizationv1.ExtraValue{},
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Verb: what.Verb, Version: "v1", Resource: "nodes", Subresource: what.Subresource, Name: what.Site,
		},
	}
	for k, v := range user.Extra {
		spec.Extra[k] = v
	}
	review := &authorizationv1.SubjectAccessReview{Spec: spec}
	review, err := r.Client.AuthorizationV1().SubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return false, fmt.Errorf("access review: %w", err)
	}
	return review.Status.Allowed && !review.Status.Denied, nil
}

// Where every API server publishes the authority of its clients' certificates.
const (
	authenticationNamespace = metav1.NamespaceSystem
	authenticationConfig    = "extension-apiserver-authentication"
	clientCAKey             = "client-ca-file"
)

// A ClientCA is the authority that signs the certificates of the API server's clients
// and of the API server itself, as the cluster publishes it. It follows changes.
type ClientCA struct {
	client kubernetes.Interface
	log    *slog.Logger
	pool   atomic.Pointer[x509.CertPool]
}

// NewClientCA returns a ClientCA that knows no authority before [ClientCA.Run].
func NewClientCA(client kubernetes.Interface, log *slog.Logger) *ClientCA {
	return &ClientCA{client: client, log: log}
}

// Pool is what [Config.ClientCAs] wants: the authorities, nil before they are known.
func (c *ClientCA) Pool() *x509.CertPool { return c.pool.Load() }

// Run follows the cluster's authority until ctx is done. A ConfigMap that is missing
// or unreadable changes nothing.
func (c *ClientCA) Run(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(c.client, 0, informers.WithNamespace(authenticationNamespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, authenticationConfig).String()
		}))
	_, err := factory.Core().V1().ConfigMaps().Informer().AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    c.update,
		UpdateFunc: func(_, obj any) { c.update(obj) },
	})
	if err != nil {
		return fmt.Errorf("client authority: %w", err)
	}
	factory.StartWithContext(ctx)
	<-ctx.Done()
	factory.Shutdown()
	return nil
}

func (c *ClientCA) update(obj any) {
	m, ok := obj.(*corev1.ConfigMap)
	if !ok || m.Name != authenticationConfig {
		return
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(m.Data[clientCAKey])) {
		c.log.Warn("the cluster publishes no authority for client certificates", "configmap", m.Namespace+"/"+m.Name, "key", clientCAKey)
		return
	}
	if old := c.pool.Swap(pool); old == nil || !old.Equal(pool) {
		c.log.Info("authority for client certificates loaded", "configmap", m.Namespace+"/"+m.Name)
	}
}
