//go:build race

package tunnel_test

// memoryFactor is by how much more memory the race detector makes a program use.
const memoryFactor = 4
