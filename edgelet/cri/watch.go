package cri

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/internal/backoff"
)

// How the watch comes back.
const (
	retryBase  = 100 * time.Millisecond
	retryLimit = 5 * time.Second
	retryBlind = 5 * time.Minute // when the runtime has no events at all, which an update may change
)

// Watch calls changed with the UID of each pod of which a container or the sandbox
// has started, ended or been removed, and with "" each time it has connected, as
// something may have happened before. It reconnects until ctx is done, and returns
// its cause then. Changed must not block.
//
// Events are a hint and no more: the caller looks for itself, and relists now and
// then, since a runtime may drop events.
func (c *Client) Watch(ctx context.Context, changed func(types.UID)) error {
	failures := 0
	for ctx.Err() == nil {
		began := time.Now()
		err := c.watchOnce(ctx, changed)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > retryLimit {
			failures = 0
		}
		delay := backoff.Delay(failures, retryBase, retryLimit)
		if errors.Is(err, errNoEvents) {
			c.config.Log.Warn("the container runtime has no events, polling alone notices changes", "endpoint", c.config.Endpoint)
			delay = retryBlind
		} else if failures == 0 {
			c.config.Log.Info("watch of the container runtime ended, reconnecting", "error", err)
		}
		failures++
		if backoff.Sleep(ctx, delay) != nil {
			break
		}
	}
	return context.Cause(ctx)
}

// errNoEvents says that the runtime has no events of any kind.
var errNoEvents = errors.New("the runtime has no event service")

// watchOnce watches by the first means that the runtime has, until that fails.
func (c *Client) watchOnce(ctx context.Context, changed func(types.UID)) error {
	began := time.Now()
	err := c.watchCRI(ctx, changed)
	// CRI-O knows the call but refuses it, unless events have been switched on:
	// only a connection that is gone is worth the same again.
	refused := unimplemented(err) || status.Code(err) != codes.Unavailable && time.Since(began) < time.Second
	if ctx.Err() != nil || !refused {
		return err
	}
	if err := c.watchContainerd(ctx, changed); !unimplemented(err) {
		return err
	}
	return errNoEvents
}

// watchCRI reads CRI's own events.
func (c *Client) watchCRI(ctx context.Context, changed func(types.UID)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.runtime.GetContainerEvents(ctx, &cri.GetEventsRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return wrap("watch events", "", err)
	}
	changed("")
	for {
		event, err := stream.Recv()
		if err != nil {
			return wrap("watch events", "", err)
		}
		if event.ContainerEventType == cri.ContainerEventType_CONTAINER_CREATED_EVENT {
			continue
		}
		uid := types.UID(event.GetPodSandboxStatus().GetMetadata().GetUid())
		if uid == "" {
			uid, _ = c.index.find(event.ContainerId)
		}
		changed(uid)
	}
}

// containerd's event service: the stream, what is asked of it, and the topics.
const (
	subscribeMethod = "/containerd.services.events.v1.Events/Subscribe"
	eventNamespace  = "k8s.io" // of all that CRI makes

	topicStart = "/tasks/start"
	topicExit  = "/tasks/exit"
	topicOOM   = "/tasks/oom"
)

// watchContainerd reads the events of containerd itself. Its messages are few and
// small, so they are decoded here, which spares containerd's API and what that
// brings along.
func (c *Client) watchContainerd(ctx context.Context, changed func(types.UID)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, subscribeMethod,
		grpc.WaitForReady(true), grpc.ForceCodec(rawCodec{}))
	if err != nil {
		return wrap("subscribe to containerd", "", err)
	}
	request := subscribeRequest(topicStart, topicExit, topicOOM)
	if err := errors.Join(stream.SendMsg(&request), stream.CloseSend()); err != nil {
		return wrap("subscribe to containerd", "", err)
	}
	changed("")
	var settling sync.WaitGroup
	defer settling.Wait()
	defer cancel() // before the wait
	for {
		var data []byte
		if err := stream.RecvMsg(&data); err != nil {
			return wrap("subscribe to containerd", "", err)
		}
		event, err := parseEnvelope(data)
		if err != nil {
			return err
		}
		if event.namespace != eventNamespace {
			continue
		}
		if event.topic == topicExit && event.process == event.container {
			settling.Go(func() {
				c.settle(ctx, event.container)
				c.tell(event, changed)
			})
			continue
		}
		c.tell(event, changed)
	}
}

// settle waits, a second or so at most, until CRI has seen an exit too: containerd
// tells of it some 30 ms before the state that CRI shows changes, and whoever
// looked at once would see nothing new and not look again for long.
func (c *Client) settle(ctx context.Context, id string) {
	for delay := 5 * time.Millisecond; delay < time.Second; delay *= 2 {
		container, err := c.ContainerStatus(ctx, id)
		if err == nil && container.State != cri.ContainerState_CONTAINER_RUNNING {
			return
		}
		if status.Code(err) == codes.NotFound {
			sandbox, err := c.PodSandboxStatus(ctx, id)
			if err != nil || sandbox.State != cri.PodSandboxState_SANDBOX_READY {
				return
			}
		}
		if backoff.Sleep(ctx, delay) != nil {
			return
		}
	}
}

// tell finds the pod of an event.
func (c *Client) tell(event taskEvent, changed func(types.UID)) {
	if event.topic == topicExit && event.process != event.container {
		return // a command that was executed in the container, such as a probe
	}
	uid, ok := c.index.find(event.container)
	if !ok && event.topic == topicStart {
		return // of a sandbox whose RunPodSandbox has not returned yet, which will tell
	}
	changed(uid)
}

// A taskEvent is what matters of an event.
type taskEvent struct {
	namespace, topic   string
	container, process string // process is the container's own or an executed one's id; only of exits
}

// subscribeRequest encodes message SubscribeRequest { repeated string filters = 1 }.
func subscribeRequest(topics ...string) []byte {
	var out []byte
	for _, topic := range topics {
		out = protowire.AppendTag(out, 1, protowire.BytesType)
		out = protowire.AppendString(out, fmt.Sprintf("namespace==%s,topic==%q", eventNamespace, topic))
	}
	return out
}

// parseEnvelope decodes message Envelope { 2: namespace, 3: topic, 4: Any event {
// 2: value } }, where value is TaskStart, TaskExit or TaskOOM, all of which begin
// with { 1: container_id }; TaskExit goes on with { 2: id }.
func parseEnvelope(data []byte) (taskEvent, error) {
	var event taskEvent
	envelope, err := stringFields(data)
	if err != nil {
		return event, fmt.Errorf("event of containerd: %w", err)
	}
	event.namespace, event.topic = string(envelope[2]), string(envelope[3])
	wrapped, err := stringFields(envelope[4])
	if err != nil {
		return event, fmt.Errorf("event of containerd: %w", err)
	}
	task, err := stringFields(wrapped[2])
	if err != nil {
		return event, fmt.Errorf("event %s of containerd: %w", event.topic, err)
	}
	event.container = string(task[1])
	if event.topic == topicExit {
		event.process = string(task[2])
	}
	return event, nil
}

// stringFields decodes the fields 1 to 7 that are strings, bytes or messages.
func stringFields(data []byte) (fields [8][]byte, err error) {
	for len(data) > 0 {
		number, wireType, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fields, protowire.ParseError(n)
		}
		data = data[n:]
		if n = protowire.ConsumeFieldValue(number, wireType, data); n < 0 {
			return fields, protowire.ParseError(n)
		}
		if wireType == protowire.BytesType && int(number) < len(fields) {
			fields[number], _ = protowire.ConsumeBytes(data)
		}
		data = data[n:]
	}
	return fields, nil
}

// rawCodec passes encoded messages through, as *[]byte.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) {
	data, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("marshal %T: not bytes", v)
	}
	return *data, nil
}

func (rawCodec) Unmarshal(data []byte, v any) error {
	out, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("unmarshal %T: not bytes", v)
	}
	*out = append((*out)[:0], data...)
	return nil
}
