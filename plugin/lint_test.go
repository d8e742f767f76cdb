// SPDX-License-Identifier: Apache-2.0

package plugin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the package map in ARCHITECTURE.md")

const (
	module = "ftvirt.org/ftvirt"
	spdx   = "// SPDX-License-Identifier: Apache-2.0\n"
)

// rule says what the packages that match may import. The first rule whose
// pattern matches a package holds for it; a pattern that ends in /... takes in
// all below.
type rule struct {
	packages []string
	// ours are the only packages of this module that they may import; nil is
	// no limit but the one of reserved.
	ours []string
	// pure packages do no I/O and have no goroutines to wait for: they may not
	// import what impure names.
	pure bool
}

// impure is what a pure package has no use for.
var impure = []string{"context", "log", "log/slog", "net", "net/http", "os", "os/exec", "os/signal", "sync", "syscall"}

// rules is the design: arrows point to what is simpler, and only commands and
// the lab put parts together.
var rules = []rule{
	{packages: []string{"plugin"}, ours: []string{}, pure: true},
	{packages: []string{"plugin/rrlog", "plugin/pair", "hooks"}, ours: []string{"plugin"}, pure: true},
	{packages: []string{"arbiter/paxos", "plugin/checkpoint"}, ours: []string{}, pure: true},
	{packages: []string{"plugin/detect", "plugin/control", "plugin/metrics", "plugin/virt"}, ours: []string{"plugin"}},
	{packages: []string{"arbiter/scsi"}, ours: []string{}},
	{packages: []string{"arbiter"}, ours: []string{"arbiter/paxos", "arbiter/scsi", "plugin"}},
	{packages: []string{"arbiter/backend"}, ours: []string{"arbiter", "plugin/config"}},
	{packages: []string{"arbiter/arbitertest"}, ours: []string{"arbiter", "plugin"}},
	{packages: []string{"plugin/clidoc", "plugin/config", "plugin/lab/guest"}, ours: []string{}},
	{packages: []string{"plugin/web"}, ours: []string{}},
	{packages: []string{"plugin/doctor"}, ours: []string{"plugin/config"}},
	{packages: []string{"plugin/channel"}, ours: []string{"plugin", "plugin/rrlog"}},
	{packages: []string{"plugin/doctest"}, ours: []string{"plugin/lab/guest", "plugin/lab/scenario"}},
	{packages: []string{"migrate"}, ours: []string{"hooks", "migrate/resync", "plugin", "plugin/channel"}},
	{packages: []string{"migrate/resync"}},
	// The hook must start without the agent's parts, and without cgo.
	{packages: []string{"hooks/cmd/..."}, ours: []string{"arbiter", "arbiter/backend", "hooks", "plugin", "plugin/config"}},
	{packages: []string{"..."}},
}

// reserved lists who alone may import a package; tests may always, but for
// libvirt's binding, whose seam is tested by hosts that run.
var reserved = []struct {
	imported string
	by       []string
	tests    bool
}{
	{"C", nil, false},
	{"libvirt.org/go/libvirt", []string{"plugin/virt"}, false},
	{module + "/plugin/virt", []string{"plugin/agent"}, true},
	{module + "/plugin/agent", []string{"plugin/agent/...", "plugin/cli", "plugin/cmd/..."}, true},
	{module + "/plugin/cli", []string{"plugin/cmd/..."}, true},
	{module + "/plugin/clidoc", []string{"plugin/cmd/..."}, true},
	{module + "/plugin/lab", []string{"plugin/lab/...", "plugin/cli", "plugin/cmd/..."}, true},
	{module + "/plugin/lab/labtest", nil, true},
	{module + "/arbiter/arbitertest", nil, true},
	{"testing", []string{"plugin/lab/labtest", "arbiter/arbitertest"}, true},
}

// listed is what go list tells of a package.
type listed struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// name is the package's path in the repository; the root's is ".".
func (p listed) name() string {
	if p.ImportPath == module {
		return "."
	}
	return strings.TrimPrefix(p.ImportPath, module+"/")
}

// ours gives the packages of this module among imports.
func ours(imports []string) []string {
	var list []string
	for _, i := range imports {
		if rest, ok := strings.CutPrefix(i, module+"/"); ok {
			list = append(list, rest)
		} else if i == module {
			list = append(list, ".")
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func matches(pattern, name string) bool {
	if pattern == "..." {
		return true
	}
	if dir, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == dir || strings.HasPrefix(name, dir+"/")
	}
	return pattern == name
}

func anyMatches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, name) })
}

func ruleFor(name string) rule {
	for _, r := range rules {
		if anyMatches(r.packages, name) {
			return r
		}
	}
	return rule{}
}

// problems tells what is wrong with the imports of p.
func (p listed) problems() []string {
	var bad []string
	r, name := ruleFor(p.name()), p.name()
	if r.ours != nil {
		for _, i := range ours(p.Imports) {
			if !slices.Contains(r.ours, i) {
				bad = append(bad, fmt.Sprintf("%s imports %s; it may import of ours: %s", name, i, strings.Join(r.ours, ", ")))
			}
		}
	}
	if r.pure {
		for _, i := range p.Imports {
			if slices.Contains(impure, i) {
				bad = append(bad, fmt.Sprintf("%s imports %s, but is to be pure", name, i))
			}
		}
	}
	for _, res := range reserved {
		tests := slices.Contains(p.TestImports, res.imported) || slices.Contains(p.XTestImports, res.imported)
		if slices.Contains(p.Imports, res.imported) && !anyMatches(res.by, name) || tests && !res.tests && !anyMatches(res.by, name) {
			bad = append(bad, fmt.Sprintf("%s imports %s, which is for %q alone", name, res.imported, res.by))
		}
	}
	return bad
}

func TestImports(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		for _, problem := range p.problems() {
			t.Error(problem)
		}
	}
}

// A rule that names nothing, or that nothing can break, checks nothing.
func TestRulesBite(t *testing.T) {
	t.Parallel()
	packages := list(t)
	exists := func(pattern string) bool {
		return slices.ContainsFunc(packages, func(p listed) bool { return matches(pattern, p.name()) })
	}
	for _, r := range rules {
		for _, p := range append(r.packages, r.ours...) {
			if !exists(p) {
				t.Errorf("a rule names %s, which no package matches", p)
			}
		}
	}
	for _, r := range reserved {
		for _, p := range r.by {
			if !exists(p) {
				t.Errorf("%s is reserved for %s, which no package matches", r.imported, p)
			}
		}
	}
	for _, p := range []listed{
		{ImportPath: module + "/plugin", Imports: []string{module + "/plugin/config"}},
		{ImportPath: module + "/plugin/pair", Imports: []string{"net"}},
		{ImportPath: module + "/plugin/pair", Imports: []string{module + "/arbiter"}},
		{ImportPath: module + "/hooks", Imports: []string{"os"}},
		{ImportPath: module + "/hooks/cmd/ftvirt-hook", Imports: []string{module + "/plugin/agent"}},
		{ImportPath: module + "/migrate", Imports: []string{"libvirt.org/go/libvirt"}},
		{ImportPath: module + "/migrate", XTestImports: []string{"libvirt.org/go/libvirt"}},
		{ImportPath: module + "/plugin/lab", Imports: []string{module + "/plugin/agent"}},
		{ImportPath: module + "/plugin/agent", Imports: []string{module + "/arbiter/arbitertest"}},
		{ImportPath: module + "/plugin/newcomer", Imports: []string{module + "/plugin/cli"}},
		{ImportPath: module + "/plugin/newcomer", Imports: []string{"C"}},
	} {
		if len(p.problems()) == 0 {
			t.Errorf("%+v passes", p)
		}
	}
	if p := (listed{ImportPath: module + "/plugin/newcomer", XTestImports: []string{module + "/plugin/cli"}}).problems(); len(p) > 0 {
		t.Errorf("a test may not import a command: %v", p)
	}
}

const (
	mapBegin = "<!-- package map: go test ./plugin -run TestPackageMap -update -->\n"
	mapEnd   = "<!-- end of the package map -->\n"
)

// TestPackageMap holds the map in ARCHITECTURE.md against what is there.
func TestPackageMap(t *testing.T) {
	t.Parallel()
	file := filepath.Join(root(t), "ARCHITECTURE.md")
	text := read(t, file)
	head, rest, ok := strings.Cut(text, mapBegin)
	old, tail, ok2 := strings.Cut(rest, mapEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the package map, between\n%s%s", file, mapBegin, mapEnd)
	}
	var b strings.Builder
	b.WriteString("| package | imports |\n| --- | --- |\n")
	for _, p := range list(t) {
		fmt.Fprintf(&b, "| `%s` | %s |\n", p.name(), strings.Join(ours(p.Imports), ", "))
	}
	if old == b.String() {
		return
	}
	if *update {
		if err := os.WriteFile(file, []byte(head+mapBegin+b.String()+mapEnd+tail), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("the package map in ARCHITECTURE.md is out of date: see that the new imports are meant, then run "+
		"'go test -tags libvirt_dlopen ./plugin -run TestPackageMap -update'. It should be:\n%s", b.String())
}

func TestSources(t *testing.T) {
	t.Parallel()
	n := 0
	for _, file := range files(t, ".go") {
		n++
		src := read(t, filepath.Join(root(t), file))
		for _, problem := range sourceProblems(file, src) {
			t.Error(problem)
		}
	}
	if n < 50 {
		t.Fatalf("only %d Go files were found; is %s the repository?", n, root(t))
	}
}

func sourceProblems(file, src string) []string {
	var bad []string
	if !strings.HasPrefix(src, spdx) {
		bad = append(bad, fmt.Sprintf("%s: the first line is not %q", file, strings.TrimSpace(spdx)))
	}
	set := token.NewFileSet()
	parsed, err := parser.ParseFile(set, file, src, parser.SkipObjectResolution)
	if err != nil {
		return append(bad, fmt.Sprintf("%s: %v", file, err))
	}
	clock := "" // what the file calls package time
	for _, i := range parsed.Imports {
		if path, err := strconv.Unquote(i.Path.Value); err != nil || path != "time" {
			continue
		}
		clock = "time"
		if i.Name != nil {
			clock = i.Name.Name
		}
		if clock == "." {
			bad = append(bad, fmt.Sprintf("%s: it imports time without its name", file))
		}
	}
	ast.Inspect(parsed, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "Sleep" {
			if x, ok := s.X.(*ast.Ident); ok && clock != "" && x.Name == clock {
				bad = append(bad, fmt.Sprintf("%s: %s.Sleep; wait for the event itself, or poll with a deadline", set.Position(s.Pos()), clock))
			}
		}
		return true
	})
	return bad
}

func TestSourceRulesBite(t *testing.T) {
	t.Parallel()
	const head = spdx + "\npackage p\n\n"
	for _, src := range []string{
		"package p\n",
		"// SPDX-License-Identifier: MIT\n\npackage p\n",
		head + "import \"time\"\n\nfunc f() { time.Sleep(1) }\n",
		head + "import \"time\"\n\nvar f = time.Sleep\n",
		head + "import clock \"time\"\n\nfunc f() { clock.Sleep(1) }\n",
		head + "import . \"time\"\n\nfunc f() { Sleep(1) }\n",
		head + "func {\n",
	} {
		if len(sourceProblems("p.go", src)) == 0 {
			t.Errorf("passes:\n%s", src)
		}
	}
	fine := head + "import \"time\"\n\n// time.Sleep in words is no harm.\nvar t = time.Now()\n"
	if bad := sourceProblems("p.go", fine); len(bad) > 0 {
		t.Error(bad)
	}
}

var (
	link = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	// heading and testName find what documents refer to by name.
	heading  = regexp.MustCompile(`(?m)^#+ +(.+)$`)
	testName = regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z][A-Za-z0-9]*\b`)
	fence    = regexp.MustCompile("(?ms)^```.*?^```$")
	// notInAnchor is what forges leave out of a heading's anchor.
	notInAnchor = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

func anchors(text string) []string {
	var list []string
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		a := notInAnchor.ReplaceAllString(strings.ToLower(m[1]), "")
		list = append(list, strings.ReplaceAll(a, " ", "-"))
	}
	return list
}

// TestDocuments checks that links in Markdown files lead somewhere, and that
// the tests they name exist.
func TestDocuments(t *testing.T) {
	t.Parallel()
	documents := files(t, ".md")
	for _, must := range []string{"README.md", "ARCHITECTURE.md"} {
		if !slices.Contains(documents, must) {
			t.Errorf("there is no %s", must)
		}
	}
	var code strings.Builder
	for _, file := range files(t, "_test.go") {
		code.WriteString(read(t, filepath.Join(root(t), file)))
	}
	for _, file := range documents {
		text := read(t, filepath.Join(root(t), file))
		for _, problem := range linkProblems(root(t), file, text) {
			t.Error(problem)
		}
		for _, name := range testName.FindAllString(text, -1) {
			if !strings.Contains(code.String(), "func "+name+"(") {
				t.Errorf("%s names %s, and there is no such test", file, name)
			}
		}
	}
}

func linkProblems(root, file, text string) []string {
	var bad []string
	for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		target := m[1]
		if strings.HasPrefix(target, "https://") || strings.HasPrefix(target, "mailto:") {
			continue
		}
		path, anchor, _ := strings.Cut(target, "#")
		to := file
		if path != "" {
			to = filepath.Join(filepath.Dir(file), path)
		}
		if strings.HasPrefix(to, "..") || filepath.IsAbs(path) {
			bad = append(bad, fmt.Sprintf("%s: the link %s leaves the repository", file, target))
			continue
		}
		info, err := os.Stat(filepath.Join(root, to))
		if err != nil {
			bad = append(bad, fmt.Sprintf("%s: the link %s leads nowhere", file, target))
			continue
		}
		if anchor == "" {
			continue
		}
		if info.IsDir() {
			bad = append(bad, fmt.Sprintf("%s: the link %s is to a place in a directory", file, target))
			continue
		}
		there, err := os.ReadFile(filepath.Join(root, to))
		if err != nil || !slices.Contains(anchors(string(there)), anchor) {
			bad = append(bad, fmt.Sprintf("%s: the link %s leads to a heading that is not there", file, target))
		}
	}
	return bad
}

func TestDocumentRulesBite(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const other = "# One of `them`: it\n\n```\n# comment\n```\n"
	if err := os.WriteFile(filepath.Join(dir, "o.md"), []byte(other), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"[x](gone.md)", "[x](../o.md)", "[x](/o.md)", "[x](o.md#comment)", "[x](o.md#two)", "[x](.#y)"} {
		if len(linkProblems(dir, "d.md", text)) == 0 {
			t.Errorf("%s passes", text)
		}
	}
	fine := "[x](o.md) [y](o.md#one-of-them-it) [z](https://example.org/x) \n```\n[q](gone.md)\n```\n"
	if bad := linkProblems(dir, "d.md", fine); len(bad) > 0 {
		t.Error(bad)
	}
}

// root is the repository; tests run in their package's directory.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// files gives those of the repository whose name ends so, by their path in it.
// What builds leave behind is not looked at.
func files(t *testing.T, suffix string) []string {
	t.Helper()
	top := root(t)
	var found []string
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(top, path)
		if err != nil {
			return err
		}
		if e.IsDir() && slices.Contains([]string{".git", "bin", "build"}, name) {
			return filepath.SkipDir
		}
		if !e.IsDir() && strings.HasSuffix(name, suffix) {
			found = append(found, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// list asks the go command for all packages of the repository.
func list(t *testing.T) []listed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "list", "-tags", "libvirt_dlopen", "-e",
		"-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = root(t)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var packages []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		if strings.HasPrefix(p.name(), "build/") {
			continue // left there by somebody's experiment
		}
		if !strings.HasPrefix(p.ImportPath, module) {
			t.Fatalf("go list gives %q", p.ImportPath)
		}
		packages = append(packages, p)
	}
	if len(packages) < 15 {
		t.Fatalf("go list gives %d packages only", len(packages))
	}
	return packages
}
