package probe

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// health asks a gRPC server by the gRPC health protocol.
func (c *checker) health(ctx context.Context, job job, limit time.Duration) (answer, string, error) {
	action := job.probe.GRPC
	if job.ip == "" {
		return unknown, "", fmt.Errorf("the pod has no IP address yet")
	}
	addr := net.JoinHostPort(job.ip, strconv.Itoa(int(action.Port)))
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(transportCredentials(action)),
		grpc.WithUserAgent("kube-probe/"+c.version),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxOutput)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		}))
	if err != nil {
		return unknown, "", err
	}
	defer conn.Close()

	request := &grpc_health_v1.HealthCheckRequest{}
	if action.Service != nil {
		request.Service = *action.Service
	}
	resp, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, request)
	switch s := status.Convert(err); {
	case err == nil:
	case s.Code() == codes.Unimplemented:
		return failure, "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): " + s.Message(), nil
	case s.Code() == codes.DeadlineExceeded && conn.GetState() != connectivity.Ready:
		return failure, fmt.Sprintf("timeout: failed to connect service %q within %v: %v", addr, limit, context.DeadlineExceeded), nil
	case s.Code() == codes.DeadlineExceeded:
		return failure, fmt.Sprintf("timeout: health rpc did not complete within %v", limit), nil
	case s.Code() == codes.Unavailable:
		return failure, fmt.Sprintf("error: failed to connect service at %q: %s", addr, s.Message()), nil
	default:
		return failure, fmt.Sprintf("error: health rpc probe failed: %v", err), nil
	}
	if resp.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return failure, fmt.Sprintf("service unhealthy (responded with %q)", resp.GetStatus()), nil
	}
	return success, "", nil
}

func transportCredentials(action *corev1.GRPCAction) credentials.TransportCredentials {
	if action.Mode != nil && *action.Mode == corev1.GRPCProbeModeTLS {
		return credentials.NewTLS(anyCertificate())
	}
	return insecure.NewCredentials()
}
