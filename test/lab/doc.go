// Package lab sets up what end-to-end tests and demonstrations run on: a real
// control plane, a provider, and sites that are each an edgelet on a containerd
// of their own, joined over a link that can be cut. The provider and the edgelets
// are the real programs, started as a user would start them.
package lab
