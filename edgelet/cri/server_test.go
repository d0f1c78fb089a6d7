package cri

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A server is a runtime as gRPC sees it, for what a real one does not do on demand.
type server struct {
	cri.UnimplementedRuntimeServiceServer
	events func(cri.RuntimeService_GetContainerEventsServer) error
}

func (s *server) GetContainerEvents(_ *cri.GetEventsRequest, stream cri.RuntimeService_GetContainerEventsServer) error {
	return s.events(stream)
}

func (s *server) StopContainer(context.Context, *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	return nil, status.Error(codes.NotFound, "no such container")
}

func (s *server) ListContainers(ctx context.Context, _ *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	<-ctx.Done() // hang
	return nil, ctx.Err()
}

// serve starts a server on a socket.
func serve(t *testing.T, socket string, s *server, more func(*grpc.Server)) *grpc.Server {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(g, s)
	if more != nil {
		more(g)
	}
	go g.Serve(l)
	t.Cleanup(g.Stop)
	return g
}

func dial(t *testing.T, socket string) *Client {
	t.Helper()
	c, err := Dial(Config{Endpoint: "unix://" + socket, QueryTimeout: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// watchIn watches until the test ends.
func watchIn(t *testing.T, c *Client) <-chan types.UID {
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan types.UID, 100)
	done := make(chan error, 1)
	go func() { done <- c.Watch(ctx, func(uid types.UID) { got <- uid }) }()
	t.Cleanup(func() { cancel(); <-done })
	return got
}

func want(t *testing.T, got <-chan types.UID, uids ...types.UID) {
	t.Helper()
	for _, uid := range uids {
		select {
		case g := <-got:
			if g != uid {
				t.Fatalf("told of %q, want %q", g, uid)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of %q", uid)
		}
	}
}

func event(kind cri.ContainerEventType, id, uid string) *cri.ContainerEventResponse {
	e := &cri.ContainerEventResponse{ContainerId: id, ContainerEventType: kind}
	if uid != "" {
		e.PodSandboxStatus = &cri.PodSandboxStatus{Metadata: &cri.PodSandboxMetadata{Uid: uid}}
	}
	return e
}

func TestWatchByCRIAcrossARestart(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	s := &server{events: func(stream cri.RuntimeService_GetContainerEventsServer) error {
		stream.Send(event(cri.ContainerEventType_CONTAINER_CREATED_EVENT, "c0", "u0"))
		stream.Send(event(cri.ContainerEventType_CONTAINER_STARTED_EVENT, "c1", "u1"))
		stream.Send(event(cri.ContainerEventType_CONTAINER_DELETED_EVENT, "c2", ""))
		<-stream.Context().Done()
		return nil
	}}
	c := dial(t, socket) // before there is a server
	c.index.add(containers, "c2", "u2")
	got := watchIn(t, c)
	first := serve(t, socket, s, nil)
	want(t, got, "", "u1", "u2")
	first.Stop()
	serve(t, socket, s, nil)
	want(t, got, "", "u1", "u2")
}

func TestWatchByContainerdWhereCRIHasNoEvents(t *testing.T) {
	for name, refusal := range map[string]error{
		"unknown call":        status.Error(codes.Unimplemented, "unknown method"),
		"events switched off": status.Error(codes.Unknown, "evented PLEG is not enabled"),
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			s := &server{events: func(cri.RuntimeService_GetContainerEventsServer) error { return refusal }}
			serve(t, socket, s, func(g *grpc.Server) {
				g.RegisterService(&grpc.ServiceDesc{
					ServiceName: "containerd.services.events.v1.Events", HandlerType: (*any)(nil),
					Streams: []grpc.StreamDesc{{StreamName: "Subscribe", ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
						return subscription(stream, envelope("moby", topicExit, "c1", "c1"), envelope("k8s.io", topicExit, "c1", "c1"))
					}}},
				}, struct{}{})
			})
			c := dial(t, socket)
			c.index.add(containers, "c1", "u1")
			want(t, watchIn(t, c), "", "", "u1")
		})
	}
}

// subscription sends events that are encoded already, as the proto codec cannot:
// as the unknown fields of a message without fields.
func subscription(stream grpc.ServerStream, events ...[]byte) error {
	for _, data := range events {
		message := &cri.VersionResponse{}
		message.ProtoReflect().SetUnknown(data)
		if err := stream.SendMsg(message); err != nil {
			return err
		}
	}
	<-stream.Context().Done()
	return nil
}

func TestCallsAgainstAServer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	c := dial(t, socket)
	if _, err := c.ListContainers(t.Context()); status.Code(err) != codes.Unavailable && status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("without a server: %v", err)
	}
	serve(t, socket, &server{}, nil)
	for status.Code(c.StopContainer(t.Context(), "c", 0)) == codes.Unavailable && t.Context().Err() == nil {
		time.Sleep(10 * time.Millisecond) // until it has connected
	}
	if err := c.StopContainer(t.Context(), "c", 0); err != nil {
		t.Errorf("stop of what is not there: %v", err)
	}
	began := time.Now()
	if _, err := c.ListContainers(t.Context()); status.Code(err) != codes.DeadlineExceeded || time.Since(began) > 5*time.Second {
		t.Errorf("a server that hangs: %v after %v", err, time.Since(began))
	}
	if _, err := c.Version(t.Context()); status.Code(err) != codes.Unimplemented {
		t.Errorf("a server without the call: %v", err)
	}
}
