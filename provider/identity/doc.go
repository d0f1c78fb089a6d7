// Package identity keeps what package bootstrap needs in Kubernetes objects: the
// CA and the join tokens in Secrets of the provider's own namespace, the record of
// each site in the annotations of a Lease there, and every request for a
// certificate as a CertificateSigningRequest that people can see and deny.
//
// # Objects
//
//	Secret skerry-ca                      tls.crt, tls.key; ca.crt: more CAs to trust
//	Secret bootstrap-token-<id>           one join token; no secret is in it, but its SHA-256
//	Lease  site-<site>                    annotations, see below; spec belongs to others
//	CertificateSigningRequest             of signer skerry.io/edge-client, named
//	       skerry-<site>-<hash>           skerry.io/site=<site>; removed by Kubernetes itself
//
// Annotations of the Lease, of which this package alone writes all but revoked:
//
//	skerry.io/serial        serial of the last certificate, which other replicas compare and swap
//	skerry.io/certificate   bootstrap.Record as JSON
//	skerry.io/revoked       why the site is cut off; "false" or absent: it is not
//
// Deleting the Lease cuts the site off too, and it must join anew.
//
// Tokens are of type bootstrap.kubernetes.io/token, but are no use at the API
// server: it looks for tokens in kube-system only, and these lack the secret and
// the usage that authenticates.
//
// # Rights
//
// What the provider's service account needs for this package:
//
//	in its namespace  secrets                                      get, create, patch, list, delete
//	                  leases (coordination.k8s.io)                 get, list, watch, create, patch
//	in the cluster    nodes                                        get
//	                  certificatesigningrequests                   get, create
//	                  certificatesigningrequests/approval, /status update
//	                  signers skerry.io/edge-client                approve, sign
package identity
