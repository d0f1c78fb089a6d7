package bootstrap

// White-box: these tests set the machine's clock.

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const day = 24 * time.Hour

// A cloud is a provider in memory, for fake time, that keeps one site.
type cloud struct {
	ca      *CA
	cert    *ServerCertificate
	offline atomic.Bool

	mu     sync.Mutex // guards what follows
	record Record
	issued int
	conns  chan net.Conn
}

func (c *cloud) Check(context.Context, string) (Grant, error)               { return Grant{ID: "abcdef"}, nil }
func (c *cloud) Redeem(context.Context, string, string, string) error       { return nil }
func (c *cloud) Approve(context.Context, Request) error                     { return nil }
func (c *cloud) Publish(_ context.Context, _ Request, _ []byte) error       { return nil }
func (c *cloud) Accept() (net.Conn, error)                                  { return c.accept() }
func (c *cloud) Close() error                                               { close(c.conns); return nil }
func (c *cloud) Addr() net.Addr                                             { return &net.TCPAddr{} }
func (c *cloud) Lookup(context.Context, string) (Record, error)             { return c.get(), nil }
func (c *cloud) Commit(_ context.Context, _ string, old, next Record) error { return c.set(old, next) }

func (c *cloud) get() Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.record
}

func (c *cloud) set(old, next Record) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.record.Serial != old.Serial {
		return ErrConflict
	}
	c.record = next
	c.issued++
	return nil
}

func (c *cloud) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.issued
}

func (c *cloud) accept() (net.Conn, error) {
	conn, ok := <-c.conns
	if !ok {
		return nil, io.EOF
	}
	return conn, nil
}

func (c *cloud) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if c.offline.Load() {
		return nil, errors.New("no link")
	}
	here, there := net.Pipe()
	select {
	case c.conns <- there:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func newCloud(t *testing.T, life, maxOffline time.Duration) *cloud {
	t.Helper()
	ca := testCA(t)
	cert, err := NewServerCertificate(ServerConfig{CA: ca, Names: []string{"127.0.0.1"}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	c := &cloud{ca: ca, cert: cert, conns: make(chan net.Conn)}
	h, err := NewHandler(HandlerConfig{CA: ca, Tokens: c, Authority: c, Life: life, MaxOffline: maxOffline, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: cert.GetCertificate},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.ServeTLS(c, "", "")
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
		time.Sleep(time.Minute) // fake: TLS takes 5 s to close a pipe that nobody reads
	})
	return c
}

func (c *cloud) joinConfig(t *testing.T) JoinConfig {
	return JoinConfig{
		Server: "https://127.0.0.1:443", Token: "abcdef.0123456789abcdef", CACertHash: c.ca.Pin(), Site: "site-a",
		Dir: filepath.Join(t.TempDir(), "identity"), Dial: c.dial, Log: slog.New(slog.DiscardHandler),
	}
}

func (c *cloud) join(t *testing.T) *Identity {
	t.Helper()
	id, err := Join(t.Context(), c.joinConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// run runs a rotator for id until stop is called.
func (c *cloud) run(t *testing.T, id *Identity) (r *Rotator, stop func()) {
	t.Helper()
	r, err := NewRotator(RotatorConfig{Identity: id, Server: "127.0.0.1", Dial: c.dial, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return r, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	}
}

// good checks that the provider admits id's certificate and that it is valid now.
func (c *cloud) good(t *testing.T, id *Identity) {
	t.Helper()
	cert := id.Certificate()
	if _, err := c.get().Admits(cert.SerialNumber); err != nil {
		t.Errorf("not admitted: %v", err)
	}
	if now := time.Now(); now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		t.Errorf("valid from %v to %v, but it is %v", cert.NotBefore, cert.NotAfter, now)
	}
}

func TestRotationAtTwoThirds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCloud(t, 30*day, 0)
		id := c.join(t)
		_, stop := c.run(t, id)
		defer stop()
		first := Serial(id.Certificate())
		time.Sleep(18 * day)
		if Serial(id.Certificate()) != first {
			t.Error("renewed before 0.6 of its life")
		}
		time.Sleep(4 * day)
		if Serial(id.Certificate()) == first {
			t.Error("not renewed after 0.73 of its life")
		}
		time.Sleep(5 * 365 * day)
		c.good(t, id)
		if n := c.count(); n < 75 || n > 105 {
			t.Errorf("%d certificates in five years, want about 91", n)
		}
	})
}

// However long a site was away, it comes back by itself if the policy lets it.
func TestYearsOffline(t *testing.T) {
	tests := map[string]struct {
		away    time.Duration
		restart bool
		want    Code
	}{
		"a month":                        {30 * day, false, ""},
		"400 days":                       {400 * day, false, ""},
		"400 days, switched off":         {400 * day, true, ""},
		"four years, switched off":       {4 * 365 * day, true, ""},
		"six years, which is not policy": {6 * 365 * day, true, TooOld},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCloud(t, 7*day, 0)
				id := c.join(t)
				r, stop := c.run(t, id)
				synctest.Wait()
				if tt.restart {
					stop()
				}
				c.offline.Store(true)
				time.Sleep(tt.away)
				synctest.Wait()
				c.offline.Store(false)
				if tt.restart {
					loaded, err := Load(id.dir)
					if err != nil {
						t.Fatal(err)
					}
					id = loaded
					r, stop = c.run(t, id)
				}
				defer stop()
				r.Nudge()
				time.Sleep(3 * time.Minute)
				if tt.want == "" {
					c.good(t, id)
				} else if err := r.Renew(t.Context()); !errors.Is(err, tt.want) {
					t.Errorf("Renew = %v, want %s", err, tt.want)
				}
			})
		})
	}
}

// A copy of a site's disk can renew once at the most: then the provider refuses
// it, and goes on refusing, and the site itself does not notice.
func TestCloneIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCloud(t, 30*day, 0)
		id := c.join(t)
		clone, err := Load(id.dir)
		if err != nil {
			t.Fatal(err)
		}
		clone.dir = t.TempDir()
		r, stop := c.run(t, id)
		stop()
		if err := r.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		r2, stop2 := c.run(t, clone)
		stop2()
		if err := r2.Renew(t.Context()); !errors.Is(err, Stale) {
			t.Errorf("the copy renews: %v, want %s", err, Stale)
		}
		c.good(t, id)
		if err := r.Renew(t.Context()); err != nil {
			t.Errorf("the site itself: %v", err)
		}
	})
}

// A quarantine is lifted after weeks: the site, which never gave up, is back.
func TestRevocationIsLifted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCloud(t, 30*day, 0)
		id := c.join(t)
		_, stop := c.run(t, id)
		defer stop()
		revoke := func(why string) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.record.Revoked = why
		}
		revoke("stolen")
		time.Sleep(27 * day)
		if got := c.count(); got != 1 {
			t.Errorf("%d certificates, want none after the first", got)
		}
		revoke("")
		time.Sleep(2 * time.Hour)
		c.good(t, id)
	})
}

// Machines whose clocks are wrong join, and renew, by the provider's time.
func TestWrongClocks(t *testing.T) {
	clocks := map[string]time.Duration{
		"in 1970":           -(time.Duration(30) * 365 * day),
		"ten years slow":    -10 * 365 * day,
		"ten days slow":     -10 * day,
		"two days fast":     2 * day,
		"ten years fast":    10 * 365 * day,
		"right":             0,
		"three minutes off": 3 * time.Minute,
	}
	for name, off := range clocks {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCloud(t, 30*day, 0)
				wall := func() time.Time { return time.Now().Add(off) }
				config := c.joinConfig(t)
				config.clock = &clock{wall: wall}
				var log strings.Builder
				config.Log = slog.New(slog.NewTextHandler(&log, nil))
				id, err := Join(t.Context(), config)
				if err != nil {
					t.Fatal(err)
				}
				c.good(t, id)
				if told := strings.Contains(log.String(), "clock is wrong"); told != (off.Abs() > wrongClock) {
					t.Errorf("the log says %q", log.String())
				}
				if err := id.Now().Sub(time.Now()).Abs(); err > wrongClock {
					t.Errorf("Now is off by %v", err)
				}
				// The machine restarts, its clock as wrong as ever, for eight months.
				for range 8 {
					id, err = Load(config.Dir)
					if err != nil {
						t.Fatal(err)
					}
					id.clock.wall = wall
					r, stop := c.run(t, id)
					r.Nudge() // as the dialer does when it is refused
					time.Sleep(30 * day)
					c.good(t, id)
					if err := id.Now().Sub(time.Now()).Abs(); err > wrongClock {
						t.Errorf("after a restart Now is off by %v", err)
					}
					stop()
				}
			})
		})
	}
}

// The certificate of the provider has really ended: no clock makes it good, and
// the site says what to do.
func TestProviderWithAnExpiredCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCloud(t, 30*day, 0)
		c.cert.due = time.Now().AddDate(100, 0, 0) // never issued anew
		time.Sleep(365 * day)
		_, err := Join(t.Context(), c.joinConfig(t))
		if !errors.Is(err, WrongClock) || !strings.Contains(err.Error(), "timedatectl") {
			t.Errorf("Join = %v, want %s", err, WrongClock)
		}
	})
}

// Somebody who has an old key of the provider, but not the CA's, cannot make a
// site believe that its certificate is still valid.
func TestForgedTime(t *testing.T) {
	nonce := strings.Repeat("0", 32)
	ca, other := testCA(t), testCA(t)
	now := time.Now().UTC()
	for name, tt := range map[string]struct {
		signer *CA
		nonce  string
		at     time.Time
		ok     bool
	}{
		"as asked":       {ca, nonce, now, true},
		"another signer": {other, nonce, now, false},
		"an old answer":  {ca, strings.Repeat("1", 32), now, false},
		"another time":   {ca, nonce, now.Add(time.Nanosecond), false},
	} {
		t.Run(name, func(t *testing.T) {
			signature, err := tt.signer.signTime(tt.nonce, tt.at)
			if err != nil {
				t.Fatal(err)
			}
			if err := verifyTime(ca.bundle, nonce, now, signature); (err == nil) != tt.ok {
				t.Errorf("verifyTime = %v, want ok %v", err, tt.ok)
			}
		})
	}
}

// An older clock that is set right later does not move what is known.
func TestStepsOfTheMachinesClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		off := -20 * 365 * day
		c := &clock{wall: func() time.Time { return time.Now().Add(off) }}
		c.atLeast(start.Add(-day))
		if !c.behind() || !c.Now().Equal(start.Add(-day)) {
			t.Errorf("before it is told: behind %v, %v", c.behind(), c.Now())
		}
		if !c.set(start) || c.set(start) {
			t.Error("set does not say once that the clock is wrong")
		}
		off = 0 // NTP
		time.Sleep(time.Hour)
		if got := c.Now(); !got.Equal(start.Add(time.Hour)) || c.behind() {
			t.Errorf("Now = %v, want %v", got, start.Add(time.Hour))
		}
		if c.set(start.Add(time.Hour)) || !c.Now().Equal(time.Now()) {
			t.Error("a clock that is right is not trusted")
		}
	})
}

// However often the dialer complains, the provider is asked seldom: about once a
// minute while it cannot be reached, and less and less often when it can.
func TestNudgesAreBounded(t *testing.T) {
	for name, most := range map[string]int{"no link": 75, "a link": 12} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCloud(t, 30*day, 0)
				id := c.join(t)
				c.offline.Store(name == "no link")
				dials := 0
				r, err := NewRotator(RotatorConfig{
					Identity: id, Server: "127.0.0.1", Log: slog.New(slog.DiscardHandler),
					Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
						dials++
						return c.dial(ctx, network, address)
					},
				})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- r.Run(ctx) }()
				for range 3600 {
					r.Nudge()
					time.Sleep(time.Second)
				}
				cancel()
				<-done
				if dials < most/3 || dials > most {
					t.Errorf("%d dials in an hour of nudges, want %d at most", dials, most)
				}
			})
		})
	}
}
