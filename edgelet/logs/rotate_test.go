package logs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// files lists a container's directory.
func (s *site) files() []string {
	s.t.Helper()
	entries, err := os.ReadDir(s.path(""))
	if err != nil {
		s.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// rotator rotates logs of more than 1000 bytes. Reopen is the runtime's part.
func (s *site) rotator(reopen func() error) *Rotator {
	return NewRotator(RotatorConfig{Runtime: &fakeRuntime{s, reopen, 0}, Root: s.root, MaxSize: 1000, Log: slog.New(slog.DiscardHandler)})
}

// A fakeRuntime runs one container of the site's, has ended another, and runs one
// with its log elsewhere.
type fakeRuntime struct {
	site   *site
	reopen func() error
	asked  int // for statuses
}

func (f *fakeRuntime) ListContainers(context.Context) ([]*cri.Container, error) {
	return []*cri.Container{
		{Id: "gone", State: cri.ContainerState_CONTAINER_RUNNING},
		{Id: "id", State: cri.ContainerState_CONTAINER_RUNNING},
		{Id: "ended", State: cri.ContainerState_CONTAINER_EXITED},
		{Id: "foreign", State: cri.ContainerState_CONTAINER_RUNNING},
	}, nil
}

func (f *fakeRuntime) ContainerStatus(_ context.Context, id string) (*cri.ContainerStatus, error) {
	switch id {
	case "id":
		f.asked++
		return &cri.ContainerStatus{LogPath: f.site.path("0.log")}, nil
	case "foreign":
		return &cri.ContainerStatus{LogPath: "/var/log/other.log"}, nil
	case "ended":
		f.site.t.Error("asked for a container that has ended")
	}
	return nil, errors.New("no such container")
}

func (f *fakeRuntime) ReopenContainerLog(_ context.Context, id string) error {
	if id != "id" {
		f.site.t.Errorf("reopened log of %s", id)
	}
	return f.reopen()
}

func TestRotationKeepsTheNewestFiles(t *testing.T) {
	s := newSite(t)
	r := s.rotator(func() error { s.append("0.log", ""); return nil })
	const step = 50
	for i := range 12 {
		s.append("0.log", lines(i*step, step))
		r.look(t.Context())
	}
	s.append("0.log", lines(12*step, 1))
	names := s.files()
	if len(names) != 5 || names[0] != "0.log" || strings.HasSuffix(names[4], ".gz") ||
		!strings.HasSuffix(names[1], ".gz") || !strings.HasSuffix(names[3], ".gz") {
		t.Errorf("files %q, want the current, three compressed, one that is not", names)
	}
	got, err := s.copy(all())
	if want := texts(8*step, 4*step+1); err != nil || got != want {
		t.Errorf("%d lines from %.10q, error %v, want the last %d", strings.Count(got, "\n"), got, err, 4*step+1)
	}
}

func TestSmallLogIsLeftAlone(t *testing.T) {
	s := newSite(t)
	r := s.rotator(func() error { t.Error("reopened"); return nil })
	s.append("0.log", lines(0, 3))
	r.look(t.Context())
	if names := s.files(); !slices.Equal(names, []string{"0.log"}) {
		t.Errorf("files %q", names)
	}
}

// Whatever a crash has left, the next rotation puts right without losing a line.
func TestRotationAfterACrash(t *testing.T) {
	const a, b = "0.log.20260102-100000", "0.log.20260102-110000"
	tests := map[string]struct {
		left map[string]string
		want string
	}{
		"while compressing":              {map[string]string{a: lines(0, 1), a + ".tmp": "half", "0.log": lines(1, 50)}, texts(0, 51)},
		"after compressing":              {map[string]string{a: lines(0, 1), a + ".gz": lines(0, 1), "0.log": lines(1, 50)}, texts(0, 51)},
		"between renaming and reopening": {map[string]string{a: lines(0, 1), b: lines(1, 50)}, texts(0, 51)},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			reopened := 0
			r := s.rotator(func() error { reopened++; s.append("0.log", ""); return nil })
			for name, content := range tt.left {
				s.write(name, content)
			}
			for _, when := range []string{"before", "after"} {
				if got, err := s.copy(all()); err != nil || got != tt.want {
					t.Errorf("%s: %q, error %v, want %q", when, got, err, tt.want)
				}
				if when == "before" {
					r.look(t.Context())
				}
			}
			if reopened != 1 {
				t.Errorf("reopened %d times, want once", reopened)
			}
			for _, name := range s.files() {
				if strings.HasSuffix(name, ".tmp") || name == a && slices.Contains(s.files(), a+".gz") {
					t.Errorf("%s is left", name)
				}
			}
		})
	}
}

func TestRuntimeThatDoesNotReopen(t *testing.T) {
	for name, tt := range map[string]struct {
		creates bool // the new file, and fails or is not heard of after that
		want    int  // files
	}{
		"at all":                    {false, 1},
		"as far as anyone can tell": {true, 2},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			r := s.rotator(func() error {
				if tt.creates {
					s.append("0.log", lines(50, 1))
				}
				return errors.New("connection lost")
			})
			s.append("0.log", lines(0, 50))
			r.look(t.Context())
			if names := s.files(); len(names) != tt.want {
				t.Errorf("files %q, want %d", names, tt.want)
			}
			if got, err := s.copy(with(func(r *Request) { r.Limit = int64(len(texts(0, 50))) })); err != nil || got != texts(0, 50) {
				t.Errorf("%d bytes are left, error %v", len(got), err)
			}
		})
	}
}

func TestClockThatWasSetBackDoesNotChangeTheOrder(t *testing.T) {
	s := newSite(t)
	r := s.rotator(func() error { s.append("0.log", ""); return nil })
	future := "0.log." + time.Now().UTC().Add(1000*time.Hour).Format(stampLayout)
	s.write(future, lines(0, 50))
	s.append("0.log", lines(50, 50))
	r.look(t.Context())
	if got, err := s.copy(all()); err != nil || got != texts(0, 100) {
		t.Errorf("%d lines, error %v, first %.10q, want 100 in order", strings.Count(got, "\n"), err, got)
	}
}

func TestRotationFollowsNoLink(t *testing.T) {
	s := newSite(t)
	r := s.rotator(func() error { t.Error("reopened"); return nil })
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, make([]byte, 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, s.path("0.log")); err != nil {
		t.Fatal(err)
	}
	r.look(t.Context())
	if names := s.files(); !slices.Equal(names, []string{"0.log"}) {
		t.Errorf("files %q", names)
	}
	if info, err := os.Stat(victim); err != nil || info.Size() != 5000 {
		t.Errorf("victim: %v, %v", info, err)
	}
}

func TestTorrentIsLookedAtMoreOften(t *testing.T) {
	s := newSite(t)
	r := s.rotator(func() error { s.append("0.log", ""); return nil })
	var waits []time.Duration
	for i, n := range []int{1, 1, 15, 1, 50} {
		s.append("0.log", lines(100*i, n))
		waits = append(waits, r.look(t.Context()))
	}
	if n := r.cfg.Runtime.(*fakeRuntime).asked; n != 1 {
		t.Errorf("asked %d times where the log is, want once", n)
	}
	if want := []time.Duration{10e9, 10e9, 1e9, 10e9, 1e9}; !slices.Equal(waits, want) {
		t.Errorf("waits %v, want %v", waits, want)
	}
}

// One goroutine writes and rotates, another follows: nothing is lost or repeated.
func TestFollowWhileRotating(t *testing.T) {
	s := newSite(t)
	s.r.poll = 50 * time.Millisecond
	s.append("0.log", "")
	r := s.rotator(func() error { s.append("0.log", ""); return nil })
	f := s.follow(t, t.Context(), all())
	var want strings.Builder
	for i := range 20 {
		s.append("0.log", lines(i*30, 30))
		want.WriteString(texts(i*30, 30))
		if r.look(t.Context()); i%4 == 3 {
			f.expect(want.String())
		}
	}
	f.ended.Store(true)
	f.end(want.String())
}

func BenchmarkCompress10MiB(b *testing.B) {
	s := newSite(b)
	content := lines(0, (10<<20)/len(lines(0, 1)))
	d, err := openDir(s.root, podDir+"/c/0.log")
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	b.SetBytes(int64(len(content)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		name := fmt.Sprintf("0.log.%d", i)
		s.write(name, content)
		b.StartTimer()
		if err := compress(b.Context(), d, name); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		os.Remove(s.path(name + suffixGzip))
		b.StartTimer()
	}
}
