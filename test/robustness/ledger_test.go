package robustness

import (
	"strings"
	"testing"
	"time"
)

func at(seconds float64) time.Time {
	return time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC).Add(time.Duration(seconds * float64(time.Second)))
}

// check compares what a checker found with substrings, in order; none: nothing.
func check(t *testing.T, found, want []string) {
	t.Helper()
	if len(found) != len(want) {
		t.Fatalf("found %q, want %q", found, want)
	}
	for i := range want {
		if !strings.Contains(found[i], want[i]) {
			t.Errorf("found %q, want %q", found[i], want[i])
		}
	}
}

func TestStatusMonotone(t *testing.T) {
	event := func(phase string, change ...func(*PodEvent)) PodEvent {
		e := PodEvent{UID: "u", Name: "web", Phase: phase}
		for _, c := range change {
			c(&e)
		}
		return e
	}
	restarts := func(n int32) func(*PodEvent) {
		return func(e *PodEvent) { e.Restarts = map[string]int32{"main": n} }
	}
	ended := func(code int32) func(*PodEvent) {
		return func(e *PodEvent) { e.Ended = map[string]int32{"main": code} }
	}
	start := func(s string) func(*PodEvent) { return func(e *PodEvent) { e.Start = s } }
	deleting := func(e *PodEvent) { e.Deleting = true }
	gone := func(e *PodEvent) { e.Gone = true }
	tests := map[string]struct {
		events []PodEvent
		want   []string
	}{
		"a life":                         {[]PodEvent{event("Pending"), event("Running", restarts(0), start("1")), event("Running", restarts(1), start("1")), event("Succeeded", restarts(1), start("1"), ended(0)), event("Succeeded", restarts(1), start("1"), ended(0), deleting), event("Succeeded", restarts(1), start("1"), ended(0), deleting, gone)}, nil},
		"repeated states":                {[]PodEvent{event("Running"), event("Running")}, nil},
		"two pods of one name":           {[]PodEvent{event("Succeeded"), {UID: "v", Name: "web", Phase: "Pending"}}, nil},
		"a final phase is left":          {[]PodEvent{event("Succeeded"), event("Running")}, []string{"Succeeded became Running"}},
		"one final phase for another":    {[]PodEvent{event("Failed"), event("Succeeded")}, []string{"Failed became Succeeded"}},
		"running becomes pending":        {[]PodEvent{event("Running"), event("Pending")}, []string{"Running became Pending"}},
		"a restart count falls":          {[]PodEvent{event("Running", restarts(2)), event("Running", restarts(1))}, []string{"fell from 2 to 1"}},
		"a container's status vanishes":  {[]PodEvent{event("Running", restarts(1)), event("Running")}, []string{"fell from 1 to 0"}},
		"the start time changes":         {[]PodEvent{event("Running", start("1")), event("Running", start("2"))}, []string{`start time 1 became "2"`}},
		"the start time vanishes":        {[]PodEvent{event("Running", start("1")), event("Running")}, []string{`start time 1 became ""`}},
		"an exit code changes":           {[]PodEvent{event("Failed", ended(1)), event("Failed", ended(137))}, []string{"exit code 1"}},
		"what has ended runs":            {[]PodEvent{event("Running", ended(1)), event("Running")}, []string{"exit code 1"}},
		"a deletion is taken back":       {[]PodEvent{event("Running", deleting), event("Running")}, []string{"is not any more"}},
		"a pod that had gone comes back": {[]PodEvent{event("Running", gone), event("Running")}, []string{"in the API again"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { check(t, StatusMonotone(tt.events), tt.want) })
	}
}

func TestSingleRun(t *testing.T) {
	running := func(id, name string) Container { return Container{id, "u", name, true} }
	tests := map[string]struct {
		snapshots []Snapshot
		want      []string
	}{
		"one of each":                     {[]Snapshot{{Sandboxes: []Sandbox{{"s", "u", true}}, Containers: []Container{running("a", "x"), running("b", "y")}}}, nil},
		"an old one beside a new":         {[]Snapshot{{Sandboxes: []Sandbox{{"s", "u", false}, {"t", "u", true}}, Containers: []Container{{"a", "u", "x", false}, running("b", "x")}}}, nil},
		"one after the other":             {[]Snapshot{{Containers: []Container{running("a", "x")}}, {Containers: []Container{running("b", "x")}}}, nil},
		"two sandboxes":                   {[]Snapshot{{Sandboxes: []Sandbox{{"s", "u", true}, {"t", "u", true}}}}, []string{"2 ready sandboxes of u: s, t"}},
		"two of a container":              {[]Snapshot{{Containers: []Container{running("a", "x"), running("b", "x")}}}, []string{"2 running containers of u/x: a, b"}},
		"two of a container all the time": {[]Snapshot{{Containers: []Container{running("a", "x"), running("b", "x")}}, {Containers: []Container{running("a", "x"), running("b", "x")}}}, []string{"2 running"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { check(t, SingleRun(tt.snapshots), tt.want) })
	}
}

func TestStartedOnce(t *testing.T) {
	succeeded := map[string]PodEvent{"u": {UID: "u", Name: "job", Phase: "Succeeded"}}
	tests := map[string]struct {
		starts map[string]int
		pods   map[string]PodEvent
		want   []string
	}{
		"once":                            {map[string]int{"u": 1}, succeeded, nil},
		"never, and failed":               {nil, map[string]PodEvent{"u": {UID: "u", Phase: "Failed"}}, nil},
		"twice":                           {map[string]int{"u": 2}, succeeded, []string{"started 2 times"}},
		"never, and said to have been":    {nil, succeeded, []string{"never started"}},
		"twice, of a pod that is unknown": {map[string]int{"v": 2}, nil, []string{"started 2 times"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { check(t, StartedOnce(tt.starts, tt.pods), tt.want) })
	}
}

func TestNoEarlyForget(t *testing.T) {
	gone := PodEvent{At: at(10), UID: "u", Name: "web", Gone: true}
	forced := gone
	forced.Forced = true
	shows := func(seconds float64, running bool) Snapshot {
		return Snapshot{Began: at(seconds), Ended: at(seconds + 1), Containers: []Container{{"a", "u", "main", running}}}
	}
	tests := map[string]struct {
		events    []PodEvent
		snapshots []Snapshot
		want      []string
	}{
		"ran before":                           {[]PodEvent{gone}, []Snapshot{shows(9, true), shows(11, false)}, nil},
		"a look that had begun before":         {[]PodEvent{gone}, []Snapshot{shows(9.5, true)}, nil},
		"still there":                          {[]PodEvent{{At: at(1), UID: "u"}}, []Snapshot{shows(9, true)}, nil},
		"runs after it has left":               {[]PodEvent{gone}, []Snapshot{shows(11, true), shows(12, true)}, []string{"left the API at 12:00:10.000, but main ran at 12:00:11.000"}},
		"runs after it has left by force":      {[]PodEvent{forced}, []Snapshot{shows(11, true)}, nil},
		"another pod of that name has started": {[]PodEvent{gone}, []Snapshot{{Began: at(11), Containers: []Container{{"b", "v", "main", true}}}}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { check(t, NoEarlyForget(tt.events, tt.snapshots), tt.want) })
	}
}

func TestNoLostPod(t *testing.T) {
	runs := []Snapshot{{Containers: []Container{{"a", "u", "main", true}}}}
	stopped := []Snapshot{{Containers: []Container{{"a", "u", "main", false}}}}
	pod := func(e PodEvent) map[string]PodEvent { e.UID, e.Name = "u", "web"; return map[string]PodEvent{"u": e} }
	tests := map[string]struct {
		pods map[string]PodEvent
		now  []Snapshot
		want []string
	}{
		"runs as it should":               {pod(PodEvent{Phase: "Running", Bound: true}), runs, nil},
		"has ended":                       {pod(PodEvent{Phase: "Succeeded", Bound: true}), stopped, nil},
		"waits for a node":                {pod(PodEvent{Phase: "Pending"}), nil, nil},
		"is lost":                         {pod(PodEvent{Phase: "Running", Bound: true}), stopped, []string{"is lost"}},
		"was never started":               {pod(PodEvent{Phase: "Pending", Bound: true}), nil, []string{"is lost", "is Pending"}},
		"runs, and nobody says so":        {pod(PodEvent{Phase: "Pending", Bound: true}), runs, []string{"is Pending"}},
		"runs though it has left":         {pod(PodEvent{Phase: "Running", Bound: true, Gone: true}), runs, []string{"though it should not"}},
		"runs though it has ended":        {pod(PodEvent{Phase: "Failed", Bound: true}), runs, []string{"though it should not"}},
		"runs and nobody has heard of it": {nil, runs, []string{"though it should not"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { check(t, NoLostPod(tt.pods, tt.now), tt.want) })
	}
}

func TestLast(t *testing.T) {
	last := Last([]PodEvent{{UID: "u", Phase: "Pending"}, {UID: "v", Phase: "Pending"}, {UID: "u", Phase: "Running"}})
	if len(last) != 2 || last["u"].Phase != "Running" || last["v"].Phase != "Pending" {
		t.Errorf("Last = %v", last)
	}
}
