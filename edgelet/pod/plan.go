package pod

import (
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

// A Spec is what is asked of a pod.
type Spec struct {
	Pod  *corev1.Pod // never written to
	Stop *Stop       // not nil: the pod is to end
}

// A Stop is the end of a pod.
type Stop struct {
	Since  time.Time
	Grace  time.Duration // from Since on
	Remove bool          // nothing may be left, else dead containers stay for their logs
}

// Observed is a pod as the runtime reports it, and what is remembered of it.
type Observed struct {
	Sandboxes  []Sandbox   // in the order of their attempts, the latest first
	Containers []Container // of one name: the latest first
	Memory     map[string]Memory
	Volumes    bool // volumes are set up and need no refreshing
	TornDown   bool // volumes are gone
}

// A Sandbox is one sandbox of a pod.
type Sandbox struct {
	ID      string
	Attempt uint32
	Ready   bool
	Stopped bool // by us: StopPodSandbox has been answered
	Network cri.NamespaceMode
	IPs     []string
	Created time.Time
}

// A Container is one run of a container.
type Container struct {
	ID, SandboxID, Name string
	Attempt             uint32
	State               cri.ContainerState
	Hash                string
	Created             time.Time
	Started, Finished   time.Time // zero: not yet
	ExitCode            int32
	Reason, Message     string
	Image, ImageID      string
	User                *corev1.ContainerUser
	Limits              *cri.LinuxContainerResources // nil: the runtime does not say

	Probe ProbeResult // of a running container
}

// A Memory is what is remembered of a container between runs.
type Memory struct {
	Failure Failure       // the last attempt to start it, if that failed
	Backoff time.Duration // how long to wait after its next exit
	Backed  time.Time     // when Backoff was set
	Key     string        // what Backoff is for: another image starts afresh
	Begun   bool          // StartContainer may have been called for it, ever
	Next    uint32        // lowest number that its next run may have
	Exited  *int32        // exit code of the last run, if it was seen to end

	Allocated   *corev1.ResourceRequirements // what it may use; nil: what its spec says
	Applied     *corev1.ResourceRequirements // what its last run was given; nil: unknown
	ResizeRetry time.Time                    // when to try again to change that
}

// A Failure is why a container could not be started.
type Failure struct {
	Reason, Message string // as shown in the container's status
	Retry           time.Time
	Attempt         uint32 // the run that did not come about
	Count           int    // in a row
}

// An Action is one step towards what a pod is asked to be. The set is closed.
type Action interface{ action() }

// The actions.
type (
	// SetUpVolumes makes the pod's volumes present.
	SetUpVolumes struct{}
	// RunSandbox creates the sandbox of the given attempt.
	RunSandbox struct{ Attempt uint32 }
	// StartContainer pulls, creates and starts a container in the latest
	// sandbox; one that has been created already, named by ID, is only started.
	StartContainer struct {
		Name    string
		Attempt uint32
		ID      string
	}
	// StopContainer ends a running container. Actions of this type that follow
	// each other run at the same time, but each sends its signal only when the
	// containers named in After have ended.
	StopContainer struct {
		Name, ID string
		Grace    time.Duration
		Message  string   // of the event
		After    []string // names
	}
	// ResizeContainer changes the limits of a running container.
	ResizeContainer struct{ Name, ID string }
	// RemoveContainer removes a dead container and its log.
	RemoveContainer struct {
		Name, ID string
		Attempt  uint32
	}
	// StopSandbox ends all that is left running in a sandbox, and its network.
	StopSandbox struct{ ID string }
	// RemoveSandbox removes a stopped sandbox and its containers.
	RemoveSandbox struct{ ID string }
	// TearDown unmounts the volumes; with All, it removes the pod's files and logs too.
	TearDown struct{ All bool }
	// Wait says when to plan again if nothing happens before.
	Wait struct{ Until time.Time }
)

func (SetUpVolumes) action()    {}
func (RunSandbox) action()      {}
func (StartContainer) action()  {}
func (StopContainer) action()   {}
func (ResizeContainer) action() {}
func (RemoveContainer) action() {}
func (StopSandbox) action()     {}
func (RemoveSandbox) action()   {}
func (TearDown) action()        {}
func (Wait) action()            {}

// Plan returns the actions that bring a pod from what was observed to what spec
// asks for, in the order in which they must run; none, or Waits alone, when
// nothing is to be done now. Plan is pure: it reads no clock but now and never
// blocks. The worker calls it again after every change.
//
// A container that must run at most once (see [atMostOnce]) is never started
// again once StartContainer may have been called for it.
func Plan(spec Spec, obs Observed, now time.Time) []Action {
	p := planner{pod: spec.Pod, obs: obs, now: now}
	if spec.Stop != nil {
		return p.stop(spec.Stop)
	}
	return p.run()
}

type planner struct {
	pod  *corev1.Pod
	obs  Observed
	now  time.Time
	todo []Action
	wait time.Time // earliest time at which something is due; zero: nothing is
}

func (p *planner) add(a ...Action) { p.todo = append(p.todo, a...) }

func (p *planner) later(t time.Time) {
	if p.wait.IsZero() || t.Before(p.wait) {
		p.wait = t
	}
}

func (p *planner) done() []Action {
	if !p.wait.IsZero() {
		p.add(Wait{p.wait})
	}
	return p.todo
}

// run plans for a pod that is to run.
func (p *planner) run() []Action {
	problem := sandboxProblem(p.pod, p.obs)
	starts, keep := p.containers(problem == "")
	if problem != "" {
		p.killAll("Pod sandbox changed, it will be killed and re-created.", p.podGrace())
		p.stopSandboxes()
		if len(starts) == 0 {
			return p.done() // all has ended, or must not begin again
		}
		p.add(SetUpVolumes{}, RunSandbox{p.nextAttempt()})
		p.add(starts...)
		return p.done()
	}
	if !keep && len(starts) == 0 && p.wait.IsZero() {
		p.killAll("", p.podGrace())
		p.stopSandboxes()
		return p.done()
	}
	p.strays()
	if !p.obs.Volumes || slices.ContainsFunc(starts, isStart) {
		p.add(SetUpVolumes{})
	}
	p.add(starts...)
	p.collect()
	return p.done()
}

// strays ends what runs although another run of it counts, or in another sandbox.
func (p *planner) strays() {
	for i := range p.obs.Containers {
		c := &p.obs.Containers[i]
		if mayRun(c.State) && (p.latest(c.Name) != c || !p.inLatest(c)) {
			p.add(StopContainer{Name: c.Name, ID: c.ID, Grace: p.podGrace()})
		}
	}
}

func isStart(a Action) bool { _, ok := a.(StartContainer); return ok }

// containers plans the pod's containers, in its latest sandbox if that is good,
// else in one to come. Keep reports that some of them run on.
func (p *planner) containers(sandbox bool) (starts []Action, keep bool) {
	before := p.todo
	p.todo = nil
	defer func() { p.todo = before }()

	if p.over(sandbox) {
		return nil, false
	}
	if sandbox {
		for i := range p.pod.Spec.EphemeralContainers {
			p.ephemeral((*corev1.Container)(&p.pod.Spec.EphemeralContainers[i].EphemeralContainerCommon))
		}
	}
	ready, failed, busy := p.init(sandbox)
	if failed {
		p.wait = time.Time{}
		return nil, false
	}
	if !ready {
		return p.todo, busy
	}
	sidecars := p.todo
	p.todo = nil
	for i := range p.pod.Spec.Containers {
		keep = p.main(&p.pod.Spec.Containers[i], sandbox) || keep
	}
	return append(sidecars, p.todo...), keep
}

// over reports whether all main containers have ended for good. Sidecars alone
// do not keep a pod, and nothing is initialized again for nothing.
func (p *planner) over(sandbox bool) bool {
	for i := range p.pod.Spec.Containers {
		c := &p.pod.Spec.Containers[i]
		last := p.latest(c.Name)
		o := p.outcome(c, last, sandbox)
		if o != succeeded && o != failedOnce || restarts(p.pod, c, exitCode(last, p.obs.Memory[c.Name])) {
			return false
		}
	}
	return len(p.pod.Spec.Containers) > 0
}

// init plans the init containers. Ready means that main containers may start,
// failed that they never will, busy that there is something to wait for.
func (p *planner) init(sandbox bool) (ready, failed, busy bool) {
	// What comes before a container that has begun was done when it began.
	reached := -1
	for i := range p.pod.Spec.InitContainers {
		if last := p.latest(p.pod.Spec.InitContainers[i].Name); last != nil && sandbox && p.inLatest(last) {
			reached = i
		}
	}
	if p.initialized(sandbox) {
		reached = len(p.pod.Spec.InitContainers)
	}
	for i := range p.pod.Spec.InitContainers {
		c := &p.pod.Spec.InitContainers[i]
		if criconfig.IsSidecar(c) {
			if !p.sidecar(c, sandbox) && i >= reached {
				return false, false, true
			}
			continue
		}
		if i < reached {
			continue
		}
		last := p.latest(c.Name)
		switch outcome := p.outcome(c, last, sandbox); {
		case outcome == running:
			return false, false, true
		case outcome == succeeded:
			continue
		case outcome == failedOnce && !restarts(p.pod, c, exitCode(last, p.obs.Memory[c.Name])):
			return false, true, false
		}
		p.start(c, last, sandbox)
		return false, false, true
	}
	return true, false, true
}

// initialized reports whether the main containers have begun, which says that
// the init containers need not be looked at.
func (p *planner) initialized(sandbox bool) bool {
	for i := range p.pod.Spec.Containers {
		c := &p.pod.Spec.Containers[i]
		last := p.latest(c.Name)
		if last != nil && sandbox && last.SandboxID == p.obs.Sandboxes[0].ID {
			return true
		}
		// A pod that runs once does not do its init containers again for the
		// sake of a new sandbox.
		if p.pod.Spec.RestartPolicy == corev1.RestartPolicyNever && (last != nil || p.obs.Memory[c.Name].Begun) {
			return true
		}
	}
	return false
}

// sidecar plans a sidecar and reports whether it has started.
func (p *planner) sidecar(c *corev1.Container, sandbox bool) bool {
	last := p.latest(c.Name)
	if p.outcome(c, last, sandbox) != running {
		p.start(c, last, sandbox)
		return false
	}
	p.keepRunning(c, *last)
	return last.Probe.Started
}

// main plans a main container and reports whether it runs on.
func (p *planner) main(c *corev1.Container, sandbox bool) bool {
	last := p.latest(c.Name)
	switch p.outcome(c, last, sandbox) {
	case running:
		return p.keepRunning(c, *last)
	case succeeded, failedOnce:
		if !restarts(p.pod, c, exitCode(last, p.obs.Memory[c.Name])) {
			return false
		}
	}
	p.start(c, last, sandbox)
	return false
}

func (p *planner) ephemeral(c *corev1.Container) {
	last := p.latest(c.Name)
	switch {
	case last == nil && !p.obs.Memory[c.Name].Begun:
	case last != nil && last.State == cri.ContainerState_CONTAINER_CREATED && p.inLatest(last):
	default:
		return // never restarted
	}
	p.start(c, last, true)
}

// An outcome is what has become of a container so far.
type outcome int

const (
	absent outcome = iota // it is to be started, in the sandbox at hand
	running
	succeeded
	failedOnce // or was lost
)

// outcome judges the last run of c. Containers of an earlier sandbox count only
// where they must not run twice.
func (p *planner) outcome(c *corev1.Container, last *Container, sandbox bool) outcome {
	switch {
	case last == nil:
		if !p.obs.Memory[c.Name].Begun {
			return absent
		}
		if code := p.obs.Memory[c.Name].Exited; code != nil && *code == 0 {
			return p.past(c, succeeded)
		}
		return p.past(c, failedOnce) // it has run, and nothing is left to tell how it went
	case last.State == cri.ContainerState_CONTAINER_CREATED:
		return absent
	case last.State == cri.ContainerState_CONTAINER_RUNNING:
		if sandbox && p.inLatest(last) {
			return running
		}
		return p.past(c, failedOnce) // it is about to be killed with its sandbox
	case last.State == cri.ContainerState_CONTAINER_EXITED && last.ExitCode == 0 && last.Reason != reasonOOMKilled:
		if sandbox && p.inLatest(last) {
			return succeeded
		}
		return p.past(c, succeeded)
	}
	if sandbox && p.inLatest(last) {
		return failedOnce
	}
	return p.past(c, failedOnce)
}

// past is the outcome of a run that belongs to no sandbox of today: it counts
// only for what must not run twice and for what is done once it has succeeded.
func (p *planner) past(c *corev1.Container, o outcome) outcome {
	isInit := slices.ContainsFunc(p.pod.Spec.InitContainers, func(i corev1.Container) bool { return i.Name == c.Name })
	if atMostOnce(p.pod, c) || (!isInit && o == succeeded) {
		return o
	}
	return absent
}

// start plans the start of c, unless it must wait. Last is its latest run or nil.
func (p *planner) start(c *corev1.Container, last *Container, sandbox bool) {
	memory := p.obs.Memory[c.Name]
	if memory.Failure.Retry.After(p.now) {
		p.later(memory.Failure.Retry)
		return
	}
	a := StartContainer{Name: c.Name, Attempt: p.attempt(c.Name)}
	switch {
	case last == nil:
	case last.State == cri.ContainerState_CONTAINER_CREATED && sandbox && p.inLatest(last) && last.Hash == criconfig.Hash(c):
		a.ID, a.Attempt = last.ID, last.Attempt
	case last.State == cri.ContainerState_CONTAINER_UNKNOWN && sandbox && p.inLatest(last):
		p.add(StopContainer{Name: c.Name, ID: last.ID, Grace: p.podGrace(),
			Message: fmt.Sprintf("Container %s is in an unknown state, try killing it before restart", c.Name)})
	case last.State == cri.ContainerState_CONTAINER_EXITED && sandbox && p.inLatest(last):
		until := last.Finished.Add(crashBackoff(memory, c, last.Finished))
		if until.After(p.now) && !last.Finished.After(p.now) { // else the clock was set back
			p.later(until)
			return
		}
	}
	p.add(a)
}

// keepRunning plans for a running container and reports whether it is kept.
func (p *planner) keepRunning(c *corev1.Container, run Container) bool {
	message, grace := "", p.podGrace()
	again := restartsAtAll(p.pod, c)
	switch {
	case run.Hash != "" && run.Hash != criconfig.Hash(c):
		message, again = fmt.Sprintf("Container %s definition changed", c.Name), true
	case run.Probe.Unhealthy != "":
		message = fmt.Sprintf("Container %s failed %s probe", c.Name, run.Probe.Unhealthy)
		if g := run.Probe.Grace; g != nil {
			grace = time.Duration(*g) * time.Second
		}
	default:
		m := p.obs.Memory[c.Name]
		switch {
		case m.Applied == nil || sameResources(&c.Resources, m.Applied):
			return true
		case m.ResizeRetry.After(p.now):
			p.later(m.ResizeRetry)
			return true
		case !needsRestart(c, m.Applied):
			p.add(ResizeContainer{Name: c.Name, ID: run.ID})
			return true
		}
		message, again = fmt.Sprintf("Container %s resize requires restart", c.Name), true
	}
	if again {
		message += ", will be restarted"
	}
	p.add(StopContainer{Name: c.Name, ID: run.ID, Grace: grace, Message: message})
	if run.Probe.Unhealthy == "" || run.Hash != "" && run.Hash != criconfig.Hash(c) {
		// It was asked for, so neither policy nor back-off are.
		p.add(StartContainer{Name: c.Name, Attempt: p.attempt(c.Name)})
	}
	return true
}

// collect removes what nothing can be learned from any more: all but the last
// two runs of each container, and sandboxes without containers but the latest.
func (p *planner) collect() {
	runs, used := map[string]int{}, map[string]bool{}
	for _, c := range p.obs.Containers {
		runs[c.Name]++
		if runs[c.Name] > 2 && c.State == cri.ContainerState_CONTAINER_EXITED {
			p.add(RemoveContainer{Name: c.Name, ID: c.ID, Attempt: c.Attempt})
			continue
		}
		used[c.SandboxID] = true
	}
	for i, s := range p.obs.Sandboxes {
		if i > 0 && !s.Ready && !used[s.ID] {
			p.add(RemoveSandbox{s.ID})
		}
	}
}

// stop plans the end of a pod.
func (p *planner) stop(s *Stop) []Action {
	// A clock that was set back must not make the grace period longer.
	p.killAll("", min(max(s.Since.Add(s.Grace).Sub(p.now), 0), s.Grace))
	p.stopSandboxes()
	if s.Remove {
		known := map[string]bool{}
		for _, sandbox := range p.obs.Sandboxes {
			known[sandbox.ID] = true
			p.add(RemoveSandbox{sandbox.ID})
		}
		for _, c := range p.obs.Containers {
			if !known[c.SandboxID] {
				p.add(RemoveContainer{Name: c.Name, ID: c.ID, Attempt: c.Attempt})
			}
		}
	}
	if s.Remove || !p.obs.TornDown {
		p.add(TearDown{All: s.Remove})
	}
	return p.done()
}

// killAll plans the end of all that runs: main containers at once, sidecars
// after them in the reverse of the order in which they were started.
func (p *planner) killAll(message string, grace time.Duration) {
	var alive []string // main containers and later sidecars
	rank := map[string]int{}
	for i := range p.pod.Spec.InitContainers {
		if c := &p.pod.Spec.InitContainers[i]; criconfig.IsSidecar(c) {
			rank[c.Name] = i + 1
		}
	}
	var sidecars []Container
	for _, c := range p.obs.Containers {
		switch {
		case !mayRun(c.State):
		case rank[c.Name] > 0:
			sidecars = append(sidecars, c)
		default:
			p.add(StopContainer{Name: c.Name, ID: c.ID, Grace: grace, Message: message})
			alive = append(alive, c.Name)
		}
	}
	slices.SortStableFunc(sidecars, func(a, b Container) int { return rank[b.Name] - rank[a.Name] })
	for _, c := range sidecars {
		p.add(StopContainer{Name: c.Name, ID: c.ID, Grace: grace, Message: message, After: slices.Clone(alive)})
		alive = append(alive, c.Name)
	}
}

// mayRun reports whether a container in this state may have a process.
func mayRun(s cri.ContainerState) bool {
	return s == cri.ContainerState_CONTAINER_RUNNING || s == cri.ContainerState_CONTAINER_UNKNOWN
}

func (p *planner) stopSandboxes() {
	for _, s := range p.obs.Sandboxes {
		// One that died by itself may still hold its network.
		if s.Ready || !s.Stopped {
			p.add(StopSandbox{s.ID})
		}
	}
}

func (p *planner) latest(name string) *Container {
	for i := range p.obs.Containers {
		if p.obs.Containers[i].Name == name {
			return &p.obs.Containers[i]
		}
	}
	return nil
}

func (p *planner) inLatest(c *Container) bool {
	return len(p.obs.Sandboxes) > 0 && c.SandboxID == p.obs.Sandboxes[0].ID
}

// attempt is the number of c's next run.
func (p *planner) attempt(name string) uint32 {
	next := p.obs.Memory[name].Next
	for _, c := range p.obs.Containers {
		if c.Name == name {
			next = max(next, c.Attempt+1)
		}
	}
	return next
}

func (p *planner) nextAttempt() uint32 {
	if len(p.obs.Sandboxes) == 0 {
		return 0
	}
	return p.obs.Sandboxes[0].Attempt + 1
}

func (p *planner) podGrace() time.Duration { return podGrace(p.pod) }
