package backoff

import (
	"context"
	"errors"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

func TestDelayStaysBelowItsBound(t *testing.T) {
	tests := map[string]struct {
		n           int
		base, limit time.Duration
		most        time.Duration // exclusive; 0 means exactly no delay
	}{
		"first failure: up to base":          {0, time.Second, time.Minute, time.Second},
		"doubles":                            {3, time.Second, time.Minute, 8 * time.Second},
		"never more than limit":              {10, time.Second, time.Minute, time.Minute},
		"limit below base":                   {0, time.Minute, time.Second, time.Second},
		"large n does not overflow":          {200, time.Second, time.Minute, time.Minute},
		"large base does not overflow":       {20, 24 * time.Hour, 48 * time.Hour, 48 * time.Hour},
		"largest values do not overflow":     {63, math.MaxInt64, math.MaxInt64, math.MaxInt64},
		"no base: no delay":                  {5, 0, time.Minute, 0},
		"no limit: no delay":                 {5, time.Second, 0, 0},
		"negative base: no delay":            {5, -time.Second, time.Minute, 0},
		"negative attempt number: no delay":  {-1, time.Second, time.Minute, 0},
		"smallest base is still a valid one": {0, 1, time.Minute, 1},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			for range 1000 {
				d := Delay(tt.n, tt.base, tt.limit)
				if d < 0 || d > 0 && d >= tt.most {
					t.Fatalf("Delay(%d, %v, %v) = %v, want in [0, %v)", tt.n, tt.base, tt.limit, d, tt.most)
				}
			}
		})
	}
}

func TestDelayIsSpreadOverTheWholeRange(t *testing.T) {
	var low, high int
	for range 10_000 {
		switch d := Delay(4, time.Second, time.Minute); {
		case d < 4*time.Second:
			low++
		case d >= 12*time.Second:
			high++
		}
	}
	// A quarter each is expected; the bounds are thirty standard deviations away.
	if low < 1200 || high < 1200 {
		t.Errorf("of 10000 delays up to 16s, %d below 4s and %d above 12s, want about 2500 each", low, high)
	}
}

func TestRetry(t *testing.T) {
	t.Run("counts from zero and comes at once the first time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			start, want := time.Now(), 0
			for n := range Retry(t.Context(), time.Second, time.Minute) {
				if n != want {
					t.Fatalf("attempt %d, want %d", n, want)
				}
				if gap := time.Since(start); n == 0 && gap != 0 || n == 1 && gap >= time.Second {
					t.Fatalf("attempt %d came after %v", n, gap)
				}
				if want++; want == 50 {
					break
				}
			}
			if d := time.Since(start); d > time.Hour {
				t.Errorf("50 attempts took %v, more than limit allows", d)
			}
		})
	})
	t.Run("ends while sleeping when ctx is done", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			start := time.Now()
			for range Retry(ctx, time.Hour, 1000*time.Hour) {
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("Retry went on for %v after ctx was done", d-5*time.Second)
			}
		})
	})
	t.Run("yields nothing when ctx is done before", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for n := range Retry(ctx, time.Second, time.Minute) {
			t.Fatalf("attempt %d after ctx was done", n)
		}
	})
}

func TestSleepReturnsTheCause(t *testing.T) {
	cause := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := Sleep(ctx, time.Hour); err != cause {
		t.Errorf("Sleep = %v, want %v", err, cause)
	}
	if err := Sleep(t.Context(), 0); err != nil {
		t.Errorf("Sleep(0) = %v", err)
	}
}
