package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestDiscover(t *testing.T) {
	dir := t.TempDir()
	file, first, second := filepath.Join(dir, "file"), filepath.Join(dir, "a.sock"), filepath.Join(dir, "b.sock")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := discover([]string{file, first}); err == nil {
		t.Errorf("without a socket: %q", got)
	}
	for _, path := range []string{second, first} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	if got, err := discover([]string{file, first, second}); err != nil || got != "unix://"+first {
		t.Errorf("discover = %q, %v; want the first", got, err)
	}
}

func TestDialRefusesWhatIsNoSocket(t *testing.T) {
	for _, endpoint := range []string{"tcp://localhost:1", "/run/x.sock", "unix://relative"} {
		if c, err := Dial(Config{Endpoint: endpoint}); err == nil {
			c.Close()
			t.Errorf("Dial(%q) succeeded", endpoint)
		}
	}
}

func TestErrorsKeepCodeAndLoseDecoration(t *testing.T) {
	err := fmt.Errorf("outer: %w", wrap("stop container", "c1", status.Error(codes.NotFound, "no such thing")))
	if status.Code(err) != codes.NotFound || err.Error() != "outer: stop container c1: no such thing" {
		t.Errorf("%v of code %v", err, status.Code(err))
	}
	late := wrap("list", "", status.FromContextError(context.DeadlineExceeded).Err())
	if !errors.Is(late, context.DeadlineExceeded) || errors.Is(late, context.Canceled) {
		t.Errorf("%v is not recognized as a deadline", late)
	}
	if wrap("x", "", nil) != nil {
		t.Error("no error became one")
	}
}

func TestCgroupDriverFromConfiguration(t *testing.T) {
	tests := map[string]struct {
		config string
		want   CgroupDriver
		ok     bool
	}{
		"systemd by the default runtime's options":  {`{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"options":{"SystemdCgroup":true}}}}}`, Systemd, true},
		"cgroupfs by the default runtime's options": {`{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"options":{"SystemdCgroup":false}},"x":{"options":{"SystemdCgroup":true}}}}}`, Cgroupfs, true},
		"no options mean cgroupfs":                  {`{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"options":null}}}}`, Cgroupfs, true},
		"systemd by the old global option":          {`{"systemdCgroup":true,"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{}}}}`, Systemd, true},
		"an unknown default runtime says nothing":   {`{"containerd":{"defaultRuntimeName":"kata","runtimes":{}}}`, "", false},
		"no configuration says nothing":             {``, "", false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got, ok := configuredDriver([]byte(test.config)); got != test.want || ok != test.ok {
				t.Errorf("got %q, %v; want %q, %v", got, ok, test.want, test.ok)
			}
		})
	}
	if likelyDriver(true, true) != Systemd || likelyDriver(true, false) != Cgroupfs || likelyDriver(false, true) != Cgroupfs {
		t.Error("the guess is wrong")
	}
}

func TestIndexKeepsWhatAListCannotKnow(t *testing.T) {
	x := newIndex()
	x.add(containers, "old", "u1")
	began := time.Now().Add(time.Millisecond)
	time.Sleep(2 * time.Millisecond)
	x.add(containers, "new", "u2")
	x.replace(containers, map[string]types.UID{"listed": "u3"}, began)
	x.add(sandboxes, "box", "u4")
	for id, want := range map[string]types.UID{"old": "", "new": "u2", "listed": "u3", "box": "u4"} {
		if got, ok := x.find(id); got != want || ok != (want != "") {
			t.Errorf("find(%s) = %q, %v; want %q", id, got, ok, want)
		}
	}
}

// envelope encodes an event as containerd does.
func envelope(namespace, topic string, task ...string) []byte {
	text := func(out []byte, number protowire.Number, value string) []byte {
		return protowire.AppendString(protowire.AppendTag(out, number, protowire.BytesType), value)
	}
	var body []byte
	for i, value := range task {
		body = text(body, protowire.Number(i+1), value)
	}
	body = protowire.AppendVarint(protowire.AppendTag(body, 3, protowire.VarintType), 4711)
	wrapped := text(text(nil, 1, "containerd.events.TaskExit"), 2, string(body))
	return text(text(text(text(nil, 1, "\x08\x01"), 2, namespace), 3, topic), 4, string(wrapped))
}

func TestTell(t *testing.T) {
	tests := map[string]struct {
		data []byte
		want string
	}{
		"the end of a known container":         {envelope("k8s.io", topicExit, "c1", "c1"), "told u1"},
		"the end of a command in a container":  {envelope("k8s.io", topicExit, "c1", "exec"), "silent"},
		"the end of an unknown container":      {envelope("k8s.io", topicExit, "c2", "c2"), "told "},
		"the start of a known container":       {envelope("k8s.io", topicStart, "c1"), "told u1"},
		"the start of an unknown container":    {envelope("k8s.io", topicStart, "c2"), "silent"},
		"a known container is out of memory":   {envelope("k8s.io", topicOOM, "c1"), "told u1"},
		"an event that is cut off is an error": {envelope("k8s.io", topicExit, "c1", "c1")[:20], "error"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			c := &Client{index: newIndex()}
			c.index.add(containers, "c1", "u1")
			got := "silent"
			event, err := parseEnvelope(test.data)
			if err != nil {
				got = "error"
			} else {
				c.tell(event, func(uid types.UID) { got = "told " + string(uid) })
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func FuzzParseEnvelope(f *testing.F) {
	f.Add(envelope("k8s.io", topicExit, "c1", "c1"))
	f.Add([]byte("\x22\x04\x12\x02\x0a\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		event, err := parseEnvelope(data)
		if err == nil && len(event.container) > len(data) {
			t.Errorf("%q out of %d bytes", event.container, len(data))
		}
	})
}

func TestSubscribeRequestFilters(t *testing.T) {
	fields := subscribeRequest(topicExit)
	if !strings.HasSuffix(string(fields), `namespace==k8s.io,topic=="/tasks/exit"`) {
		t.Errorf("request = %q", fields)
	}
}

func TestGroup(t *testing.T) {
	box := func(id, uid string) *cri.PodSandbox {
		return &cri.PodSandbox{Id: id, Metadata: &cri.PodSandboxMetadata{Uid: uid}}
	}
	one := func(uid string) *cri.ContainerStats {
		return &cri.ContainerStats{Attributes: &cri.ContainerAttributes{Labels: map[string]string{podUIDLabel: uid}}}
	}
	got := group([]*cri.PodSandbox{box("a", "u1"), box("b", "u2"), box("c", "u1")}, []*cri.ContainerStats{one("u2"), one("u2"), one("u9")})
	if len(got) != 2 || len(got[0].Linux.Containers) != 0 || len(got[1].Linux.Containers) != 2 {
		t.Errorf("group = %v", got)
	}
}

func TestSeconds(t *testing.T) {
	for d, want := range map[time.Duration]int64{0: 0, time.Millisecond: 1, time.Second: 1, 1500 * time.Millisecond: 2} {
		if got := seconds(d); got != want {
			t.Errorf("seconds(%v) = %d, want %d", d, got, want)
		}
	}
}
