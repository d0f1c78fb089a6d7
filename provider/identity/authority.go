package identity

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

const (
	// SignerName is the signer of sites' certificates.
	SignerName = "skerry.io/edge-client"

	// LabelSite names the site that an object belongs to.
	LabelSite = "skerry.io/site"

	// Annotations of a site's Lease, see the package's doc.
	AnnotationSerial      = "skerry.io/serial"
	AnnotationCertificate = "skerry.io/certificate"
	AnnotationRevoked     = "skerry.io/revoked"

	annotationSource = "skerry.io/source" // of a request: address of the sender

	leasePrefix = "site-"
)

// LeaseName is the name of a site's Lease.
func LeaseName(site string) string { return leasePrefix + site }

// AuthorityConfig configures where requests and records are kept.
type AuthorityConfig struct {
	Client    kubernetes.Interface // required
	Namespace string               // of the Leases; default DefaultNamespace

	// Manual leaves the approval of joins to people: kubectl certificate approve.
	// Renewals are always approved, as nobody may come by for years.
	Manual bool

	Log *slog.Logger // default slog.Default()
}

// An Authority implements [bootstrap.Authority] on Kubernetes objects. It is safe
// for concurrent use by any number of replicas.
type Authority struct {
	client    kubernetes.Interface
	namespace string
	manual    bool
	log       *slog.Logger
}

// NewAuthority returns the authority of a namespace.
func NewAuthority(config AuthorityConfig) (*Authority, error) {
	if config.Client == nil {
		return nil, errors.New("authority: Client is required")
	}
	return &Authority{
		client:    config.Client,
		namespace: cmp.Or(config.Namespace, DefaultNamespace),
		manual:    config.Manual,
		log:       cmp.Or(config.Log, slog.Default()),
	}, nil
}

// Lookup implements [bootstrap.Authority].
func (a *Authority) Lookup(ctx context.Context, site string) (bootstrap.Record, error) {
	record, err := a.record(ctx, site)
	if err != nil || record.Serial != "" {
		return record, err
	}
	node, err := a.client.CoreV1().Nodes().Get(ctx, site, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return record, nil
	case err != nil:
		return record, fmt.Errorf("record of %s: %w", site, err)
	case node.Labels[LabelSite] != site:
		return record, bootstrap.NodeExists
	}
	return record, nil
}

// record reads the record of a site from the API server.
func (a *Authority) record(ctx context.Context, site string) (bootstrap.Record, error) {
	lease, err := a.lease(ctx, site)
	if err != nil && !apierrors.IsNotFound(err) {
		return bootstrap.Record{}, fmt.Errorf("record of %s: %w", site, err)
	}
	return recordOf(lease)
}

func (a *Authority) lease(ctx context.Context, site string) (*coordinationv1.Lease, error) {
	lease, err := a.client.CoordinationV1().Leases(a.namespace).Get(ctx, LeaseName(site), metav1.GetOptions{})
	if err != nil {
		return nil, err // a fake returns an object all the same
	}
	return lease, nil
}

// recordOf reads the record in a Lease; none is a zero record.
func recordOf(lease *coordinationv1.Lease) (record bootstrap.Record, err error) {
	if lease == nil {
		return record, nil
	}
	if text, ok := lease.Annotations[AnnotationCertificate]; ok {
		if err := json.Unmarshal([]byte(text), &record); err != nil {
			return bootstrap.Record{}, fmt.Errorf("lease %s: annotation %s: %w", lease.Name, AnnotationCertificate, err)
		}
		record.Serial = lease.Annotations[AnnotationSerial]
	}
	if why, ok := lease.Annotations[AnnotationRevoked]; ok && why != "false" {
		record.Revoked = cmp.Or(why, "no reason given")
	}
	return record, nil
}

// An operation is one of a JSON patch.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"` // null in a test: is absent
}

// annotationPath is the JSON pointer to an annotation.
func annotationPath(key string) string {
	return "/metadata/annotations/" + strings.ReplaceAll(key, "/", "~1")
}

// Commit implements [bootstrap.Authority]. The API server compares the serial and
// swaps; nothing else of the Lease is touched, so that others may use it.
func (a *Authority) Commit(ctx context.Context, site string, old, next bootstrap.Record) error {
	text, err := json.Marshal(next)
	if err != nil {
		return fmt.Errorf("record of %s: %w", site, err)
	}
	annotations := map[string]string{AnnotationSerial: next.Serial, AnnotationCertificate: string(text)}
	leases := a.client.CoordinationV1().Leases(a.namespace)
	lease, err := a.lease(ctx, site)
	switch {
	case apierrors.IsNotFound(err) && old.Serial == "":
		_, err = leases.Create(ctx, newLease(site, annotations), metav1.CreateOptions{})
	case apierrors.IsNotFound(err):
		return bootstrap.ErrConflict // deleted meanwhile
	case err == nil && lease.Annotations[AnnotationSerial] != old.Serial:
		return bootstrap.ErrConflict
	case err == nil:
		var patch []byte
		if patch, err = json.Marshal(swap(lease, old, annotations)); err == nil {
			_, err = leases.Patch(ctx, lease.Name, types.JSONPatchType, patch, metav1.PatchOptions{})
		}
	}
	if err == nil {
		return nil
	}
	// Someone was faster, or only the answer was lost: the object knows.
	after, getErr := a.lease(ctx, site)
	if getErr != nil {
		return fmt.Errorf("record of %s: %w", site, errors.Join(err, getErr))
	}
	switch serial := after.Annotations[AnnotationSerial]; {
	case serial == next.Serial && after.Annotations[AnnotationCertificate] == string(text):
		return nil
	case serial != old.Serial, apierrors.IsAlreadyExists(err), apierrors.IsInvalid(err):
		return bootstrap.ErrConflict
	}
	return fmt.Errorf("record of %s: %w", site, err)
}

// swap is the patch that sets annotations if the serial is still that of old.
func swap(lease *coordinationv1.Lease, old bootstrap.Record, annotations map[string]string) []operation {
	if len(lease.Annotations) == 0 {
		return []operation{
			{Op: "test", Path: "/metadata/annotations", Value: nil},
			{Op: "add", Path: "/metadata/annotations", Value: annotations},
		}
	}
	var was any
	if old.Serial != "" {
		was = old.Serial
	}
	ops := []operation{{Op: "test", Path: annotationPath(AnnotationSerial), Value: was}}
	for key, value := range annotations {
		ops = append(ops, operation{Op: "add", Path: annotationPath(key), Value: value})
	}
	return ops
}

func newLease(site string, annotations map[string]string) *coordinationv1.Lease {
	return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{
		Name: LeaseName(site), Labels: map[string]string{LabelSite: site}, Annotations: annotations,
	}}
}

// requestName names the object of a request: the same for the same request.
func requestName(req bootstrap.Request) string {
	sum := sha256.Sum256([]byte(req.Key + " " + req.Basis))
	return fmt.Sprintf("skerry-%s-%x", req.Site, sum[:8])
}

// Approve implements [bootstrap.Authority].
func (a *Authority) Approve(ctx context.Context, req bootstrap.Request) error {
	_, err := a.approved(ctx, req, requestName(req), a.manual && !req.Renewal)
	return err
}

// maxUpdates bounds how often an object is updated that others update too.
const maxUpdates = 5

// approved returns the request's object of the given name once it is approved.
// It makes and, unless a person is to do so, approves it if need be.
func (a *Authority) approved(ctx context.Context, req bootstrap.Request, name string, manual bool) (*certificatesv1.CertificateSigningRequest, error) {
	csrs := a.client.CertificatesV1().CertificateSigningRequests()
	for range maxUpdates {
		object, err := csrs.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			object, err = csrs.Create(ctx, newObject(req, name), metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) {
				continue
			}
		}
		if err != nil {
			return nil, fmt.Errorf("request %s: %w", name, err)
		}
		if err := fits(object, req); err != nil {
			return nil, fmt.Errorf("request %s: %w", name, err)
		}
		switch done, err := decided(object); {
		case err != nil:
			return nil, err
		case done:
			return object, nil
		case manual:
			return nil, &bootstrap.Error{Code: bootstrap.Pending, Detail: "kubectl certificate approve " + name}
		}
		object.Status.Conditions = append(object.Status.Conditions, approval(req))
		object, err = csrs.UpdateApproval(ctx, name, object, metav1.UpdateOptions{})
		if err == nil {
			return object, nil
		}
		if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("approve request %s: %w", name, err)
		}
	}
	return nil, fmt.Errorf("approve request %s: others keep changing it", name)
}

func newObject(req bootstrap.Request, name string) *certificatesv1.CertificateSigningRequest {
	return &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{
			Name:        name,
			Labels:      map[string]string{LabelSite: req.Site},
			Annotations: map[string]string{annotationSource: req.Source},
		},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: req.CSR.Raw}),
			SignerName: SignerName,
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth},
		},
	}
}

// fits checks that the object is of this request: others may make objects too.
func fits(object *certificatesv1.CertificateSigningRequest, req bootstrap.Request) error {
	block, _ := pem.Decode(object.Spec.Request)
	if block == nil || object.Spec.SignerName != SignerName {
		return errors.New("another object has its name")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return err
	}
	if key, err := bootstrap.KeyID(csr.PublicKey); err != nil || key != req.Key {
		return errors.New("another object has its name")
	}
	return nil
}

// decided reports whether the request has been approved, or why it never will.
func decided(object *certificatesv1.CertificateSigningRequest) (approved bool, err error) {
	for _, c := range object.Status.Conditions {
		if c.Status == corev1.ConditionFalse {
			continue
		}
		switch c.Type {
		case certificatesv1.CertificateDenied, certificatesv1.CertificateFailed:
			return false, &bootstrap.Error{Code: bootstrap.Denied, Detail: strings.TrimSpace(c.Reason + ": " + c.Message)}
		case certificatesv1.CertificateApproved:
			approved = true
		}
	}
	return approved, nil
}

func approval(req bootstrap.Request) certificatesv1.CertificateSigningRequestCondition {
	c := certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue,
		Reason: "JoinToken", Message: "joined with token " + req.Basis,
	}
	if req.Renewal {
		c.Reason, c.Message = "Renewal", "renews the certificate with serial "+req.Basis
	}
	return c
}

// Publish implements [bootstrap.Authority].
func (a *Authority) Publish(ctx context.Context, req bootstrap.Request, chain []byte) error {
	serial, err := serialOf(chain)
	if err != nil {
		return fmt.Errorf("publish certificate of %s: %w", req.Site, err)
	}
	name := requestName(req)
	for range maxUpdates {
		// It was approved before; if Kubernetes has removed it since, it still is.
		object, err := a.approved(ctx, req, name, false)
		if err != nil {
			return err
		}
		if len(object.Status.Certificate) > 0 {
			if published, err := serialOf(object.Status.Certificate); err == nil && published == serial {
				return nil
			}
			// The same request was answered long ago, with what has expired since.
			name = requestName(req) + "-" + serial[max(0, len(serial)-8):]
			continue
		}
		object.Status.Certificate = chain
		_, err = a.client.CertificatesV1().CertificateSigningRequests().UpdateStatus(ctx, object, metav1.UpdateOptions{})
		if err == nil {
			return nil
		}
		if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) && !apierrors.IsInvalid(err) {
			return fmt.Errorf("publish certificate of %s: %w", req.Site, err)
		}
	}
	return fmt.Errorf("publish certificate of %s: others keep changing request %s", req.Site, name)
}

func serialOf(chain []byte) (string, error) {
	block, _ := pem.Decode(chain)
	if block == nil {
		return "", errors.New("no certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", err
	}
	return bootstrap.Serial(cert), nil
}

// Revoke cuts a site off, and says why; it need not have joined. An empty why
// lifts that.
func Revoke(ctx context.Context, client kubernetes.Interface, namespace, site, why string) error {
	if err := bootstrap.ValidateSite(site); err != nil {
		return fmt.Errorf("revoke: %w", err)
	}
	var value any // null removes
	annotations := map[string]string{}
	if why != "" {
		value = why
		annotations[AnnotationRevoked] = why
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{AnnotationRevoked: value}}})
	if err != nil {
		return fmt.Errorf("revoke %s: %w", site, err)
	}
	leases := client.CoordinationV1().Leases(cmp.Or(namespace, DefaultNamespace))
	_, err = leases.Patch(ctx, LeaseName(site), types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) && why != "" {
		_, err = leases.Create(ctx, newLease(site, maps.Clone(annotations)), metav1.CreateOptions{})
	}
	if err != nil {
		return fmt.Errorf("revoke %s: %w", site, err)
	}
	return nil
}
