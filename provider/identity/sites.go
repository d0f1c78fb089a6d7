package identity

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/client-go/informers"
	coordinationinformers "k8s.io/client-go/informers/coordination/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// SitesConfig configures [Sites].
type SitesConfig struct {
	Client    kubernetes.Interface // required
	Namespace string               // default DefaultNamespace

	// Leases is a shared informer of the namespace's Leases, which the caller
	// runs. Nil: Sites makes and runs one of its own.
	Leases coordinationinformers.LeaseInformer

	Log *slog.Logger // default slog.Default()
}

// Sites knows which certificates are good at this moment, from a watch of the
// sites' Leases. It is safe for concurrent use.
type Sites struct {
	authority *Authority
	informer  cache.SharedIndexInformer
	own       informers.SharedInformerFactory // nil: the caller runs the informer
	namespace string
	log       *slog.Logger
	confirm   chan seen // what does not fit waits for the site's next session
}

// A seen certificate is in use while its predecessor is still good.
type seen struct{ site, serial string }

// NewSites returns the sites of a namespace; Run does its work.
func NewSites(config SitesConfig) (*Sites, error) {
	authority, err := NewAuthority(AuthorityConfig{Client: config.Client, Namespace: config.Namespace, Log: config.Log})
	if err != nil {
		return nil, fmt.Errorf("sites: %w", err)
	}
	s := &Sites{
		authority: authority,
		namespace: authority.namespace,
		log:       cmp.Or(config.Log, slog.Default()),
		confirm:   make(chan seen, 256),
	}
	leases := config.Leases
	if leases == nil {
		s.own = informers.NewSharedInformerFactoryWithOptions(config.Client, 0, informers.WithNamespace(s.namespace))
		leases = s.own.Coordination().V1().Leases()
	}
	s.informer = leases.Informer()
	return s, nil
}

// Run keeps the knowledge fresh until ctx is done, which is no error.
func (s *Sites) Run(ctx context.Context) error {
	if s.own != nil {
		s.own.StartWithContext(ctx)
		defer s.own.Shutdown()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case cert := <-s.confirm:
			if err := s.retire(ctx, cert); err != nil && ctx.Err() == nil {
				s.log.Debug("certificate's predecessor not retired yet", "site", cert.site, "err", err)
			}
		}
	}
}

// HasSynced reports whether all sites are known. Until then none is admitted.
func (s *Sites) HasSynced() bool { return s.informer.HasSynced() }

// Admit returns the site of a session's client certificate if that is good now:
// the last one of a site that is not cut off. The caller has verified the chain
// and the time. Errors are a [bootstrap.Code]; Unavailable means to try later.
func (s *Sites) Admit(ctx context.Context, cert *x509.Certificate) (site string, err error) {
	site, err = bootstrap.SiteFromCertificate(cert)
	if err != nil {
		return "", &bootstrap.Error{Code: bootstrap.NotOurs, Err: err}
	}
	if !s.HasSynced() {
		return "", &bootstrap.Error{Code: bootstrap.Unavailable, Site: site, Detail: "still starting"}
	}
	record, err := s.Record(site)
	if err == nil && record.Serial == "" && record.Revoked == "" {
		// It may have joined a moment ago, at another replica.
		record, err = s.authority.record(ctx, site)
	}
	if err != nil {
		return "", &bootstrap.Error{Code: bootstrap.Unavailable, Site: site, Err: err}
	}
	used, err := record.Admits(cert.SerialNumber)
	if err != nil {
		return "", refusal(site, err)
	}
	if used {
		select {
		case s.confirm <- seen{site, record.Serial}:
		default:
		}
	}
	return site, nil
}

// refusal names the site in why it is not admitted: the site reads it.
func refusal(site string, err error) error {
	if e, ok := errors.AsType[*bootstrap.Error](err); ok {
		e.Site = site
		return e
	}
	if code, ok := errors.AsType[bootstrap.Code](err); ok {
		return &bootstrap.Error{Code: code, Site: site}
	}
	return fmt.Errorf("site %s: %w", site, err)
}

// retire ends the predecessor of a certificate that has been used: from then on a
// copy of the site's older state is refused.
func (s *Sites) retire(ctx context.Context, cert seen) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	record, err := s.authority.record(ctx, cert.site)
	if err != nil || record.Serial != cert.serial || record.Previous == "" {
		return err
	}
	return s.authority.Commit(ctx, cert.site, record, record.Confirmed())
}

// Record returns the record of a site as this replica knows it; zero if there is
// none.
func (s *Sites) Record(site string) (bootstrap.Record, error) {
	object, ok, err := s.informer.GetStore().GetByKey(s.namespace + "/" + LeaseName(site))
	if err != nil || !ok {
		return bootstrap.Record{}, err
	}
	lease, ok := object.(*coordinationv1.Lease)
	if !ok {
		return bootstrap.Record{}, fmt.Errorf("record of %s: not a Lease: %T", site, object)
	}
	return recordOf(lease)
}

// Revoked says whether a site is cut off, and why.
func (s *Sites) Revoked(site string) (why string, revoked bool) {
	record, err := s.Record(site)
	return record.Revoked, err == nil && record.Revoked != ""
}

// Watch calls changed until ctx is done, which is no error: with ended true when
// the certificates that a site's sessions showed are good no more, because it is
// cut off, its Lease deleted, or its name taken over by a new installation, so
// that its sessions must end; with false on every other change of its identity,
// such as a renewal. What is cut off when Watch begins is told too. Calls come
// one at a time.
func (s *Sites) Watch(ctx context.Context, changed func(site string, ended bool)) error {
	notify := func(site string, ended bool) {
		if ctx.Err() == nil {
			changed(site, ended)
		}
	}
	registration, err := s.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(object any) {
			if site, identity := identityOf(object); identity.revoked {
				notify(site, true)
			}
		},
		UpdateFunc: func(before, after any) {
			_, old := identityOf(before)
			if site, identity := identityOf(after); site != "" && identity != old {
				notify(site, identity.revoked || replaced(before, after))
			}
		},
		DeleteFunc: func(object any) {
			if last, ok := object.(cache.DeletedFinalStateUnknown); ok {
				object = last.Obj
			}
			if site, identity := identityOf(object); identity != (leaseIdentity{}) {
				notify(site, true)
			}
		},
	})
	if err != nil {
		return fmt.Errorf("watch sites: %w", err)
	}
	<-ctx.Done()
	if err := s.informer.RemoveEventHandler(registration); err != nil {
		return fmt.Errorf("watch sites: %w", err)
	}
	return nil
}

// replaced reports whether a Lease's certificate is not in the lineage of the one
// before it.
func replaced(before, after any) bool {
	old, err := leaseRecord(before)
	if err != nil || old.Serial == "" {
		return false
	}
	next, err := leaseRecord(after)
	return err == nil && next.Serial != old.Serial && next.Previous != old.Serial
}

func leaseRecord(object any) (bootstrap.Record, error) {
	lease, _ := object.(*coordinationv1.Lease)
	return recordOf(lease)
}

// A leaseIdentity is what a Lease says of a site's identity; renewals of the
// Lease, which are many, do not change it.
type leaseIdentity struct {
	serial, certificate string
	revoked             bool
}

// identityOf reads a Lease; site is empty if it is not a site's.
func identityOf(object any) (site string, identity leaseIdentity) {
	lease, ok := object.(*coordinationv1.Lease)
	if !ok {
		return "", identity
	}
	site, ok = strings.CutPrefix(lease.Name, leasePrefix)
	if !ok {
		return "", identity
	}
	why, revoked := lease.Annotations[AnnotationRevoked]
	return site, leaseIdentity{
		serial:      lease.Annotations[AnnotationSerial],
		certificate: lease.Annotations[AnnotationCertificate],
		revoked:     revoked && why != "false",
	}
}
