// Package robustness holds the product to its promises while its parts are
// killed, its sites are hostile and its input is malformed.
//
// A test records what happens in ledgers: every change of a pod as a watcher of
// the API sees it, what containerd runs as CRI tells it, and what the processes
// themselves write down. The checks are pure functions over ledgers, in this
// file, so that they are tested without any component. What they check are the
// promises: a pod runs at most once, none is lost, no status goes backwards, and
// a pod leaves the API only after its containers have ended.
package robustness

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// A PodEvent is one change of a pod as a watcher of the API saw it.
type PodEvent struct {
	At   time.Time // when the watcher learned of it
	Gone bool      // the pod has left the API

	UID, Name string
	Phase     string
	Start     string           // status.startTime as it is written; empty: not set
	Restarts  map[string]int32 // restart count of each container that has a status
	Ended     map[string]int32 // exit codes of containers that will not run again
	Bound     bool             // to a node
	Deleting  bool
	Forced    bool // deleted with a grace of 0 by a person: may leave the API early
}

// A Snapshot is what one runtime held at one time.
type Snapshot struct {
	Began, Ended time.Time // what it shows was true at some time between
	Sandboxes    []Sandbox
	Containers   []Container
}

// A Sandbox is one of a pod.
type Sandbox struct {
	ID, UID string
	Ready   bool
}

// A Container is one attempt at a container of a pod.
type Container struct {
	ID, UID, Name string
	Running       bool
}

// Terminal reports whether a phase is final.
func Terminal(phase string) bool { return phase == "Succeeded" || phase == "Failed" }

// StatusMonotone finds statuses that went backwards: a final phase that was left, a
// running pod that became pending, a restart count that fell, a start time or an
// exit code that changed, and anything that is said of a pod after it has gone.
func StatusMonotone(events []PodEvent) (found []string) {
	last := map[string]PodEvent{}
	for _, e := range events {
		was, seen := last[e.UID]
		if !seen {
			last[e.UID] = e
			continue
		}
		complain := func(format string, args ...any) {
			found = append(found, fmt.Sprintf("pod %s (%s) at %s: ", e.Name, e.UID, e.At.Format("15:04:05.000"))+fmt.Sprintf(format, args...))
		}
		if was.Gone {
			complain("is in the API again after it had left")
		}
		if Terminal(was.Phase) && e.Phase != was.Phase {
			complain("phase %s became %s", was.Phase, e.Phase)
		}
		if was.Phase == "Running" && e.Phase == "Pending" {
			complain("phase Running became Pending")
		}
		if was.Start != "" && e.Start != was.Start {
			complain("start time %s became %q", was.Start, e.Start)
		}
		if was.Deleting && !e.Deleting {
			complain("was being deleted and is not any more")
		}
		for _, name := range slices.Sorted(maps.Keys(was.Restarts)) {
			if now, ok := e.Restarts[name]; !ok || now < was.Restarts[name] {
				complain("restart count of %s fell from %d to %d", name, was.Restarts[name], now)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(was.Ended)) {
			if now, ok := e.Ended[name]; !ok || now != was.Ended[name] {
				complain("%s had ended with exit code %d, now: %v %d", name, was.Ended[name], ok, now)
			}
		}
		last[e.UID] = e
	}
	return found
}

// SingleRun finds moments at which a pod had more than one ready sandbox, or a
// container ran twice. The snapshots may be of several runtimes, but of each moment
// only one of each: then runs that overlap are found across sites too.
func SingleRun(snapshots []Snapshot) (found []string) {
	reported := map[string]bool{}
	count := func(s Snapshot, what string, ids map[string][]string) {
		for _, key := range slices.Sorted(maps.Keys(ids)) {
			if len(ids[key]) > 1 && !reported[key] {
				reported[key] = true // once is enough
				found = append(found, fmt.Sprintf("%s: %d %s of %s: %s", s.Began.Format("15:04:05.000"), len(ids[key]), what, key, strings.Join(ids[key], ", ")))
			}
		}
	}
	for _, s := range snapshots {
		ready, running := map[string][]string{}, map[string][]string{}
		for _, sb := range s.Sandboxes {
			if sb.Ready {
				ready[sb.UID] = append(ready[sb.UID], sb.ID)
			}
		}
		for _, c := range s.Containers {
			if c.Running {
				running[c.UID+"/"+c.Name] = append(running[c.UID+"/"+c.Name], c.ID)
			}
		}
		count(s, "ready sandboxes", ready)
		count(s, "running containers", running)
	}
	return found
}

// StartedOnce finds containers that must never run again but have started more than
// once, and pods that are said to have succeeded although nothing has started.
// starts counts the starts of each pod's one container, by the pod's UID, as its
// own process has recorded them; pods are the last states of the pods.
func StartedOnce(starts map[string]int, pods map[string]PodEvent) (found []string) {
	for _, uid := range slices.Sorted(maps.Keys(starts)) {
		if starts[uid] > 1 {
			found = append(found, fmt.Sprintf("pod %s (%s): its process started %d times", pods[uid].Name, uid, starts[uid]))
		}
	}
	for _, uid := range slices.Sorted(maps.Keys(pods)) {
		if pods[uid].Phase == "Succeeded" && starts[uid] == 0 {
			found = append(found, fmt.Sprintf("pod %s (%s): succeeded, but its process never started", pods[uid].Name, uid))
		}
	}
	return found
}

// NoEarlyForget finds pods that left the API while one of their containers ran:
// pods that a runtime shows running in a snapshot begun after the pod had left.
func NoEarlyForget(events []PodEvent, snapshots []Snapshot) (found []string) {
	left := map[string]PodEvent{}
	for _, e := range events {
		if e.Gone && !e.Forced {
			left[e.UID] = e
		}
	}
	reported := map[string]bool{}
	for _, s := range snapshots {
		for _, c := range s.Containers {
			if e, ok := left[c.UID]; ok && c.Running && s.Began.After(e.At) && !reported[c.ID] {
				reported[c.ID] = true
				found = append(found, fmt.Sprintf("pod %s (%s) left the API at %s, but %s ran at %s",
					e.Name, e.UID, e.At.Format("15:04:05.000"), c.Name, s.Began.Format("15:04:05.000")))
			}
		}
	}
	return found
}

// NoLostPod compares, once all has settled, the pods that are to run with those
// that do: the last states of the pods with what the runtimes hold.
func NoLostPod(pods map[string]PodEvent, now []Snapshot) (found []string) {
	running := map[string]bool{}
	for _, s := range now {
		for _, c := range s.Containers {
			if c.Running {
				running[c.UID] = true
			}
		}
	}
	for _, uid := range slices.Sorted(maps.Keys(pods)) {
		p := pods[uid]
		wanted := p.Bound && !p.Gone && !p.Deleting && !Terminal(p.Phase)
		if wanted && !running[uid] {
			found = append(found, fmt.Sprintf("pod %s (%s) is lost: nothing of it runs", p.Name, uid))
		}
		if wanted && p.Phase != "Running" {
			found = append(found, fmt.Sprintf("pod %s (%s) is %s", p.Name, uid, p.Phase))
		}
	}
	for _, uid := range slices.Sorted(maps.Keys(running)) {
		if p, ok := pods[uid]; !ok || p.Gone || Terminal(p.Phase) {
			found = append(found, fmt.Sprintf("pod %s (%s) runs, though it should not: gone %v, phase %s", p.Name, uid, p.Gone, p.Phase))
		}
	}
	return found
}

// Last returns the last state of each pod, by UID.
func Last(events []PodEvent) map[string]PodEvent {
	last := map[string]PodEvent{}
	for _, e := range events {
		last[e.UID] = e
	}
	return last
}
