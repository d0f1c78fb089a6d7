package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Limits of one call. A body over the limit is refused with a sentence, and the
// sender of large sets splits them (see [Split]).
const (
	MaxBody = 16 << 20 // bytes; a Secret or ConfigMap has at most 1 MiB
	maxText = 4 << 10  // bytes of an error text
)

// Paths of the contract within a session. All else is the kubelet API.
const (
	pathInventory = "/skerry/v1/inventory"
	pathChanges   = "/skerry/v1/changes"
	pathReport    = "/skerry/v1/report"
)

// HandleEdge adds e's calls to mux.
func HandleEdge(mux *http.ServeMux, e Edge) {
	mux.HandleFunc("GET "+pathInventory, func(w http.ResponseWriter, r *http.Request) {
		held, err := e.Inventory(r.Context())
		reply(w, held, err)
	})
	mux.HandleFunc("POST "+pathChanges, func(w http.ResponseWriter, r *http.Request) {
		var changes Changes
		if err := decode(w, r, &changes); err != nil {
			reply(w, nil, err)
			return
		}
		reply(w, struct{}{}, e.Apply(r.Context(), changes))
	})
}

// HandleCloud adds c's calls to mux.
func HandleCloud(mux *http.ServeMux, c Cloud) {
	mux.HandleFunc("POST "+pathReport, func(w http.ResponseWriter, r *http.Request) {
		var report Report
		if err := decode(w, r, &report); err != nil {
			reply(w, nil, err)
			return
		}
		ack, err := c.Report(r.Context(), report)
		reply(w, ack, err)
	})
}

func decode(w http.ResponseWriter, r *http.Request, value any) error {
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, MaxBody)).Decode(value)
	if err != nil {
		return fmt.Errorf("%w: body: %w", ErrInvalid, err)
	}
	return nil
}

func reply(w http.ResponseWriter, value any, err error) {
	if err != nil {
		http.Error(w, err.Error(), status(err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(value) // an error means that the peer is gone
}

// status maps err to HTTP. It is the only place that does, and [remoteError] its inverse.
func status(err error) int {
	switch {
	case errors.Is(err, ErrInvalid):
		return http.StatusBadRequest
	case errors.Is(err, ErrAbsent):
		return http.StatusNotFound
	case errors.Is(err, ErrUnknown):
		return http.StatusTooEarly
	}
	return http.StatusInternalServerError
}

func remoteError(op string, code int, text string) error {
	kind := map[int]error{
		http.StatusBadRequest: ErrInvalid,
		http.StatusNotFound:   ErrAbsent,
		http.StatusTooEarly:   ErrUnknown,
	}[code]
	if kind == nil {
		return fmt.Errorf("%s: peer answered %d: %s", op, code, text)
	}
	return fmt.Errorf("%s: %w: %s", op, kind, text)
}

// NewEdgeClient returns the edge at the far end of rt, normally a *tunnel.Session.
func NewEdgeClient(rt http.RoundTripper) Edge { return &client{http.Client{Transport: rt}} }

// NewCloudClient returns the provider at the far end of rt, normally a *tunnel.Session.
func NewCloudClient(rt http.RoundTripper) Cloud { return &client{http.Client{Transport: rt}} }

type client struct{ http http.Client }

func (c *client) Inventory(ctx context.Context) (held []Held, err error) {
	err = c.call(ctx, http.MethodGet, pathInventory, nil, &held)
	return held, err
}

func (c *client) Apply(ctx context.Context, changes Changes) error {
	return c.call(ctx, http.MethodPost, pathChanges, changes, &struct{}{})
}

func (c *client) Report(ctx context.Context, report Report) (ack Ack, err error) {
	err = c.call(ctx, http.MethodPost, pathReport, report, &ack)
	return ack, err
}

func (c *client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://peer"+path, body)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, maxText))
		return remoteError(path, resp.StatusCode, strings.TrimSpace(string(text)))
	}
	// One byte more than allowed, so that too much is an error and not an end.
	limited := &io.LimitedReader{R: resp.Body, N: MaxBody + 1}
	err = json.NewDecoder(limited).Decode(out)
	io.Copy(io.Discard, limited) // to the end, so that the stream can be used again
	if limited.N <= 0 {
		return fmt.Errorf("%s: answer of more than %d bytes", path, MaxBody)
	}
	if err != nil {
		return fmt.Errorf("%s: answer: %w", path, err)
	}
	return nil
}

// Split cuts changes into steps of at most limit bytes of data each, an object
// of more than limit in a step of its own. Order is kept, so that what an object
// needs can be put before it.
func Split(changes Changes, limit int) []Changes {
	var steps []Changes
	var step Changes
	size := 0
	for _, o := range changes.Upserts {
		if n := len(o.Data) + len(o.Name) + 256; size+n > limit && size > 0 {
			steps, step, size = append(steps, step), Changes{}, n
		} else {
			size += n
		}
		step.Upserts = append(step.Upserts, o)
	}
	step.Removals, step.Complete = changes.Removals, changes.Complete
	if !step.Empty() {
		steps = append(steps, step)
	}
	return steps
}
