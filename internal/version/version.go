// Package version says what software this is.
package version

import "runtime/debug"

// version is set by the linker: -X github.com/skerry-io/skerry/internal/version.version=v0.1.0.
var version = "v0.1.0-dev"

// String is the version of the program, as v0.1.0.
func String() string { return version }

// Kubernetes is the Kubernetes release whose API the program is built with, as v1.37.2.
func Kubernetes() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "v1.0.0"
	}
	for _, dep := range info.Deps {
		if dep.Path == "k8s.io/api" && len(dep.Version) > 2 {
			return "v1" + dep.Version[2:]
		}
	}
	return "v1.0.0"
}
