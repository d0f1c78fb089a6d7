package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Networks of every cluster that this package starts.
const (
	ServiceCIDR = "10.96.0.0/16"
	serviceIP   = "10.96.0.1" // the kubernetes service
	Domain      = "cluster.local"
)

// Options say what to start. Every field but Dir may be left zero.
type Options struct {
	Dir     string    // holds all state; made if absent, the caller removes it
	Address string    // of the API server; default 127.0.0.1, which pods can't reach
	Out     io.Writer // progress; default none
}

// A Cluster is a running control plane. Its methods may be called concurrently
// but for Start… and Stop… of the same component.
type Cluster struct {
	Dir        string
	Kubeconfig string // of an administrator
	Kubectl    string // program
	Server     string // URL of the API server
	Address    string // host of the API server

	bin     string
	port    string // of the API server
	etcd    string // URL
	ca      *authority
	starter *starter
	node    *Node // nil but from StartNode to StopNode

	mu        sync.Mutex // guards processes
	processes map[string]*Process
}

// Start builds what is missing and starts etcd, kube-apiserver,
// kube-controller-manager and kube-scheduler. It returns when the API server is
// ready; ctx bounds the starting only. Stop ends what it started.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Address == "" {
		o.Address = "127.0.0.1"
	}
	bin, err := Build(ctx, o.Out)
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(o.Address, 3)
	if err != nil {
		return nil, fmt.Errorf("start cluster: %w", err)
	}
	c := &Cluster{
		Dir: o.Dir, Address: o.Address, Kubectl: filepath.Join(bin, "kubectl"),
		Server: "https://" + net.JoinHostPort(o.Address, ports[0]),
		bin:    bin, port: ports[0], etcd: "https://127.0.0.1:" + ports[1],
		starter: newStarter(), processes: map[string]*Process{},
	}
	if err := c.pki(); err != nil {
		return nil, fmt.Errorf("start cluster: certificates: %w", err)
	}
	if err := c.start(ctx, ports[2]); err != nil {
		c.Stop()
		return nil, fmt.Errorf("start cluster: %w", err)
	}
	return c, nil
}

func (c *Cluster) pki() (err error) {
	dir := filepath.Join(c.Dir, "pki")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if c.ca, err = newAuthority(dir, "ca"); err != nil {
		return err
	}
	front, err := newAuthority(dir, "front-proxy-ca")
	if err != nil {
		return err
	}
	if err := front.issue("front-proxy-client", pkix.Name{CommonName: "front-proxy-client"}); err != nil {
		return err
	}
	err = c.ca.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, c.Address, "127.0.0.1", serviceIP,
		"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc."+Domain)
	if err != nil {
		return err
	}
	if err := c.ca.issue("etcd", pkix.Name{CommonName: "etcd"}, "127.0.0.1"); err != nil {
		return err
	}
	kubelet := pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}
	if err := c.ca.issue("kubelet-client", kubelet); err != nil {
		return err
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		if _, err := c.ca.kubeconfig(name, c.Server, pkix.Name{CommonName: "system:" + name}); err != nil {
			return err
		}
	}
	c.Kubeconfig, err = c.ca.kubeconfig("admin", c.Server, pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}})
	if err != nil {
		return err
	}
	return writeKeyPair(filepath.Join(dir, "service-account"))
}

// writeKeyPair makes the key that signs service-account tokens.
func writeKeyPair(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o644); err != nil {
		return err
	}
	return os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600)
}

func (c *Cluster) start(ctx context.Context, peerPort string) error {
	if err := c.startEtcd(peerPort); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	pki := c.ca.path
	if _, err := c.kube("kube-controller-manager",
		"--kubeconfig="+pki("kube-controller-manager.kubeconfig"),
		"--authentication-kubeconfig="+pki("kube-controller-manager.kubeconfig"),
		"--authorization-kubeconfig="+pki("kube-controller-manager.kubeconfig"),
		"--use-service-account-credentials", "--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0",
		"--root-ca-file="+pki("ca.crt"), "--service-account-private-key-file="+pki("service-account.key"),
		"--cluster-signing-cert-file="+pki("ca.crt"), "--cluster-signing-key-file="+pki("ca.key"),
	); err != nil {
		return err
	}
	_, err := c.kube("kube-scheduler",
		"--kubeconfig="+pki("kube-scheduler.kubeconfig"),
		"--authentication-kubeconfig="+pki("kube-scheduler.kubeconfig"),
		"--authorization-kubeconfig="+pki("kube-scheduler.kubeconfig"),
		"--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0")
	return err
}

// startEtcd starts etcd without fsync: a cluster of tests need not survive a power cut.
func (c *Cluster) startEtcd(peerPort string) error {
	pki, peer := c.ca.path, "https://127.0.0.1:"+peerPort
	_, err := c.run("etcd", filepath.Join(c.bin, "etcd"),
		"--data-dir="+filepath.Join(c.Dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+c.etcd, "--advertise-client-urls="+c.etcd,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer,
		"--client-cert-auth", "--trusted-ca-file="+pki("ca.crt"), "--cert-file="+pki("etcd.crt"), "--key-file="+pki("etcd.key"),
		"--peer-client-cert-auth", "--peer-trusted-ca-file="+pki("ca.crt"), "--peer-cert-file="+pki("etcd.crt"), "--peer-key-file="+pki("etcd.key"))
	return err
}

// StartAPIServer starts kube-apiserver, as Start does and a test does again after
// [Process.Kill], and waits until it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	pki, reconciler := c.ca.path, "lease"
	if net.ParseIP(c.Address).IsLoopback() {
		reconciler = "none" // the kubernetes service may not point to loopback
	}
	p, err := c.kube("kube-apiserver",
		"--etcd-servers="+c.etcd, "--etcd-cafile="+pki("ca.crt"), "--etcd-certfile="+pki("etcd.crt"), "--etcd-keyfile="+pki("etcd.key"),
		"--bind-address="+c.Address, "--advertise-address="+c.Address, "--secure-port="+c.port,
		"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"), "--client-ca-file="+pki("ca.crt"),
		"--kubelet-certificate-authority="+pki("ca.crt"),
		"--kubelet-client-certificate="+pki("kubelet-client.crt"), "--kubelet-client-key="+pki("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname",
		"--service-account-issuer=https://kubernetes.default.svc."+Domain,
		"--service-account-key-file="+pki("service-account.pub"), "--service-account-signing-key-file="+pki("service-account.key"),
		"--service-cluster-ip-range="+ServiceCIDR,
		"--requestheader-client-ca-file="+pki("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file="+pki("front-proxy-client.crt"), "--proxy-client-key-file="+pki("front-proxy-client.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--anonymous-auth=false",
		"--allow-privileged", "--profiling=false", "--endpoint-reconciler-type="+reconciler, "--shutdown-delay-duration=0")
	if err != nil {
		return err
	}
	config, err := c.Config()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	return p.waitFor(ctx, time.Minute, func(ctx context.Context) error {
		return client.RESTClient().Get().AbsPath("/readyz").Timeout(5 * time.Second).Do(ctx).Error()
	})
}

// Config returns the configuration of an administrator's client.
func (c *Cluster) Config() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS = -1 // the API server's own fairness is the limit
	return config, nil
}

// CA is the file of the cluster's CA certificate.
func (c *Cluster) CA() string { return c.ca.path("ca.crt") }

// Client writes a kubeconfig for a user of the given groups and returns its path.
func (c *Cluster) Client(user string, groups ...string) (string, error) {
	return c.ca.kubeconfig("user-"+user, c.Server, pkix.Name{CommonName: user, Organization: groups})
}

// Process returns a running component by its name, as "kube-apiserver", or nil.
func (c *Cluster) Process(name string) *Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.processes[name]
}

// Stop ends all components, the last started first. A caller that has started a
// node, and wants to know whether all of it is gone, calls StopNode before.
func (c *Cluster) Stop() {
	_ = c.StopNode(context.Background())
	for _, name := range []string{"kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"} {
		if p := c.Process(name); p != nil {
			p.Stop(5 * time.Second)
		}
	}
	close(c.starter.done)
}

// Run starts any program as part of the cluster: it ends when this process does,
// and its output goes to Dir. Stop does not wait for it.
func (c *Cluster) Run(name string, argv ...string) (*Process, error) {
	return c.starter.run(name, c.Dir, argv...)
}

func (c *Cluster) kube(name string, args ...string) (*Process, error) {
	return c.run(name, append([]string{filepath.Join(c.bin, "kube"), name}, args...)...)
}

func (c *Cluster) run(name string, argv ...string) (*Process, error) {
	p, err := c.starter.run(name, c.Dir, argv...)
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.processes[name] = p
	}
	return p, err
}

// freePorts finds TCP ports that nothing listens on at host.
func freePorts(host string, n int) (ports []string, err error) {
	for range n {
		l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			return nil, err
		}
		defer l.Close() // all are held until all are found, so that they differ
		ports = append(ports, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	}
	return ports, nil
}

// healthy is a check for [Process.waitFor]: url answers 200 without TLS.
func healthy(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", url, resp.Status)
		}
		return nil
	}
}
