package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// pods lists the pods that the site should run, with their status.
func (s *server) pods(w http.ResponseWriter, r *http.Request) error {
	return reply(w, podList(s.Pods.Pods(), func(pod *corev1.Pod) (corev1.Pod, bool) {
		p := *pod
		p.ManagedFields = nil
		return p, true
	}))
}

// runningPods lists the pods of which something runs: their names and containers.
func (s *server) runningPods(w http.ResponseWriter, r *http.Request) error {
	return reply(w, podList(s.Pods.Pods(), func(pod *corev1.Pod) (p corev1.Pod, ok bool) {
		p.Name, p.Namespace, p.UID = pod.Name, pod.Namespace, pod.UID
		for _, list := range [][]corev1.ContainerStatus{
			pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses,
		} {
			for i := range list {
				if list[i].State.Running != nil {
					p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: list[i].Name, Image: list[i].Image})
				}
			}
		}
		return p, len(p.Spec.Containers) > 0
	}))
}

func podList(pods []*corev1.Pod, show func(*corev1.Pod) (corev1.Pod, bool)) corev1.PodList {
	list := corev1.PodList{
		TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"},
		Items:    make([]corev1.Pod, 0, len(pods)),
	}
	for _, pod := range pods {
		if p, ok := show(pod); ok {
			list.Items = append(list.Items, p)
		}
	}
	return list
}

// configz shows the configuration.
func (s *server) configz(w http.ResponseWriter, r *http.Request) error {
	return reply(w, s.Configz())
}

// healthz answers for the whole edgelet or for one of its checks.
func (s *server) healthz(w http.ResponseWriter, r *http.Request) error {
	checks := []struct {
		name  string
		check func(context.Context) error
	}{
		{"ping", func(context.Context) error { return nil }},
		{"log", func(context.Context) error { return nil }},
		{"syncloop", func(ctx context.Context) error {
			if s.Healthz == nil {
				return nil
			}
			return s.Healthz(ctx)
		}},
	}
	only := r.PathValue("check")
	var out strings.Builder
	var failed error
	found := only == ""
	for _, c := range checks {
		if only != "" && only != c.name {
			continue
		}
		found = true
		if err := c.check(r.Context()); err != nil {
			fmt.Fprintf(&out, "[-]%s failed: %v\n", c.name, err)
			failed = errors.Join(failed, err)
		} else {
			fmt.Fprintf(&out, "[+]%s ok\n", c.name)
		}
	}
	switch {
	case !found:
		return failf(http.StatusNotFound, "no health check %q", only)
	case failed != nil:
		return failf(http.StatusInternalServerError, "%shealthz check failed", &out)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if only == "" && r.URL.Query().Has("verbose") {
		fmt.Fprintf(w, "%shealthz check passed\n", &out)
	} else {
		fmt.Fprint(w, "ok")
	}
	return nil
}
