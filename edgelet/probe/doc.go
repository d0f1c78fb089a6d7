// Package probe asks containers whether they have started, are ready and are
// alive, and runs their postStart and preStop hooks.
//
// # Probes
//
// [Manager.Sync] says which containers of a pod run; the [Manager] probes those
// that ask for it and [Manager.Result] is the latest verdict. A verdict belongs
// to a container ID, so that a restarted container starts afresh.
//
//	startup    not started until it succeeds; asks for a restart when it fails
//	readiness  not ready until it succeeds; runs once the container has started
//	liveness   alive until it fails, which asks for a restart; runs once started
//
// A startup probe that has given its verdict, and a liveness probe that has
// failed, are not asked again until there is a new container. A verdict changes
// after successThreshold or failureThreshold equal answers in a row. An answer
// that could not be had at all, as when the runtime is away, counts for nothing.
// A pod that terminates keeps its readiness probes alone.
//
// # Time
//
// One goroutine, [Manager.Run], sleeps until the next probe is due; a probe has
// a goroutine only while it waits for its answer, and no more than
// Config.Concurrency wait at once. Startup and readiness are asked as soon as
// initialDelaySeconds allow; liveness, which is in no hurry, and the probes of
// containers that ran before the edgelet did are spread over their period. A
// readiness probe that fails before it has ever succeeded is repeated after one,
// two, four… seconds up to its period, so that a container which takes a moment
// to listen is not kept waiting for a whole period.
package probe
