package podenv

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Resource returns a resource of a container of pod as the downward API shows
// it: in units of the selector's divisor, rounded up. The selector's own
// container name counts before container. A limit that is not set is the pod's,
// and where the pod has none, what the node has for pods.
func (r *Resolver) Resource(pod *corev1.Pod, container string, selector *corev1.ResourceFieldSelector) (string, error) {
	c := findContainer(pod, container)
	if c == nil && selector.ContainerName == "" {
		return "", fmt.Errorf("container %s not found", container)
	}
	return r.resource(pod, c, selector)
}

func (r *Resolver) resource(pod *corev1.Pod, container *corev1.Container, selector *corev1.ResourceFieldSelector) (string, error) {
	if selector.ContainerName != "" {
		if container = findContainer(pod, selector.ContainerName); container == nil {
			return "", fmt.Errorf("container %s not found", selector.ContainerName)
		}
	}
	kind, name, _ := strings.Cut(selector.Resource, ".")
	resourceName := corev1.ResourceName(name)
	standard := resourceName == corev1.ResourceCPU || resourceName == corev1.ResourceMemory || resourceName == corev1.ResourceEphemeralStorage
	if kind != "limits" && kind != "requests" || !standard && !strings.HasPrefix(name, corev1.ResourceHugePagesPrefix) {
		return "", fmt.Errorf("unsupported container resource : %s", selector.Resource)
	}
	quantity := container.Resources.Requests[resourceName]
	if kind == "limits" {
		quantity = container.Resources.Limits[resourceName]
		if standard && quantity.IsZero() {
			quantity = r.defaultLimit(pod, resourceName)
		}
	}
	return divide(quantity, selector.Divisor, resourceName == corev1.ResourceCPU)
}

// defaultLimit is the limit of a container that has none.
func (r *Resolver) defaultLimit(pod *corev1.Pod, name corev1.ResourceName) resource.Quantity {
	if pod.Spec.Resources != nil && name != corev1.ResourceEphemeralStorage {
		if q, ok := pod.Spec.Resources.Limits[name]; ok && !q.IsZero() {
			return q
		}
	}
	return r.config.Allocatable()[name]
}

// divide returns quantity / divisor, rounded up; CPU counts in thousandths.
func divide(quantity, divisor resource.Quantity, milli bool) (string, error) {
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	n, d := quantity.Value(), divisor.Value()
	if milli {
		n, d = quantity.MilliValue(), divisor.MilliValue()
	}
	if d <= 0 || n < 0 {
		return "", fmt.Errorf("quantity %s divided by %s: must not be negative", quantity.String(), divisor.String())
	}
	result := n / d
	if n%d != 0 {
		result++
	}
	return strconv.FormatInt(result, 10), nil
}

func findContainer(pod *corev1.Pod, name string) *corev1.Container {
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		if i := slices.IndexFunc(list, func(c corev1.Container) bool { return c.Name == name }); i >= 0 {
			return &list[i]
		}
	}
	return nil
}
