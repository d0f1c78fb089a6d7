package pod

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

const grace = 30 * time.Second

// A pod of containers "a" and "b", changed by name.
func planned(policy corev1.RestartPolicy, change ...func(*corev1.Pod)) *corev1.Pod {
	pod := newPod(change...)
	pod.Spec.RestartPolicy = policy
	if len(change) == 0 {
		pod.Spec.Containers = []corev1.Container{{Name: "a", Image: "i"}}
	}
	return pod
}

func with(inits []corev1.Container, mains ...corev1.Container) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Spec.InitContainers, p.Spec.Containers = inits, mains }
}

func ctr(name string) corev1.Container { return corev1.Container{Name: name, Image: "i"} }

func sidecar(name string) corev1.Container {
	return corev1.Container{Name: name, Image: "i", RestartPolicy: new(corev1.ContainerRestartPolicyAlways)}
}

func inits(c ...corev1.Container) []corev1.Container { return c }

var (
	box   = Sandbox{ID: "s0", Ready: true, IPs: []string{"10.0.0.1"}}
	dead  = Sandbox{ID: "s0", Stopped: true}
	died  = Sandbox{ID: "s0"}
	box1  = Sandbox{ID: "s1", Attempt: 1, Ready: true, IPs: []string{"10.0.0.1"}}
	noIP  = Sandbox{ID: "s0", Ready: true}
	onNet = Sandbox{ID: "s0", Ready: true, Network: cri.NamespaceMode_NODE}
)

func hash(name string) string { return criconfig.Hash(&corev1.Container{Name: name, Image: "i"}) }

// run is a run of a container in sandbox s0: "a" runs, "a=0" has exited with 0 a
// minute ago, "a?" is unknown, "a." is created. "#2" says that its attempt is 2.
func runs(list ...string) []Container {
	var all []Container
	for _, s := range list {
		s, sandbox, ok := strings.Cut(s, "@")
		if !ok {
			sandbox = "s0"
		}
		s, attempt, _ := strings.Cut(s, "#")
		c := Container{SandboxID: sandbox, Probe: ProbeResult{Started: true, Ready: true}, State: cri.ContainerState_CONTAINER_RUNNING,
			Started: t0.Add(-2 * time.Minute)}
		fmt.Sscan(attempt, &c.Attempt)
		name, code, exited := strings.Cut(s, "=")
		switch {
		case exited:
			c.State, c.Finished = cri.ContainerState_CONTAINER_EXITED, t0.Add(-time.Minute)
			fmt.Sscan(code, &c.ExitCode)
		case strings.HasSuffix(s, "?"):
			name, c.State = strings.TrimSuffix(s, "?"), cri.ContainerState_CONTAINER_UNKNOWN
		case strings.HasSuffix(s, "."):
			name, c.State, c.Started = strings.TrimSuffix(s, "."), cri.ContainerState_CONTAINER_CREATED, time.Time{}
		case strings.HasSuffix(s, "~"):
			name, c.Probe = strings.TrimSuffix(s, "~"), ProbeResult{}
		case strings.HasSuffix(s, "!"):
			name = strings.TrimSuffix(s, "!")
			c.Probe.Unhealthy = "liveness"
		}
		c.Name, c.Hash, c.ID = name, hash(name), name+"-"+fmt.Sprint(c.Attempt)
		all = append(all, c)
	}
	return all
}

// saw is a pod in its sandbox, volumes set up.
func saw(list ...string) Observed {
	return Observed{Sandboxes: []Sandbox{box}, Containers: runs(list...), Volumes: true}
}

func in(o Observed, sandboxes ...Sandbox) Observed {
	o.Sandboxes = sandboxes
	return o
}

func knowing(o Observed, name string, m Memory) Observed {
	o.Memory = map[string]Memory{name: m}
	return o
}

func exited(o Observed, ago time.Duration) Observed {
	o.Containers[0].Finished = t0.Add(-ago)
	return o
}

func start(name string) StartContainer { return StartContainer{Name: name} }

func startN(name string, attempt uint32) StartContainer {
	return StartContainer{Name: name, Attempt: attempt}
}

func kill(name string, after ...string) StopContainer {
	return StopContainer{Name: name, ID: name + "-0", Grace: grace, After: after}
}

func killSaying(name, message string) StopContainer {
	return StopContainer{Name: name, ID: name + "-0", Grace: grace, Message: message}
}

const changedBox = "Pod sandbox changed, it will be killed and re-created."

func TestPlan(t *testing.T) {
	const (
		always  = corev1.RestartPolicyAlways
		failure = corev1.RestartPolicyOnFailure
		never   = corev1.RestartPolicyNever
	)
	ab := with(nil, ctr("a"), ctr("b"))
	ia := with(inits(ctr("i"), ctr("j")), ctr("a"))
	sa := with(inits(sidecar("s")), ctr("a"))
	isa := with(inits(ctr("i"), sidecar("s"), ctr("j")), ctr("a"))
	ssa := with(inits(sidecar("s"), sidecar("u")), ctr("a"), ctr("b"))
	backedOff := Memory{Backoff: 20 * time.Second, Backed: t0.Add(-2 * time.Minute), Key: "i", Begun: true}
	stop := func(p *corev1.Pod, since time.Duration) Spec {
		return Spec{Pod: p, Stop: &Stop{Since: t0.Add(-since), Grace: grace, Remove: true}}
	}
	over := func(p *corev1.Pod) Spec { return Spec{Pod: p, Stop: &Stop{Since: t0, Grace: grace}} }
	tests := map[string]struct {
		spec Spec
		obs  Observed
		want []Action
	}{
		// Beginning
		"nothing yet: volumes, sandbox, container":      {Spec{Pod: planned(always)}, Observed{}, []Action{SetUpVolumes{}, RunSandbox{}, start("a")}},
		"nothing yet, two containers: both, in order":   {Spec{Pod: planned(always, ab)}, Observed{}, []Action{SetUpVolumes{}, RunSandbox{}, start("a"), start("b")}},
		"nothing yet, init containers: the first alone": {Spec{Pod: planned(always, ia)}, Observed{}, []Action{SetUpVolumes{}, RunSandbox{}, start("i")}},
		"nothing yet, a sidecar: it alone":              {Spec{Pod: planned(always, sa)}, Observed{}, []Action{SetUpVolumes{}, RunSandbox{}, start("s")}},
		"sandbox alone: the container":                  {Spec{Pod: planned(always)}, saw(), []Action{SetUpVolumes{}, start("a")}},
		"running: settled":                              {Spec{Pod: planned(always)}, saw("a"), nil},
		"running, volumes to be refreshed":              {Spec{Pod: planned(always)}, Observed{Sandboxes: []Sandbox{box}, Containers: runs("a")}, []Action{SetUpVolumes{}}},
		"one of two runs: the other":                    {Spec{Pod: planned(always, ab)}, saw("a"), []Action{SetUpVolumes{}, start("b")}},
		"created, not started: the same is started":     {Spec{Pod: planned(always)}, saw("a."), []Action{SetUpVolumes{}, StartContainer{Name: "a", ID: "a-0"}}},
		"created, must run once: the same is started":   {Spec{Pod: planned(never)}, saw("a."), []Action{SetUpVolumes{}, StartContainer{Name: "a", ID: "a-0"}}},
		"created of a third run: the same attempt":      {Spec{Pod: planned(always)}, saw("a.#2"), []Action{SetUpVolumes{}, StartContainer{Name: "a", Attempt: 2, ID: "a-2"}}},
		"could not be started: wait": {Spec{Pod: planned(always)}, knowing(saw(), "a", Memory{Failure: Failure{Retry: t0.Add(5 * time.Second)}}),
			[]Action{Wait{t0.Add(5 * time.Second)}}},
		"could not be started, waited: again": {Spec{Pod: planned(always)}, knowing(saw(), "a", Memory{Failure: Failure{Retry: t0}}),
			[]Action{SetUpVolumes{}, start("a")}},
		"one cannot be started: the other is": {Spec{Pod: planned(always, ab)}, knowing(saw(), "a", Memory{Failure: Failure{Retry: t0.Add(5 * time.Second)}}),
			[]Action{SetUpVolumes{}, start("b"), Wait{t0.Add(5 * time.Second)}}},

		// Ends
		"exited once, always: again at once":    {Spec{Pod: planned(always)}, saw("a=0"), []Action{SetUpVolumes{}, startN("a", 1)}},
		"crashed once, on failure: again":       {Spec{Pod: planned(failure)}, saw("a=1"), []Action{SetUpVolumes{}, startN("a", 1)}},
		"succeeded, on failure: over":           {Spec{Pod: planned(failure)}, saw("a=0"), []Action{StopSandbox{"s0"}}},
		"succeeded, never: over":                {Spec{Pod: planned(never)}, saw("a=0"), []Action{StopSandbox{"s0"}}},
		"failed, never: over":                   {Spec{Pod: planned(never)}, saw("a=1"), []Action{StopSandbox{"s0"}}},
		"one of two is over: the other runs on": {Spec{Pod: planned(never, ab)}, saw("a=1", "b"), nil},
		"over, sidecar runs: it ends too":       {Spec{Pod: planned(never, sa)}, saw("a=0", "s"), []Action{kill("s"), StopSandbox{"s0"}}},
		"over, sandbox gone: nothing":           {Spec{Pod: planned(never)}, in(saw("a=0"), dead), nil},
		"over on failure after a reboot: the sandbox is not made again": {Spec{Pod: planned(failure, ia)},
			in(saw("a=0", "i=0", "j=0"), dead), nil},
		"in back-off: wait": {Spec{Pod: planned(always)}, exited(knowing(saw("a=1"), "a", backedOff), 5*time.Second),
			[]Action{Wait{t0.Add(15 * time.Second)}}},
		"back-off over: again": {Spec{Pod: planned(always)}, exited(knowing(saw("a=1"), "a", backedOff), 20*time.Second),
			[]Action{SetUpVolumes{}, startN("a", 1)}},
		"back-off of another image: again at once": {Spec{Pod: planned(always)},
			exited(knowing(saw("a=1"), "a", Memory{Backoff: 300 * time.Second, Backed: t0, Key: "j"}), time.Second),
			[]Action{SetUpVolumes{}, startN("a", 1)}},
		"ran for eleven minutes: back-off is forgotten": {Spec{Pod: planned(always)},
			exited(knowing(saw("a=1"), "a", Memory{Backoff: 300 * time.Second, Backed: t0.Add(-11 * time.Minute), Key: "i"}), 0),
			[]Action{SetUpVolumes{}, startN("a", 1)}},
		"ended in the future, the clock was set back: again at once": {Spec{Pod: planned(always)},
			exited(knowing(saw("a=1"), "a", backedOff), -time.Hour), []Action{SetUpVolumes{}, startN("a", 1)}},
		"one in back-off, the other over: wait": {Spec{Pod: planned(failure, ab)}, exited(knowing(saw("a=1", "b=0"), "a", backedOff), 5*time.Second),
			[]Action{Wait{t0.Add(15 * time.Second)}}},
		"attempts are never given twice": {Spec{Pod: planned(always)}, knowing(saw(), "a", Memory{Begun: true, Next: 7}),
			[]Action{SetUpVolumes{}, startN("a", 7)}},
		"killed by the kernel with code 0, on failure: again": {Spec{Pod: planned(failure)}, func() Observed {
			o := saw("a=0")
			o.Containers[0].Reason = "OOMKilled"
			return o
		}(), []Action{SetUpVolumes{}, startN("a", 1)}},
		"unknown, always: killed, then again": {Spec{Pod: planned(always)}, saw("a?"), []Action{SetUpVolumes{},
			killSaying("a", "Container a is in an unknown state, try killing it before restart"), startN("a", 1)}},
		"unknown, never: over": {Spec{Pod: planned(never)}, saw("a?"), []Action{kill("a"), StopSandbox{"s0"}}},

		// Restart policies of containers
		"own policy never in a pod that restarts: over with the rest": {Spec{Pod: planned(always, with(nil, once("a")))}, saw("a=1"), []Action{StopSandbox{"s0"}}},
		"own policy always in a pod that does not: again": {Spec{Pod: planned(never, with(nil, sidecar("a")))}, saw("a=1"),
			[]Action{SetUpVolumes{}, startN("a", 1)}},
		"rule for its exit code: again":     {Spec{Pod: planned(never, with(nil, ruled("a", 42)))}, saw("a=42"), []Action{SetUpVolumes{}, startN("a", 1)}},
		"rule for another exit code: over":  {Spec{Pod: planned(never, with(nil, ruled("a", 42)))}, saw("a=1"), []Action{StopSandbox{"s0"}}},
		"rule, but nobody saw it end: over": {Spec{Pod: planned(never, with(nil, ruled("a", 137)))}, knowing(saw(), "a", Memory{Begun: true}), []Action{StopSandbox{"s0"}}},
		"rule and a code that is remembered: again": {Spec{Pod: planned(never, with(nil, ruled("a", 42)))},
			knowing(saw(), "a", Memory{Begun: true, Next: 1, Exited: new(int32(42))}), []Action{SetUpVolumes{}, startN("a", 1)}},

		// At most once
		"begun, never, and lost: over":              {Spec{Pod: planned(never)}, knowing(saw(), "a", Memory{Begun: true}), []Action{StopSandbox{"s0"}}},
		"begun, never, and all lost: no sandbox":    {Spec{Pod: planned(never)}, knowing(Observed{}, "a", Memory{Begun: true}), nil},
		"begun, always, and all lost: from anew":    {Spec{Pod: planned(always)}, knowing(Observed{}, "a", Memory{Begun: true, Next: 1}), []Action{SetUpVolumes{}, RunSandbox{}, startN("a", 1)}},
		"succeeded, on failure, and all lost: over": {Spec{Pod: planned(failure)}, knowing(Observed{}, "a", Memory{Begun: true, Exited: new(int32(0))}), nil},
		"never, its sandbox died: over":             {Spec{Pod: planned(never)}, in(saw("a=255"), dead), nil},
		"never, runs in a sandbox that died: killed": {Spec{Pod: planned(never)}, in(saw("a"), died),
			[]Action{killSaying("a", changedBox), StopSandbox{"s0"}}},
		"never, created in a sandbox that died: created again": {Spec{Pod: planned(never)}, in(saw("a."), dead),
			[]Action{SetUpVolumes{}, RunSandbox{1}, startN("a", 1)}},
		"never, one begun, one not, sandbox died: the other alone": {Spec{Pod: planned(never, ab)}, in(saw("a=0"), dead),
			[]Action{SetUpVolumes{}, RunSandbox{1}, start("b")}},
		"never, init done, sandbox died: init is not done again": {Spec{Pod: planned(never, ia)}, in(saw("i=0", "j=0"), dead),
			[]Action{SetUpVolumes{}, RunSandbox{1}, start("a")}},
		"never, init was interrupted: failed": {Spec{Pod: planned(never, ia)}, in(saw("i=255"), dead), nil},

		// Sandboxes
		"sandbox died: a new one": {Spec{Pod: planned(always)}, in(saw("a=255"), died),
			[]Action{StopSandbox{"s0"}, SetUpVolumes{}, RunSandbox{1}, startN("a", 1)}},
		"sandbox died and was stopped: a new one, no back-off": {Spec{Pod: planned(always)}, in(knowing(saw("a=255"), "a", backedOff), dead),
			[]Action{SetUpVolumes{}, RunSandbox{1}, startN("a", 1)}},
		"sandbox died under a running container": {Spec{Pod: planned(always)}, in(saw("a"), died),
			[]Action{killSaying("a", changedBox), StopSandbox{"s0"}, SetUpVolumes{}, RunSandbox{1}, startN("a", 1)}},
		"sandbox without address: a new one": {Spec{Pod: planned(always)}, in(saw(), noIP),
			[]Action{StopSandbox{"s0"}, SetUpVolumes{}, RunSandbox{1}, start("a")}},
		"sandbox on the host's network, as asked": {Spec{Pod: planned(always, func(p *corev1.Pod) {
			p.Spec.HostNetwork, p.Spec.Containers = true, []corev1.Container{ctr("a")}
		})}, in(saw("a"), onNet), nil},
		"sandbox on another network than asked": {Spec{Pod: planned(always)}, in(saw(), onNet),
			[]Action{StopSandbox{"s0"}, SetUpVolumes{}, RunSandbox{1}, start("a")}},
		"an old run that is alive: ended": {Spec{Pod: planned(always)}, saw("a#1", "a"), []Action{kill("a")}},
		"alive in an old sandbox: ended, then started in the new": {Spec{Pod: planned(always)}, in(saw("a"), box1, dead),
			[]Action{kill("a"), SetUpVolumes{}, startN("a", 1)}},
		"two sandboxes are ready: both go": {Spec{Pod: planned(always)}, in(saw(), box1, box),
			[]Action{StopSandbox{"s1"}, StopSandbox{"s0"}, SetUpVolumes{}, RunSandbox{2}, start("a")}},
		"sandbox died, init containers: from the first": {Spec{Pod: planned(always, ia)}, in(saw("a=255", "i=0", "j=0"), dead),
			[]Action{SetUpVolumes{}, RunSandbox{1}, startN("i", 1)}},
		"old sandbox without containers: removed":  {Spec{Pod: planned(always)}, in(saw("a@s1"), box1, dead), []Action{RemoveSandbox{"s0"}}},
		"old sandbox with a previous run: is kept": {Spec{Pod: planned(always)}, in(saw("a#1@s1", "a=255"), box1, dead), nil},

		// Init containers and sidecars
		"first init container runs: wait":            {Spec{Pod: planned(always, ia)}, saw("i"), nil},
		"first init container done: the next":        {Spec{Pod: planned(always, ia)}, saw("i=0"), []Action{SetUpVolumes{}, start("j")}},
		"all init containers done: main":             {Spec{Pod: planned(always, ia)}, saw("i=0", "j=0"), []Action{SetUpVolumes{}, start("a")}},
		"init container failed: again":               {Spec{Pod: planned(always, ia)}, saw("i=1"), []Action{SetUpVolumes{}, startN("i", 1)}},
		"init container failed, never: over":         {Spec{Pod: planned(never, ia)}, saw("i=1"), []Action{StopSandbox{"s0"}}},
		"init container lost after a later one ran":  {Spec{Pod: planned(always, ia)}, saw("j=0"), []Action{SetUpVolumes{}, start("a")}},
		"init containers lost while main runs":       {Spec{Pod: planned(always, ia)}, saw("a"), nil},
		"init failed, never, sidecar runs: all ends": {Spec{Pod: planned(never, isa)}, saw("i=0", "s", "j=1"), []Action{kill("s"), StopSandbox{"s0"}}},
		"sidecar runs, not started: wait":            {Spec{Pod: planned(always, isa)}, saw("i=0", "s~"), nil},
		"sidecar has started: the next":              {Spec{Pod: planned(always, isa)}, saw("i=0", "s"), []Action{SetUpVolumes{}, start("j")}},
		"sidecar crashed during init: again":         {Spec{Pod: planned(always, isa)}, saw("i=0", "s=1", "j"), []Action{SetUpVolumes{}, startN("s", 1)}},
		"sidecar crashed beside main: again":         {Spec{Pod: planned(always, isa)}, saw("i=0", "s=1", "j=0", "a"), []Action{SetUpVolumes{}, startN("s", 1)}},
		"sidecar exited with 0 in a job: again":      {Spec{Pod: planned(never, sa)}, saw("s=0", "a"), []Action{SetUpVolumes{}, startN("s", 1)}},
		"sidecar in back-off does not hold up main": {Spec{Pod: planned(always, sa)}, exited(knowing(saw("s=1", "a=0"), "s", backedOff), 5*time.Second),
			[]Action{SetUpVolumes{}, startN("a", 1), Wait{t0.Add(15 * time.Second)}}},
		"sidecar is unhealthy: restarted": {Spec{Pod: planned(never, sa)}, saw("s!", "a"),
			[]Action{killSaying("s", "Container s failed liveness probe, will be restarted")}},

		// Probes and changes
		"unhealthy, always: killed for a restart": {Spec{Pod: planned(always)}, saw("a!"),
			[]Action{killSaying("a", "Container a failed liveness probe, will be restarted")}},
		"unhealthy, never: killed": {Spec{Pod: planned(never)}, saw("a!"), []Action{killSaying("a", "Container a failed liveness probe")}},
		"unhealthy with a grace period of its own": {Spec{Pod: planned(always)}, func() Observed {
			o := saw("a!")
			o.Containers[0].Probe.Grace = new(int64(5))
			return o
		}(), []Action{StopContainer{Name: "a", ID: "a-0", Grace: 5 * time.Second, Message: "Container a failed liveness probe, will be restarted"}}},
		"another image: that container alone is restarted": {Spec{Pod: planned(always, ab)}, func() Observed {
			o := saw("a", "b")
			o.Containers[0].Hash = "other"
			return o
		}(), []Action{SetUpVolumes{}, killSaying("a", "Container a definition changed, will be restarted"), startN("a", 1)}},
		"created with another image: not started": {Spec{Pod: planned(always)}, func() Observed {
			o := saw("a.")
			o.Containers[0].Hash = "other"
			return o
		}(), []Action{SetUpVolumes{}, startN("a", 1)}},
		"other resources: changed in place": {Spec{Pod: planned(always)}, knowing(saw("a"), "a", Memory{Applied: cpu("1")}),
			[]Action{ResizeContainer{"a", "a-0"}}},
		"other resources, refused a moment ago: wait": {Spec{Pod: planned(always)},
			knowing(saw("a"), "a", Memory{Applied: cpu("1"), ResizeRetry: t0.Add(time.Second)}), []Action{Wait{t0.Add(time.Second)}}},
		"other resources that need a restart": {Spec{Pod: planned(always, with(nil, corev1.Container{Name: "a", Image: "i",
			ResizePolicy: []corev1.ContainerResizePolicy{{ResourceName: "cpu", RestartPolicy: corev1.RestartContainer}}}))},
			knowing(saw("a"), "a", Memory{Applied: cpu("1")}),
			[]Action{SetUpVolumes{}, killSaying("a", "Container a resize requires restart, will be restarted"), startN("a", 1)}},
		"the third last run and its log go": {Spec{Pod: planned(always)}, saw("a#2", "a=1#1", "a=1"), []Action{RemoveContainer{Name: "a", ID: "a-0"}}},

		// Ephemeral containers
		"ephemeral, new: started":           {Spec{Pod: planned(always, debugged)}, saw("a"), []Action{SetUpVolumes{}, start("d")}},
		"ephemeral, during init: started":   {Spec{Pod: planned(always, ia, debugging)}, saw("i"), []Action{SetUpVolumes{}, start("d")}},
		"ephemeral, ended: never again":     {Spec{Pod: planned(always, debugged)}, saw("a", "d=1"), nil},
		"ephemeral, begun and lost":         {Spec{Pod: planned(always, debugged)}, knowing(saw("a"), "d", Memory{Begun: true}), nil},
		"ephemeral, created: started":       {Spec{Pod: planned(always, debugged)}, saw("a", "d."), []Action{SetUpVolumes{}, StartContainer{Name: "d", ID: "d-0"}}},
		"ephemeral does not keep a pod":     {Spec{Pod: planned(never, debugged)}, saw("a=0", "d"), []Action{kill("d"), StopSandbox{"s0"}}},
		"ephemeral is not in a new sandbox": {Spec{Pod: planned(always, debugged)}, in(saw("a=255", "d=255"), dead), []Action{SetUpVolumes{}, RunSandbox{1}, startN("a", 1)}},

		// The end
		"deleted: containers, sandbox, volumes": {stop(planned(always), 0), saw("a"),
			[]Action{kill("a"), StopSandbox{"s0"}, RemoveSandbox{"s0"}, TearDown{All: true}}},
		"deleted before it began":    {stop(planned(always), 0), Observed{}, []Action{TearDown{All: true}}},
		"deleted when all has ended": {stop(planned(always), 0), in(saw("a=0"), dead), []Action{RemoveSandbox{"s0"}, TearDown{All: true}}},
		"deleted a while ago: less time": {stop(planned(always), 20*time.Second), saw("a"),
			[]Action{StopContainer{Name: "a", ID: "a-0", Grace: 10 * time.Second}, StopSandbox{"s0"}, RemoveSandbox{"s0"}, TearDown{All: true}}},
		"deleted long ago: no time": {stop(planned(always), time.Hour), saw("a"),
			[]Action{StopContainer{Name: "a", ID: "a-0"}, StopSandbox{"s0"}, RemoveSandbox{"s0"}, TearDown{All: true}}},
		"deleted in the future, the clock was set back: the grace period": {stop(planned(always), -time.Hour), saw("a"),
			[]Action{kill("a"), StopSandbox{"s0"}, RemoveSandbox{"s0"}, TearDown{All: true}}},
		"deleted with sidecars: they end in reverse order": {stop(planned(always, ssa), 0), saw("a", "b", "s", "u"),
			[]Action{kill("a"), kill("b"), kill("u", "a", "b"), kill("s", "a", "b", "u"), StopSandbox{"s0"}, RemoveSandbox{"s0"}, TearDown{All: true}}},
		"deleted in a crash loop: nothing is started": {stop(planned(always), 0), saw("a=1"),
			[]Action{StopSandbox{"s0"}, RemoveSandbox{"s0"}, TearDown{All: true}}},
		"deleted, container without sandbox: removed": {stop(planned(always), 0), in(saw("a=1")),
			[]Action{RemoveContainer{Name: "a", ID: "a-0"}, TearDown{All: true}}},
		"deleted with two sandboxes": {stop(planned(always), 0), in(saw("a@s1"), box1, dead),
			[]Action{kill("a"), StopSandbox{"s1"}, RemoveSandbox{"s1"}, RemoveSandbox{"s0"}, TearDown{All: true}}},
		"ended: what runs stops, nothing is removed": {over(planned(never, sa)), saw("a=0", "s"),
			[]Action{kill("s"), StopSandbox{"s0"}, TearDown{}}},
		"ended and torn down: settled": {over(planned(never)), Observed{Sandboxes: []Sandbox{dead}, Containers: runs("a=0"), TornDown: true}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := Plan(tt.spec, tt.obs, t0); !reflect.DeepEqual(got, tt.want) && len(got)+len(tt.want) > 0 {
				t.Errorf("Plan = %+v\n      want %+v", got, tt.want)
			}
		})
	}
	if len(tests) < 90 {
		t.Errorf("%d cases", len(tests))
	}
}

func once(name string) corev1.Container {
	return corev1.Container{Name: name, Image: "i", RestartPolicy: new(corev1.ContainerRestartPolicyNever)}
}

func ruled(name string, code int32) corev1.Container {
	c := once(name)
	c.RestartPolicyRules = []corev1.ContainerRestartRule{{
		Action:    corev1.ContainerRestartRuleActionRestart,
		ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: corev1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{code}},
	}}
	return c
}

func cpu(limit string) *corev1.ResourceRequirements {
	return &corev1.ResourceRequirements{Limits: corev1.ResourceList{"cpu": resource.MustParse(limit)}}
}

func debugging(p *corev1.Pod) {
	p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "d", Image: "i"}}}
}

func debugged(p *corev1.Pod) {
	p.Spec.Containers = []corev1.Container{ctr("a")}
	debugging(p)
}

// FuzzPlan checks what must hold of every plan, however odd what was observed.
func FuzzPlan(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 7))
		spec, obs := randomWorld(r)
		before := fmt.Sprintf("%+v", obs)
		actions := Plan(spec, obs, t0)
		if again := Plan(spec, obs, t0); !reflect.DeepEqual(actions, again) || fmt.Sprintf("%+v", obs) != before {
			t.Fatalf("Plan is not pure: %+v, then %+v", actions, again)
		}
		checkPlan(t, spec, obs, actions)
	})
}

func randomWorld(r *rand.Rand) (Spec, Observed) {
	policies := []corev1.RestartPolicy{corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure, corev1.RestartPolicyNever}
	all := []corev1.Container{ctr("i"), sidecar("s"), ctr("j")}
	pod := planned(policies[r.IntN(3)], with(all[:r.IntN(4)], []corev1.Container{ctr("a"), ctr("b"), once("c")}[:1+r.IntN(3)]...))
	obs := Observed{Memory: map[string]Memory{}, Volumes: r.IntN(2) == 0}
	for _, s := range []Sandbox{box1, box} {
		if s.Ready = r.IntN(2) == 0; r.IntN(3) > 0 {
			obs.Sandboxes = append(obs.Sandboxes, s)
		}
	}
	for _, name := range []string{"i", "s", "j", "a", "b", "c"} {
		for attempt := r.IntN(3); attempt > 0; attempt-- {
			kind := []string{"", "=0", "=1", "?", ".", "~", "!"}[r.IntN(7)]
			obs.Containers = append(obs.Containers, runs(fmt.Sprintf("%s%s#%d@s%d", name, kind, attempt-1, r.IntN(2)))...)
		}
		obs.Memory[name] = Memory{Begun: r.IntN(2) == 0, Next: uint32(r.IntN(5)), Failure: Failure{Retry: t0.Add(time.Duration(r.IntN(3)-1) * time.Second)}}
	}
	spec := Spec{Pod: pod}
	if r.IntN(4) == 0 {
		spec.Stop = &Stop{Since: t0.Add(-time.Duration(r.IntN(60)) * time.Second), Grace: grace, Remove: r.IntN(2) == 0}
	}
	return spec, obs
}

func checkPlan(t *testing.T, spec Spec, obs Observed, actions []Action) {
	boxes := 0
	for _, s := range obs.Sandboxes {
		if s.Ready {
			boxes++
		}
	}
	stopping := map[string]bool{}
	started := map[string]bool{}
	volumes := obs.Volumes
	for _, a := range actions {
		switch a := a.(type) {
		case SetUpVolumes:
			volumes = true
		case StopSandbox:
			for _, s := range obs.Sandboxes {
				if s.ID == a.ID && s.Ready {
					boxes--
				}
			}
		case RunSandbox:
			if boxes++; boxes > 1 {
				t.Errorf("two sandboxes at once: %+v", actions)
			}
			for _, s := range obs.Sandboxes {
				if s.Attempt >= a.Attempt {
					t.Errorf("attempt %d of a sandbox after %d", a.Attempt, s.Attempt)
				}
			}
		case StopContainer:
			stopping[a.ID] = true
			if a.Grace < 0 || a.Grace > grace {
				t.Errorf("grace = %v", a.Grace)
			}
		case StartContainer:
			if spec.Stop != nil || boxes != 1 || !volumes || started[a.Name] {
				t.Errorf("%+v must not be started: %+v", a, actions)
			}
			started[a.Name] = true
			c := specOf(spec.Pod, a.Name)
			for _, run := range obs.Containers {
				if run.Name != a.Name {
					continue
				}
				if mayRun(run.State) && !stopping[run.ID] {
					t.Errorf("%s is started while it runs: %+v", a.Name, actions)
				}
				if run.State != cri.ContainerState_CONTAINER_CREATED && run.Hash == criconfig.Hash(c) && atMostOnce(spec.Pod, c) && run.ID == latestOf(obs, a.Name) {
					t.Errorf("%s must run once and is started again: %+v", a.Name, actions)
				}
				if a.ID == "" && a.Attempt <= run.Attempt {
					t.Errorf("attempt %d of %s after %d", a.Attempt, a.Name, run.Attempt)
				}
			}
			if latestOf(obs, a.Name) == "" && obs.Memory[a.Name].Begun && atMostOnce(spec.Pod, c) {
				t.Errorf("%s has begun, must run once and is started again", a.Name)
			}
		}
	}
}

func latestOf(obs Observed, name string) string {
	for _, c := range obs.Containers {
		if c.Name == name {
			return c.ID
		}
	}
	return ""
}

func BenchmarkPlan(b *testing.B) {
	spec, obs := Spec{Pod: planned(corev1.RestartPolicyAlways)}, saw("a")
	b.ReportAllocs()
	for b.Loop() {
		Plan(spec, obs, t0)
	}
}
