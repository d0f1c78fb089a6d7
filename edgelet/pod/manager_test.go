package pod

import (
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func TestPodLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.engine()
		pod := newPod()
		if err := w.m.Set(pod); err != nil {
			t.Fatal(err)
		}
		w.sleep(time.Second)
		s := w.status("u1")
		if s.Phase != corev1.PodRunning || s.PodIP != "10.0.0.7" || s.HostIP != "192.0.2.1" || s.ObservedGeneration != 3 {
			t.Errorf("status = %+v, want Running with addresses", s)
		}
		if c := s.ContainerStatuses[0]; !c.Ready || c.Started == nil || !*c.Started || c.State.Running == nil || c.ContainerID != "containerd://c-3" {
			t.Errorf("container = %+v, want ready", c)
		}
		if err := w.m.Set(deleted(pod, 30)); err != nil {
			t.Fatal(err)
		}
		w.sleep(time.Second)
		last := w.site.last("u1")
		if !last.Gone || last.Status.Phase != corev1.PodFailed || last.Status.ContainerStatuses[0].State.Terminated.ExitCode != 143 {
			t.Errorf("status = %+v, want gone, failed with 143", last)
		}
		w.m.Remove("u1")
		w.sleep(time.Second)
		if !w.site.forgotten["u1"] || len(w.site.records) > 0 || len(w.rt.sandboxes) > 0 || len(w.m.Pods()) > 0 {
			t.Errorf("forgotten %v, records %v, sandboxes %v, pods %v", w.site.forgotten, w.site.records, w.rt.sandboxes, w.m.Pods())
		}
		w.end()
		for _, e := range w.site.events {
			t.Log(e)
		}
	})
}
