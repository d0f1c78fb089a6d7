// Package arch holds the rules of the source tree as tests: who may import whom,
// what each binary links, that every package says what it provides.
package arch

import (
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/skerry-io/skerry"
	root   = "../.."
)

var update = flag.Bool("update", false, "rewrite the deps.txt files")

// forbidden names, for each folder, what it must never link in, and why.
var forbidden = []struct{ from, not, why string }{
	{"api/edge", module + "/", "the contract is a leaf"},
	{"tunnel", "k8s.io/", "the tunnel knows no Kubernetes"},
	{"tunnel", module + "/api", "the tunnel knows no pods"},
	{"tunnel", module + "/edgelet", "the tunnel is below the edgelet"},
	{"tunnel", module + "/provider", "the tunnel is below the provider"},
	{"edgelet", module + "/provider", "edge and cloud meet in api/edge only"},
	{"provider", module + "/edgelet", "edge and cloud meet in api/edge only"},
	{"cmd/edgelet", "k8s.io/client-go", "the edgelet is small"},
	{"cmd/edgelet", "k8s.io/kubernetes", "the edgelet is no kubelet"},
	{"cmd/edgelet", "github.com/virtual-kubelet", "the edgelet is small"},
	{"cmd/edgelet", "html/template", "it defeats the linker's pruning; build with -tags grpcnotrace"},
	{"cmd/provider", "go.etcd.io", "the provider keeps nothing"},
	{"cmd/provider", "k8s.io/cri-api", "the provider runs no containers"},
	{"cmd/provider", "k8s.io/kubernetes", "only its published modules are for import"},
}

// parts of the edgelet never import each other; they meet in package edgelet.
var parts = []string{"cri", "image", "logs", "pod", "podenv", "probe", "server", "stats", "store", "volume"}

func deps(t *testing.T, pkg string) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-tags", "grpcnotrace", "./"+pkg)
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list -deps ./%s: %v", pkg, err)
	}
	return strings.Fields(string(out))
}

func TestImportDirection(t *testing.T) {
	for _, rule := range forbidden {
		for _, dep := range deps(t, rule.from) {
			if strings.HasPrefix(dep, rule.not) && dep != module+"/"+rule.from {
				t.Errorf("%s links %s: %s", rule.from, dep, rule.why)
			}
		}
	}
	for _, part := range parts {
		for _, dep := range deps(t, "edgelet/"+part) {
			other, ok := strings.CutPrefix(dep, module+"/edgelet/")
			if ok && strings.Split(other, "/")[0] != part {
				t.Errorf("edgelet/%s imports edgelet/%s; parts meet through interfaces in package edgelet", part, other)
			}
		}
	}
}

// TestLinkedPackages compares what each binary links with the list in its folder,
// so that a new dependency is seen in review. -update rewrites the lists.
func TestLinkedPackages(t *testing.T) {
	for _, binary := range []string{"cmd/edgelet", "cmd/provider"} {
		var list []string
		for _, dep := range deps(t, binary) {
			if strings.Contains(strings.Split(dep, "/")[0], ".") && !strings.HasPrefix(dep, module) {
				list = append(list, dep)
			}
		}
		slices.Sort(list)
		file := filepath.Join(root, binary, "deps.txt")
		got := strings.Join(list, "\n") + "\n"
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s links other packages than deps.txt says; if that is meant: go test ./test/arch -update", binary)
		}
	}
}

// source calls visit for each Go file of ours.
func source(t *testing.T, visit func(path string, file *ast.File, fset *token.FileSet)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err == nil {
			visit(path, file, fset)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryPackageSaysWhatItProvides(t *testing.T) {
	documented := map[string]bool{}
	source(t, func(path string, file *ast.File, _ *token.FileSet) {
		dir := filepath.Dir(path)
		if _, seen := documented[dir]; !seen && !strings.HasSuffix(path, "_test.go") {
			documented[dir] = false
		}
		if file.Doc != nil && (strings.HasPrefix(file.Doc.Text(), "Package ") || strings.HasPrefix(file.Doc.Text(), "Command ")) {
			documented[dir] = true
		}
	})
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s: no package doc", dir)
		}
	}
}

// insecure is the one place that may skip verification of a certificate: a probe
// of a pod's own server, as the kubelet's contract has it.
const insecure = "edgelet/probe"

func TestNothingIsUnsafe(t *testing.T) {
	source(t, func(path string, file *ast.File, fset *token.FileSet) {
		if strings.HasSuffix(path, "_test.go") {
			return
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				if n.Name == "InsecureSkipVerify" && !strings.Contains(path, insecure) {
					t.Errorf("%s: InsecureSkipVerify", fset.Position(n.Pos()))
				}
			case *ast.BasicLit:
				if n.Kind == token.STRING && (n.Value == `"sh"` || n.Value == `"bash"` || n.Value == `"/bin/sh"`) && !strings.Contains(path, "test/") {
					t.Errorf("%s: a shell", fset.Position(n.Pos()))
				}
			}
			return true
		})
	})
}

func TestSizes(t *testing.T) {
	source(t, func(path string, file *ast.File, fset *token.FileSet) {
		if lines := fset.Position(file.End()).Line; lines > 600 && !strings.HasSuffix(path, "_test.go") {
			t.Errorf("%s: %d lines; at most 600", path, lines)
		}
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || strings.HasSuffix(path, "_test.go") {
				continue
			}
			if lines := fset.Position(f.End()).Line - fset.Position(f.Pos()).Line + 1; lines > 100 {
				t.Errorf("%s: %s has %d lines; at most 100", path, f.Name.Name, lines)
			}
		}
	})
}
