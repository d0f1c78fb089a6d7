package stats

import (
	"cmp"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Thresholds are below what a machine is under pressure. Zero means the default,
// negative never.
type Thresholds struct {
	Memory      int64         // bytes available; default 100 MiB
	Node        int           // percent available of the node's file system; default 10
	NodeInodes  int           // percent free; default 5
	Image       int           // percent available of the images' file system; default 15
	ImageInodes int           // percent free; default 5
	PIDs        int           // percent of process ids free; default 10
	Transition  time.Duration // for which pressure must be gone before it is over; default 5m
}

func (t Thresholds) withDefaults() Thresholds {
	t.Memory = cmp.Or(t.Memory, 100<<20)
	t.Node = cmp.Or(t.Node, 10)
	t.NodeInodes = cmp.Or(t.NodeInodes, 5)
	t.Image = cmp.Or(t.Image, 15)
	t.ImageInodes = cmp.Or(t.ImageInodes, 5)
	t.PIDs = cmp.Or(t.PIDs, 10)
	t.Transition = cmp.Or(t.Transition, 5*time.Minute)
	return t
}

// An Observation is what pressure is judged by. What could not be read is nil, and
// counts as neither high nor low.
type Observation struct {
	Memory      *Memory
	Node, Image *Filesystem
	Processes   *Processes
}

// Processes are processes and threads, of which there may be Most.
type Processes struct{ Now, Most uint64 }

// PressureState is what the next judgement needs to know of the ones before. The
// zero value is no pressure.
type PressureState struct {
	Seen  map[corev1.NodeConditionType]time.Time // when pressure was last observed
	Since map[corev1.NodeConditionType]time.Time // when the condition became what it is
	On    map[corev1.NodeConditionType]bool
}

// Pressures judges an observation. Pressure is there as soon as it is observed and
// over when it has not been observed for a while, so that a machine at its limit
// does not flicker. It is pure.
func Pressures(t Thresholds, before PressureState, o Observation, now time.Time) PressureState {
	observed := map[corev1.NodeConditionType]bool{
		corev1.NodeMemoryPressure: o.Memory != nil && t.Memory >= 0 && o.Memory.Available() < uint64(t.Memory),
		corev1.NodeDiskPressure: o.Node.below(t.Node, t.NodeInodes) ||
			o.Image.below(t.Image, t.ImageInodes),
		corev1.NodePIDPressure: o.Processes != nil && below(sub(o.Processes.Most, o.Processes.Now), o.Processes.Most, t.PIDs),
	}
	after := PressureState{map[corev1.NodeConditionType]time.Time{}, map[corev1.NodeConditionType]time.Time{}, map[corev1.NodeConditionType]bool{}}
	for kind, is := range observed {
		seen, since := before.Seen[kind], before.Since[kind]
		if is {
			seen = now
		}
		on := is || before.On[kind] && now.Sub(seen) < t.Transition
		if since.IsZero() || on != before.On[kind] {
			since = now
		}
		after.Seen[kind], after.Since[kind], after.On[kind] = seen, since, on
	}
	return after
}

// below reports whether too little of a file system is left.
func (fs *Filesystem) below(percent, inodePercent int) bool {
	return fs != nil && (below(fs.Available, fs.Capacity, percent) || below(fs.InodesFree, fs.Inodes, inodePercent))
}

// below reports whether part is less than percent of whole. Of nothing, nothing is
// too little.
func below(part, whole uint64, percent int) bool {
	return whole > 0 && percent >= 0 && float64(part)*100 < float64(whole)*float64(percent)
}

// Conditions are the state as those of a Node, as a kubelet words them.
// LastHeartbeatTime is left to whoever writes the Node.
func (s PressureState) Conditions() []corev1.NodeCondition {
	words := []struct {
		kind             corev1.NodeConditionType
		reasons, message [2]string // when off, when on
	}{
		{corev1.NodeMemoryPressure, [2]string{"KubeletHasSufficientMemory", "KubeletHasInsufficientMemory"},
			[2]string{"kubelet has sufficient memory available", "kubelet has insufficient memory available"}},
		{corev1.NodeDiskPressure, [2]string{"KubeletHasNoDiskPressure", "KubeletHasDiskPressure"},
			[2]string{"kubelet has no disk pressure", "kubelet has disk pressure"}},
		{corev1.NodePIDPressure, [2]string{"KubeletHasSufficientPID", "KubeletHasInsufficientPID"},
			[2]string{"kubelet has sufficient PID available", "kubelet has insufficient PID available"}},
	}
	conditions := make([]corev1.NodeCondition, 0, len(words))
	for _, w := range words {
		i, status := 0, corev1.ConditionFalse
		if s.On[w.kind] {
			i, status = 1, corev1.ConditionTrue
		}
		conditions = append(conditions, corev1.NodeCondition{
			Type: w.kind, Status: status, Reason: w.reasons[i], Message: w.message[i],
			LastTransitionTime: metav1.NewTime(s.Since[w.kind].Truncate(time.Second)),
		})
	}
	return conditions
}
