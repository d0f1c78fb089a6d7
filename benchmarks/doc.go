// Package benchmarks measures whole paths on real components: a control plane, the
// provider and an edgelet on containerd, all on this machine. Each figure stands
// beside its floor, measured in the same run: absolute figures move with the
// machine, ratios do not. It needs root; `make bench` runs it. results/ holds what
// was measured when, on what.
package benchmarks
