//go:build !race

package tunnel_test

// memoryFactor is 1 without the race detector.
const memoryFactor = 1
