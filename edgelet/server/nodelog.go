package server

import (
	"cmp"
	"errors"
	"fmt"
	"html"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
)

// maxListing is how many names of a directory are shown.
const maxListing = 10_000

// nodeLogs serves the files beneath the node's log directory, and lists its
// directories. A symbolic link is followed only if it does not lead out of it.
func (s *server) nodeLogs(w http.ResponseWriter, r *http.Request) error {
	if r.URL.Query().Has("query") {
		return failf(http.StatusNotImplemented, "node log queries are not implemented by this edgelet")
	}
	name := cmp.Or(strings.Trim(r.PathValue("path"), "/"), ".")
	root, err := os.OpenRoot(s.LogDir)
	if err != nil {
		return noLog(name, err)
	}
	defer root.Close()
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not block
	if err != nil {
		return noLog(name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return noLog(name, err)
	case info.IsDir():
		return listDir(w, r, f)
	case !info.Mode().IsRegular():
		return failf(http.StatusForbidden, "log %q is not a regular file", name)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, info.Name(), info.ModTime(), f)
	return nil
}

// noLog explains why a file is not served.
func noLog(name string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return failf(http.StatusNotFound, "log %q not found", name)
	case errors.Is(err, fs.ErrPermission):
		return failf(http.StatusForbidden, "log %q: permission denied", name)
	}
	return failf(http.StatusBadRequest, "log %q cannot be served: %v", name, err)
}

// listDir shows a directory as HTML, as an HTTP file server does.
func listDir(w http.ResponseWriter, r *http.Request, dir *os.File) error {
	entries, err := dir.ReadDir(maxListing)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	base := "" // of the links, which are relative to the last slash of the path
	if !strings.HasSuffix(r.URL.Path, "/") {
		base = path.Base(r.URL.Path) + "/"
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	fmt.Fprintln(w, "<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>")
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() {
			name += "/"
		}
		link := (&url.URL{Path: base + name}).String()
		fmt.Fprintf(w, "<a href=\"%s\">%s</a>\n", html.EscapeString(link), html.EscapeString(name))
	}
	fmt.Fprintln(w, "</pre>")
	return nil
}
