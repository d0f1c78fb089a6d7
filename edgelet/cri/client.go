// Package cri talks to a container runtime, containerd or CRI-O or any other that
// serves CRI v1 on a unix socket.
//
// A [Client] does not need the runtime to be up: calls fail until it is, with code
// Unavailable, and work again after it has been restarted, killed or stopped for a
// while. Every call has a deadline, so a runtime that hangs cannot hold a caller for
// ever. Errors are of type [*Error] and carry the gRPC code.
//
// [Client.Watch] tells of containers that end without polling: by CRI's event stream
// where there is one (containerd 2, CRI-O), else by containerd's own event service
// on the same socket, which containerd 1.x has. Where both are missing, only the
// caller's own relist notices.
//
// Build with the tag grpcnotrace: it keeps html/template out of the binary.
package cri

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage bounds an answer of the runtime, in bytes: lists of hundreds of pods
// and images are well below, and a memory of a few hundred MiB survives it.
const maxMessage = 16 << 20

// Config configures a client. The zero value is usable.
type Config struct {
	Endpoint     string        // unix:///path; default what Discover finds
	QueryTimeout time.Duration // of calls that only look; default 10s
	Timeout      time.Duration // of calls that change something; default 2m, twice that for a sandbox, whose network may be slow
	PullTimeout  time.Duration // of one image pull; default 1h
	Log          *slog.Logger  // default slog.Default()
}

// A Client is a connection to a runtime. Its methods may be called concurrently.
type Client struct {
	config  Config
	conn    *grpc.ClientConn
	runtime cri.RuntimeServiceClient
	images  cri.ImageServiceClient
	index   index // pod of each sandbox and container
}

// Dial prepares a client without connecting.
func Dial(config Config) (*Client, error) {
	if config.Endpoint == "" {
		endpoint, err := Discover()
		if err != nil {
			return nil, err
		}
		config.Endpoint = endpoint
	}
	if path, ok := strings.CutPrefix(config.Endpoint, "unix://"); !ok || !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("runtime endpoint %q: want unix:///path", config.Endpoint)
	}
	config.QueryTimeout = cmp.Or(config.QueryTimeout, 10*time.Second)
	config.Timeout = cmp.Or(config.Timeout, 2*time.Minute)
	config.PullTimeout = cmp.Or(config.PullTimeout, time.Hour)
	config.Log = cmp.Or(config.Log, slog.Default())
	// A local socket costs nothing to try, and pods wait for it.
	reconnect := grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
		MinConnectTimeout: 2 * time.Second,
	}
	conn, err := grpc.NewClient(config.Endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket that only root may open
		grpc.WithConnectParams(reconnect),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("runtime endpoint %s: %w", config.Endpoint, err)
	}
	return &Client{
		config: config, conn: conn,
		runtime: cri.NewRuntimeServiceClient(conn), images: cri.NewImageServiceClient(conn),
		index: newIndex(),
	}, nil
}

// Endpoint is where the runtime is.
func (c *Client) Endpoint() string { return c.config.Endpoint }

// Close ends the connection and all calls on it.
func (c *Client) Close() error { return c.conn.Close() }

// sockets are where runtimes listen, in the order in which they are looked for.
var sockets = []string{"/run/containerd/containerd.sock", "/run/crio/crio.sock"}

// Discover returns the endpoint of the first runtime that has a socket on this
// machine, whether or not it answers.
func Discover() (string, error) { return discover(sockets) }

func discover(paths []string) (string, error) {
	for _, path := range paths {
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode().Type() != fs.ModeSocket {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("find a container runtime: %w", err)
		}
		return "unix://" + path, nil
	}
	return "", fmt.Errorf("find a container runtime: no socket at %s", strings.Join(paths, ", "))
}

// A method is a generated client method.
type method[Req, Resp any] func(context.Context, Req, ...grpc.CallOption) (Resp, error)

// An operation names a call for its errors and bounds it.
type operation struct {
	name   string // such as "stop container"
	object string // id or name, may be empty
	limit  time.Duration
}

// do makes one call with a deadline and gives its error a name.
func do[Req, Resp any](ctx context.Context, op operation, call method[Req, Resp], req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, op.limit)
	defer cancel()
	resp, err := call(ctx, req)
	return resp, wrap(op.name, op.object, err)
}
