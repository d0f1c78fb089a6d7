// Package backoff provides the one way in which Skerry tries again: full
// jitter, so that a thousand sites that lost the same cloud do not return
// together.
package backoff

import (
	"context"
	"iter"
	"math"
	"math/rand/v2"
	"time"
)

// Retry yields attempt numbers 0, 1, 2… until ctx is done or the loop is left.
// Attempt 0 comes at once; before attempt n+1 it sleeps [Delay] of n.
//
//	for range backoff.Retry(ctx, time.Second, time.Minute) {
//		if err = try(); err == nil {
//			return nil
//		}
//	}
//	return cmp.Or(err, context.Cause(ctx)) // ctx is done
func Retry(ctx context.Context, base, limit time.Duration) iter.Seq[int] {
	return func(yield func(int) bool) {
		for n := 0; ctx.Err() == nil && yield(n); n++ {
			if Sleep(ctx, Delay(n, base, limit)) != nil {
				return
			}
		}
	}
}

// Delay returns a random time in [0, min(base<<n, limit)): how long to wait
// after failure number n, counted from 0. A base or limit of zero or less, or
// a negative n, means no delay.
func Delay(n int, base, limit time.Duration) time.Duration {
	most := limit
	// base<<n only while it can neither overflow nor pass limit.
	if n < 63 && base <= math.MaxInt64>>max(n, 0) {
		most = min(base<<max(n, 0), limit)
	}
	if n < 0 || base <= 0 || most <= 0 {
		return 0
	}
	return rand.N(most)
}

// Sleep waits for d or until ctx is done, whose cause it then returns.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
