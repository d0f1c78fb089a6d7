package critest

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
)

func newFake() *Fake { return New(Options{Images: []string{Image}}) }

func TestFakeFulfilsTheContract(t *testing.T) {
	// Not under synctest, which does not allow subtests: the checks wait for
	// a few seconds of real time between them.
	RunSuite(t, func(t *testing.T) Runtime { t.Parallel(); return newFake() })
}

func TestFakeTimePasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPod(t, newFake())
		id := p.start(t, Behaviour{Exits: true, ExitAfter: time.Hour, ExitCode: 3})
		began := time.Now()
		time.Sleep(time.Hour)
		synctest.Wait()
		s := p.status(t, id)
		if s.ExitCode != 3 || time.Duration(s.FinishedAt-s.StartedAt) > time.Hour || time.Since(began) != time.Hour {
			t.Errorf("after an hour: %v", s)
		}
	})
}

func TestFaults(t *testing.T) {
	boom := status.Error(codes.Internal, "boom")
	tests := map[string]struct {
		fault     Fault
		code      codes.Code
		sandboxes int
	}{
		"an error has no effect":              {Fault{Err: boom}, codes.Internal, 0},
		"a lost reply has":                    {Fault{Err: boom, Lost: true}, codes.Internal, 1},
		"a delay beyond the deadline has not": {Fault{Delay: time.Hour}, codes.DeadlineExceeded, 0},
		"a short delay passes":                {Fault{Delay: time.Second}, codes.OK, 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.Inject(func(c Call) Fault {
					if c.Method == "RunPodSandbox" && c.UID != "" {
						return test.fault
					}
					return Fault{}
				})
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				id, err := f.RunPodSandbox(ctx, newPod(t, f).config, "")
				wantCode(t, "run", err, test.code)
				if (err == nil) != (id != "") {
					t.Errorf("id %q with error %v", id, err)
				}
				if list, _ := f.ListPodSandbox(t.Context()); len(list) != test.sandboxes {
					t.Errorf("%d sandboxes, want %d", len(list), test.sandboxes)
				}
			})
		})
	}
}

func TestDownAndUpAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		p := newPod(t, f)
		id := p.start(t, Behaviour{})
		ctx, cancel := context.WithCancel(t.Context())
		var got []types.UID
		done := make(chan error, 1)
		go func() { done <- f.Watch(ctx, func(uid types.UID) { got = append(got, uid) }) }()
		synctest.Wait()
		f.SetDown(true)
		_, err := f.ListContainers(t.Context())
		wantCode(t, "list", err, codes.Unavailable)
		f.Exit(id, 1, "OOMKilled")
		synctest.Wait()
		if len(got) != 1 {
			t.Errorf("events while down: %v", got)
		}
		f.SetDown(false)
		synctest.Wait()
		if len(got) != 2 || got[1] != "" {
			t.Errorf("events after: %v, want an empty one", got)
		}
		if s := p.status(t, id); s.ExitCode != 1 || s.Reason != "OOMKilled" {
			t.Errorf("status: %v", s)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Watch = %v", err)
		}
	})
}

func TestOverlapsAreNoticed(t *testing.T) {
	f := newFake()
	p := newPod(t, f)
	p.start(t, Behaviour{})
	if got := f.Overlaps(); len(got) != 0 {
		t.Fatalf("overlaps of one pod: %v", got)
	}
	q := newPod(t, f)
	q.config = p.config
	q.config.Metadata.Attempt = 1
	q.start(t, Behaviour{})
	if got := f.Overlaps(); len(got) != 2 {
		t.Errorf("overlaps of two sandboxes with one container each: %v", got)
	}
	if n := f.Starts(types.UID(p.config.Metadata.Uid), "c"); n != 2 {
		t.Errorf("%d starts, want 2", n)
	}
}

func TestReboot(t *testing.T) {
	f := newFake()
	p := newPod(t, f)
	id := p.start(t, Behaviour{})
	f.Reboot()
	if s := p.status(t, id); s.ExitCode != 255 || s.Reason != "Unknown" {
		t.Errorf("status: %v", s)
	}
}
