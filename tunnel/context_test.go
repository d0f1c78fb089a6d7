package tunnel_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/skerry-io/skerry/tunnel/tunneltest"
)

// TestContextOutlivesTheRequestBefore: net/http interrupts its waiting for the
// next request with a deadline, and takes any error but a timeout for the end of
// the connection, which cancels every later request on it.
func TestContextOutlivesTheRequestBefore(t *testing.T) {
	cloud, edge := tunneltest.Pair(t)
	go cloud.Serve(t.Context(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body any
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		if r.Context().Err() != nil {
			t.Errorf("request is cancelled: %v", context.Cause(r.Context()))
		}
		io.WriteString(w, "done")
	}))
	client := http.Client{Transport: edge}
	for range 5 {
		resp, err := client.Post("http://peer/", "application/json", strings.NewReader(`"text"`))
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}
