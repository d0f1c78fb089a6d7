package server

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// containerLogs copies the log of a container to the client.
func (s *server) containerLogs(w http.ResponseWriter, r *http.Request) error {
	req, previous, err := parseLogQuery(r.URL.Query(), time.Now())
	if err != nil {
		return err
	}
	pod, err := s.find(r)
	if err != nil {
		return err
	}
	name := r.PathValue("container")
	if _, ok := declared(pod, name); !ok {
		return failf(http.StatusNotFound, "container %q not found in pod %q", name, pod.Name)
	}
	restarts, id, err := logOf(pod, name, previous)
	if err != nil {
		return err
	}
	req.Path = fmt.Sprintf("%s_%s_%s/%s/%d.log", pod.Namespace, pod.Name, pod.UID, name, restarts)
	if !previous {
		req.Ended = s.ended(pod, name, id)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	out := &logWriter{ResponseController: http.NewResponseController(w), w: w}
	err = s.Logs.Copy(r.Context(), out, req)
	switch {
	case err == nil || r.Context().Err() != nil:
		return nil
	case out.begun:
		// The status has been sent; all that is left is to say so at the end.
		fmt.Fprintf(w, "\nlogs end early: %v\n", err)
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return failf(http.StatusBadRequest, "the log of container %q in pod %q is not there (any more)", name, pod.Name)
	}
	return failf(http.StatusBadRequest, "%v", err)
}

// A logWriter sends what is written at once when it is flushed.
type logWriter struct {
	*http.ResponseController
	w     http.ResponseWriter
	begun bool
}

func (l *logWriter) Write(p []byte) (int, error) {
	l.begun = true
	return l.w.Write(p)
}

// FlushError sends all that has been written, and the header if that is nothing.
func (l *logWriter) FlushError() error {
	l.begun = true
	return l.Flush()
}

// ended returns a function that tells whether a container has ended or is gone.
// It looks no more often than four times a second.
func (s *server) ended(pod *corev1.Pod, name, id string) func() bool {
	var looked time.Time
	var ended bool
	return func() bool {
		if now := time.Now(); !ended && now.Sub(looked) >= time.Second/4 {
			looked = now
			current, ok := s.Pods.Pod(pod.Namespace, pod.Name)
			ended = true
			if ok && current.UID == pod.UID {
				c := containerStatus(current, name)
				ended = c == nil || c.State.Running == nil || c.ContainerID != id
			}
		}
		return ended
	}
}

// logOf returns which run of a container the log is wanted of: its number of
// restarts and its ID, or why there is none, in a kubelet's words.
//
// A status counts restarts up to its latest run. That is the run of its state, or
// of its last state while the state is waiting for the next.
func logOf(pod *corev1.Pod, name string, previous bool) (restarts int32, id string, err error) {
	none := func(format string, args ...any) (int32, string, error) {
		return 0, "", failf(http.StatusBadRequest, format, args...)
	}
	c := containerStatus(pod, name)
	if c == nil {
		return none("container %q in pod %q is not available", name, pod.Name)
	}
	last := c.LastTerminationState.Terminated
	own := c.State.Running != nil || c.State.Terminated != nil && c.State.Terminated.ContainerID != ""
	switch {
	case previous && (last == nil || last.ContainerID == ""):
		return none("previous terminated container %q in pod %q not found", name, pod.Name)
	case previous && own:
		return max(c.RestartCount-1, 0), last.ContainerID, nil
	case c.State.Running != nil:
		return c.RestartCount, c.ContainerID, nil
	case own:
		return c.RestartCount, c.State.Terminated.ContainerID, nil
	case last != nil && last.ContainerID != "":
		return c.RestartCount, last.ContainerID, nil
	case last != nil || c.State.Terminated != nil:
		return none("container %q in pod %q is terminated", name, pod.Name)
	case c.State.Waiting == nil:
		return none("container %q in pod %q is waiting to start - no logs yet", name, pod.Name)
	}
	reason := c.State.Waiting.Reason
	switch reason {
	case "ErrImagePull":
		reason = "image can't be pulled"
	case "ImagePullBackOff":
		reason = "trying and failing to pull image"
	}
	return none("container %q in pod %q is waiting to start: %s", name, pod.Name, reason)
}

// parseLogQuery reads the parameters of a request for logs, with the strictness
// and the statuses of a kubelet.
func parseLogQuery(q url.Values, now time.Time) (req LogRequest, previous bool, err error) {
	req = LogRequest{
		Follow:     boolean(q, "follow"),
		Timestamps: boolean(q, "timestamps"),
		Tail:       -1,
		Limit:      -1,
	}
	if tail := q.Get("tail"); tail != "" { // what tailLines was once called
		q.Del("tailLines")
		if tail != "all" {
			q.Set("tailLines", tail)
		}
	}
	var seconds int64 = -1
	for name, number := range map[string]*int64{"tailLines": &req.Tail, "limitBytes": &req.Limit, "sinceSeconds": &seconds} {
		if !q.Has(name) {
			continue
		}
		n, err := strconv.ParseInt(q.Get(name), 10, 64)
		if err != nil {
			return req, false, failf(http.StatusBadRequest, "unable to decode query: %s %q is not a number", name, q.Get(name))
		}
		if n < 0 || n == 0 && name != "tailLines" {
			return req, false, failf(http.StatusUnprocessableEntity, "invalid request: %s must be greater than 0", name)
		}
		*number = n
	}
	if since := q.Get("sinceTime"); since != "" {
		if req.Since, err = time.Parse(time.RFC3339, since); err != nil {
			return req, false, failf(http.StatusBadRequest, "unable to decode query: sinceTime %q is not a time", since)
		}
		if seconds >= 0 {
			return req, false, failf(http.StatusUnprocessableEntity, "invalid request: at most one of sinceTime or sinceSeconds may be specified")
		}
	}
	const century = 100 * 365 * 24 * 60 * 60
	if seconds >= 0 && seconds < century { // more than that is all there is
		req.Since = now.Add(-time.Duration(seconds) * time.Second)
	}
	switch stream := q.Get("stream"); stream {
	case "", "All":
	case "Stdout", "Stderr":
		req.Stream = strings.ToLower(stream)
		if req.Tail >= 0 {
			return req, false, failf(http.StatusUnprocessableEntity, "invalid request: tailLines and a specific stream are mutually exclusive for now")
		}
	default:
		return req, false, failf(http.StatusUnprocessableEntity, "invalid request: stream %q is none of All, Stdout, Stderr", stream)
	}
	return req, boolean(q, "previous"), nil
}

// boolean is true for a parameter that is there and neither "false" nor "0".
func boolean(q url.Values, name string) bool {
	return q.Has(name) && !strings.EqualFold(q.Get(name), "false") && q.Get(name) != "0"
}
