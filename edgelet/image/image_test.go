package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// registry is a runtime whose pulls take a second and want the right password.
type registry struct {
	mu      sync.Mutex
	present map[string]*cri.Image
	down    bool
	broken  bool   // ImageStatus fails
	secret  string // password, empty for none
	pulls   []string
	now     int // pulls that run
	most    int // at once
}

func (r *registry) PullImage(ctx context.Context, image *cri.ImageSpec, auth *cri.AuthConfig, _ *cri.PodSandboxConfig) (string, error) {
	r.mu.Lock()
	r.pulls = append(r.pulls, image.Image)
	r.now++
	r.most = max(r.most, r.now)
	down, denied := r.down, r.secret != "" && auth.GetPassword() != r.secret
	r.mu.Unlock()
	defer func() { r.mu.Lock(); r.now--; r.mu.Unlock() }()
	select {
	case <-time.After(time.Second):
	case <-ctx.Done():
		return "", ctx.Err()
	}
	switch {
	case down:
		return "", status.Error(codes.Unknown, "dial tcp: no route\x1b[31m to host")
	case denied:
		return "", status.Errorf(codes.Unknown, "denied: %q", auth.GetUsername())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	id := "sha256:" + image.Image
	r.present[image.Image] = &cri.Image{Id: id, RepoTags: []string{image.Image}, RepoDigests: []string{"other.org/x@sha256:" + strings.Repeat("0", 64), "example.org/a@sha256:" + strings.Repeat("a", 64)}, Size: 42, Uid: &cri.Int64Value{Value: 7}}
	return id, nil
}

func (r *registry) ImageStatus(_ context.Context, image *cri.ImageSpec) (*cri.Image, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken {
		return nil, errors.New("broken")
	}
	for name, i := range r.present {
		if name == image.Image || i.Id == image.Image {
			return i, nil
		}
	}
	return nil, nil
}

func (r *registry) set(down bool) { r.mu.Lock(); r.down = down; r.mu.Unlock() }

// client asks a manager as one pod and keeps the events.
type client struct {
	m      *Manager
	uid    string
	events []string
}

func (c *client) ensure(ctx context.Context, image string, policy corev1.PullPolicy, secrets ...*corev1.Secret) (Image, error) {
	c.events = nil
	sandbox := &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Uid: c.uid}}
	return c.m.Ensure(ctx, image, policy, secrets, sandbox, func(kind, reason, message string) {
		c.events = append(c.events, kind+" "+reason+" "+message)
	})
}

func setup(t *testing.T) (*registry, *client) {
	t.Helper()
	r := &registry{present: map[string]*cri.Image{}}
	m, err := New(Config{Runtime: r})
	if err != nil {
		t.Fatal(err)
	}
	return r, &client{m: m, uid: "u1"}
}

func reason(err error) string {
	if failed := (*Error)(nil); errors.As(err, &failed) {
		return failed.Reason()
	}
	return fmt.Sprint(err)
}

func TestPolicies(t *testing.T) {
	const name = "example.org/a:1"
	tests := map[string]struct {
		image   string
		policy  corev1.PullPolicy
		present bool
		broken  bool
		reason  string
		pulls   int
		event   string // the first
	}{
		"present is enough if not present":       {name, corev1.PullIfNotPresent, true, false, "<nil>", 0, `Normal Pulled Container image "example.org/a:1" already present on machine`},
		"absent is pulled if not present":        {name, corev1.PullIfNotPresent, false, false, "<nil>", 1, `Normal Pulling Pulling image "example.org/a:1"`},
		"always pulls what is present":           {name, corev1.PullAlways, true, false, "<nil>", 1, `Normal Pulling Pulling image "example.org/a:1"`},
		"never uses what is present":             {name, corev1.PullNever, true, false, "<nil>", 0, `Normal Pulled Container image "example.org/a:1" already present on machine`},
		"never fails on what is absent":          {name, corev1.PullNever, false, false, "ErrImageNeverPull", 0, `Warning ErrImageNeverPull Container image "example.org/a:1" is not present with pull policy of Never`},
		"no policy and a tag is if not present":  {name, "", true, false, "<nil>", 0, `Normal Pulled Container image "example.org/a:1" already present on machine`},
		"no policy and no tag is always":         {"example.org/a", "", true, false, "<nil>", 1, `Normal Pulling Pulling image "example.org/a"`},
		"a name that is none is invalid":         {"Not A Name", "", false, false, "InvalidImageName", 0, `Warning InspectFailed Failed to apply default image tag "Not A Name": couldn't parse image reference "Not A Name": invalid reference format: repository name (library/Not A Name) must be lowercase`},
		"what cannot be looked at is not pulled": {name, corev1.PullIfNotPresent, false, true, "ImageInspectError", 0, `Warning InspectFailed Failed to inspect image "example.org/a:1": broken`},
	}
	for label, test := range tests {
		t.Run(label, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, c := setup(t)
				if test.present {
					r.present[name] = &cri.Image{Id: "sha256:" + name}
				}
				r.broken = test.broken
				image, err := c.ensure(t.Context(), test.image, test.policy)
				if reason(err) != test.reason || len(r.pulls) != test.pulls || len(c.events) == 0 || c.events[0] != test.event {
					t.Errorf("error %v, pulls %v, events %q", reason(err), r.pulls, c.events)
				}
				if err == nil && image.Ref == "" {
					t.Error("no reference")
				}
				if err != nil && c.events[len(c.events)-1] != "Warning Failed Error: "+test.reason {
					t.Errorf("events %q do not end with the reason", c.events)
				}
			})
		})
	}
}

func TestPulledImage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c := setup(t)
		image, err := c.ensure(t.Context(), "example.org/a:1", "")
		if err != nil || image.ID != "example.org/a@sha256:"+strings.Repeat("a", 64) || image.Ref != "sha256:example.org/a:1" || image.UID == nil || *image.UID != 7 {
			t.Errorf("image = %+v, %v", image, err)
		}
		want := `Normal Pulled Successfully pulled image "example.org/a:1" in 1s (1s including waiting). Image size: 42 bytes.`
		if c.events[1] != want {
			t.Errorf("event %q, want %q", c.events[1], want)
		}
	})
}

func TestBackOffDoublesUpToItsLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := setup(t)
		r.down = true
		_, err := c.ensure(t.Context(), "a:1", "")
		if reason(err) != ReasonPull || err.Error() != "dial tcp: no route?[31m to host" {
			t.Errorf("first error: %s: %v", reason(err), err)
		}
		began := time.Now()
		var gaps []time.Duration
		for len(gaps) < 7 {
			time.Sleep(time.Second)
			pulls := len(r.pulls)
			_, err := c.ensure(t.Context(), "a:1", "")
			if len(r.pulls) > pulls {
				gaps = append(gaps, time.Since(began)-time.Second) // the pull itself takes one
				began = time.Now()
				continue
			}
			if want := `Back-off pulling image "a:1": ErrImagePull: dial tcp: no route?[31m to host`; reason(err) != ReasonBackOff || err.Error() != want {
				t.Fatalf("%s: %v", reason(err), err)
			}
			if want := []string{`Normal BackOff Back-off pulling image "a:1"`, "Warning Failed Error: ImagePullBackOff"}; !slices.Equal(c.events, want) {
				t.Fatalf("events %q", c.events)
			}
		}
		want := []time.Duration{10, 20, 40, 80, 160, 300, 300}
		for i := range want {
			if gaps[i] != want[i]*time.Second {
				t.Errorf("gap %d is %v, want %v", i, gaps[i], want[i]*time.Second)
			}
		}
		r.set(false)
		c.m.RetryNow()
		if _, err := c.ensure(t.Context(), "a:1", ""); err != nil {
			t.Errorf("after RetryNow: %v", err)
		}
	})
}

func TestAnotherPodDoesNotWaitForThisOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := setup(t)
		r.down = true
		c.ensure(t.Context(), "a:1", "")
		r.down = false
		other := &client{m: c.m, uid: "u2"}
		if _, err := other.ensure(t.Context(), "a:1", ""); err != nil {
			t.Error(err)
		}
	})
}

func TestPodsShareAPull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := setup(t)
		var pods sync.WaitGroup
		for i := range 10 {
			pods.Go(func() {
				pod := &client{m: c.m, uid: fmt.Sprint(i)}
				if _, err := pod.ensure(t.Context(), "a:1", ""); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if list := c.m.Pulls(); len(list) != 1 || list[0].Waiters != 10 {
			t.Errorf("pulls = %+v", list)
		}
		pods.Wait()
		if len(r.pulls) != 1 || len(c.m.Pulls()) != 0 {
			t.Errorf("pulled %v, still %v", r.pulls, c.m.Pulls())
		}
	})
}

func TestThreePullsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := setup(t)
		began := time.Now()
		var pods sync.WaitGroup
		for i := range 7 {
			pods.Go(func() {
				pod := &client{m: c.m, uid: fmt.Sprint(i)}
				pod.ensure(t.Context(), fmt.Sprintf("a:%d", i), "")
			})
		}
		pods.Wait()
		if r.most != 3 || time.Since(began) != 3*time.Second {
			t.Errorf("%d at once, %v", r.most, time.Since(began))
		}
	})
}

func TestAPullEndsWithItsLastWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := setup(t)
		short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		longer, cancel := context.WithTimeout(t.Context(), 600*time.Millisecond)
		defer cancel()
		var pods sync.WaitGroup
		for _, ctx := range []context.Context{short, longer} {
			pods.Go(func() {
				pod := &client{m: c.m}
				if _, err := pod.ensure(ctx, "a:1", ""); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("error %v", err)
				}
			})
		}
		began := time.Now()
		pods.Wait()
		if r.now != 0 || time.Since(began) != 600*time.Millisecond || len(c.m.Pulls()) != 0 {
			t.Errorf("%d pulls still run after %v", r.now, time.Since(began))
		}
	})
}

func secret(name string, auths string) *corev1.Secret {
	s := &corev1.Secret{Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":` + auths + `}`)}}
	s.Name, s.Namespace = name, "ns"
	return s
}

func TestSecretsAreTriedInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := setup(t)
		r.secret = "right"
		wrong := secret("w", `{"example.org/a":{"username":"u","password":"wrong"}}`)
		right := secret("r", `{"example.org":{"username":"v","password":"right"}}`)
		if _, err := c.ensure(t.Context(), "example.org/a:1", "", wrong); reason(err) != ReasonPull || err.Error() != `denied: "u"` {
			t.Errorf("wrong: %v", err)
		}
		// Other credentials do not wait for the failure of these.
		if _, err := c.ensure(t.Context(), "example.org/a:1", "", wrong, right); err != nil || len(r.pulls) != 3 {
			t.Errorf("both: %v, %v", err, r.pulls)
		}
		broken := secret("b", `"secret text"`)
		if _, err := c.ensure(t.Context(), "example.org/a:2", "", broken, right); err != nil {
			t.Errorf("beside a broken one: %v", err)
		}
	})
}

func TestAlwaysStartsOfflineWhatThisPodHadBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c := setup(t)
		memory := &notes{}
		c.m, _ = New(Config{Runtime: r, Memory: memory})
		if _, err := c.ensure(t.Context(), "a", corev1.PullAlways); err != nil {
			t.Fatal(err)
		}
		r.down = true
		restarted, err := New(Config{Runtime: r, Memory: memory})
		if err != nil {
			t.Fatal(err)
		}
		c.m = restarted
		for range 2 { // the second is in back-off
			if _, err := c.ensure(t.Context(), "a", corev1.PullAlways); err != nil {
				t.Errorf("the pod that had it: %v", err)
			}
		}
		if last := c.events[len(c.events)-1]; !strings.HasPrefix(last, "Warning PulledStale ") {
			t.Errorf("event %q", last)
		}
		other := &client{m: restarted, uid: "u2"}
		if _, err := other.ensure(t.Context(), "a", corev1.PullAlways); reason(err) != ReasonPull {
			t.Errorf("another pod: %v", err)
		}
		if memory.saves != 1 {
			t.Errorf("%d saves, want 1", memory.saves)
		}
	})
}

// notes is a memory.
type notes struct {
	saved map[string]map[string]time.Time
	saves int
}

func (n *notes) Load(key string) (map[string]time.Time, error) { return n.saved[key], nil }
func (n *notes) Save(key string, times map[string]time.Time) error {
	if n.saved == nil {
		n.saved = map[string]map[string]time.Time{}
	}
	n.saved[key] = times
	n.saves++
	return nil
}

func TestGrantsAreBounded(t *testing.T) {
	g := grants{memory: forgetful{}}
	for i := range maxGrants + 10 {
		if err := g.add(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(g.times) != maxGrants || !g.has(fmt.Sprint(maxGrants+9)) {
		t.Errorf("%d grants", len(g.times))
	}
}

func TestWhichCredentials(t *testing.T) {
	tests := map[string]struct {
		registry, image string
		match           bool
	}{
		"the same host":                    {"example.org", "example.org/a/b:1", true},
		"with scheme and version":          {"https://example.org/v2/", "example.org/a:1", true},
		"another host":                     {"example.org", "example.com/a:1", false},
		"a port that is missing":           {"example.org", "example.org:5000/a:1", false},
		"the same port":                    {"example.org:5000", "example.org:5000/a:1", true},
		"a leading path":                   {"example.org/team", "example.org/team/a:1", true},
		"a path is matched by its parts":   {"example.org/team", "example.org/teamwork/a:1", false},
		"a wildcard stands for one label":  {"*.example.org", "r.example.org/a:1", true},
		"a wildcard does not span labels":  {"*.org", "r.example.org/a:1", false},
		"Docker Hub by its old name":       {"https://index.docker.io/v1/", "busybox", true},
		"Docker Hub by its name":           {"docker.io", "library/busybox:1", true},
		"a pattern that is none":           {"[", "example.org/a:1", false},
		"a host is no prefix of another":   {"example.org", "example.org.evil.com/a:1", false},
		"a path does not replace the host": {"example.org/a", "evil.com/example.org/a:1", false},
	}
	for label, test := range tests {
		t.Run(label, func(t *testing.T) {
			auths, err := credentials([]*corev1.Secret{secret("s", fmt.Sprintf(`{%q:{"username":"u","password":"p"}}`, test.registry))}, test.image)
			if err != nil || (len(auths) == 1) != test.match {
				t.Errorf("got %v, %v", auths, err)
			}
		})
	}
}

func TestLongestPathComesFirst(t *testing.T) {
	auths, err := credentials([]*corev1.Secret{
		secret("a", `{"example.org":{"username":"host","password":"p"},"example.org/a/b":{"username":"long","password":"p"},"example.org/a":{"username":"short","password":"p"}}`),
	}, "example.org/a/b/c:1")
	if err != nil || len(auths) != 3 || auths[0].Username != "long" || auths[1].Username != "short" || auths[2].Username != "host" {
		t.Errorf("got %v, %v", auths, err)
	}
}

func TestLoginForms(t *testing.T) {
	encode := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	old := &corev1.Secret{Data: map[string][]byte{corev1.DockerConfigKey: []byte(`{"https://example.org":{"auth":"` + encode("u:p:q") + `","email":"x"}}`)}}
	auths, err := credentials([]*corev1.Secret{old}, "example.org/a")
	if err != nil || len(auths) != 1 || auths[0].Username != "u" || auths[0].Password != "p:q" {
		t.Errorf("dockercfg: %v, %v", auths, err)
	}
	for _, bad := range []string{"!!!", encode("no colon")} {
		_, err := credentials([]*corev1.Secret{secret("s", `{"example.org":{"auth":"`+bad+`"}}`)}, "example.org/a")
		if err == nil || strings.Contains(err.Error(), "no colon") {
			t.Errorf("auth %q: %v", bad, err)
		}
	}
	if _, err := credentials([]*corev1.Secret{{}}, "example.org/a"); err == nil {
		t.Error("an empty secret is no error")
	}
}

func FuzzCredentials(f *testing.F) {
	f.Add([]byte(`{"auths":{"example.org":{"auth":"dTpw"}}}`), "example.org/a:1")
	f.Add([]byte(`{"auths":{"*.org:5000/a":{"username":"u"}}}`), "x.org:5000/a")
	f.Fuzz(func(t *testing.T, data []byte, image string) {
		for _, key := range []string{corev1.DockerConfigJsonKey, corev1.DockerConfigKey} {
			s := &corev1.Secret{Data: map[string][]byte{key: data}}
			auths, _ := credentials([]*corev1.Secret{s}, image)
			fingerprint(auths)
		}
	})
}

func FuzzClean(f *testing.F) {
	f.Add("a\x1b[31mb\u202ec\u0085d\nf")
	f.Fuzz(func(t *testing.T, s string) {
		got := clean(s)
		if len(got) > maxMessage+len("…") || strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 || r == 0x202e }) {
			t.Errorf("clean(%q) = %q", s, got)
		}
	})
}
