// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"bufio"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

var update = flag.Bool("update", false, "rewrite the files under testdata, and the states in ARCHITECTURE.md")

// TestGolden runs the scripts testdata/*.txt. A line "> event [key=value...]"
// is an event, with "xN" at its end repeated N times; "#" starts a comment. All
// other lines are what the machine answers: actions indented, then "= status".
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got, err := play(string(want))
			if err != nil {
				t.Fatal(err)
			}
			compare(t, file, got, string(want))
		})
	}
}

func compare(t *testing.T, file, got, want string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != want {
		t.Errorf("%s differs; run the tests of this package with -update and look at what changed. Got:\n%s", file, got)
	}
}

func play(script string) (string, error) {
	cfg := DefaultConfig()
	m, err := New(cfg)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	lines := bufio.NewScanner(strings.NewReader(script))
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "> "):
			ev, times, err := parseEvent(strings.TrimPrefix(line, "> "))
			if err != nil {
				return "", fmt.Errorf("line %d: %w", n, err)
			}
			fmt.Fprintln(&out, line)
			for range times {
				for _, a := range m.Step(ev) {
					fmt.Fprintln(&out, "  "+a.String())
				}
				if err := m.check(); err != nil {
					return "", fmt.Errorf("line %d: %w", n, err)
				}
			}
			fmt.Fprintln(&out, "= "+m.Status().String())
		case line == "", strings.HasPrefix(line, "#"):
			fmt.Fprintln(&out, line)
		}
	}
	return out.String(), lines.Err()
}

func parseEvent(text string) (ev Event, times int, err error) {
	times = 1
	words := strings.Fields(text)
	kind, err := lookup(eventNames[:], words[0])
	if err != nil {
		return ev, 0, err
	}
	ev.Kind = EventKind(kind)
	for _, word := range words[1:] {
		if n, ok := strings.CutPrefix(word, "x"); ok {
			if times, err = strconv.Atoi(n); err != nil {
				return ev, 0, err
			}
			continue
		}
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "epoch":
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				return ev, 0, err
			}
			ev.Epoch = plugin.Epoch(n)
		case "peer":
			ev.Peer = value
		case "role":
			ev.Role = plugin.Role(value)
		case "alone":
			ev.Alone = true
		case "ended":
			ev.Ended = true
		case "behind":
			ev.Behind = true
		case "winner":
			ev.Winner = value
		case "reason":
			r, err := lookup(reasonNames[:], value)
			if err != nil {
				return ev, 0, err
			}
			ev.Reason = Reason(r)
		default:
			return ev, 0, fmt.Errorf("unknown key %q", key)
		}
	}
	return ev, times, nil
}

func lookup(names []string, word string) (int, error) {
	for i, n := range names {
		if n == word {
			return i, nil
		}
	}
	return 0, fmt.Errorf("unknown word %q", word)
}

const (
	architecture = "../../ARCHITECTURE.md"
	statesBegin  = "<!-- states: go test ./plugin/pair -run TestStateDiagram -update -->\n"
	statesEnd    = "<!-- end of the states -->\n"
)

// TestStateDiagram keeps the states, transitions and reasons in ARCHITECTURE.md
// equal to those of the code.
func TestStateDiagram(t *testing.T) {
	var b strings.Builder
	b.WriteString("```mermaid\nstateDiagram-v2\n")
	for _, role := range []plugin.Role{plugin.RolePrimary, plugin.RoleBackup} {
		fmt.Fprintf(&b, "    state \"on the %s's host\" as %s {\n", role, role)
		for s := range numStates {
			fmt.Fprintf(&b, "        state \"%s\" as %s\n", s, id(role, s))
		}
		fmt.Fprintf(&b, "        [*] --> %s\n", id(role, Unprotected))
		for _, tr := range Transitions() {
			if strings.ContainsAny(tr.When, ":;") {
				t.Errorf("%q ends at a character that Mermaid takes as its own", tr.When)
			}
			if tr.Role == role {
				fmt.Fprintf(&b, "        %s --> %s: %s\n", id(role, tr.From), id(role, tr.To), tr.When)
			}
		}
		b.WriteString("    }\n")
	}
	fmt.Fprintf(&b, "    %s --> %s: it is the primary from then on\n```\n", id(plugin.RoleBackup, Live), id(plugin.RolePrimary, Live))
	meanings := constants(t, "state.go")
	table := func(what string, n int, value func(int) fmt.Stringer) {
		fmt.Fprintf(&b, "\n| %s | meaning |\n| --- | --- |\n", what)
		for i := range n {
			meaning := meanings[what][i]
			if meaning == "" {
				t.Errorf("%s %s has no comment", what, value(i))
			}
			fmt.Fprintf(&b, "| `%s` | %s |\n", value(i), meaning)
		}
	}
	table("state", int(numStates), func(i int) fmt.Stringer { return State(i) })
	table("reason", int(numReasons), func(i int) fmt.Stringer { return Reason(i) })

	text, err := os.ReadFile(architecture)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, begins := strings.Cut(string(text), statesBegin)
	_, tail, ends := strings.Cut(rest, statesEnd)
	if !begins || !ends {
		t.Fatalf("%s has no place for the states, between\n%s%s", architecture, statesBegin, statesEnd)
	}
	compare(t, architecture, head+statesBegin+b.String()+statesEnd+tail, string(text))
}

// constants gives what the comments of a file say of its constants, by type, in
// their order. A comment is "Name: meaning."
func constants(t *testing.T, file string) map[string][]string {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	meanings := make(map[string][]string)
	for _, d := range parsed.Decls {
		block, ok := d.(*ast.GenDecl)
		if !ok || block.Tok != token.CONST {
			continue
		}
		var of string
		for _, spec := range block.Specs {
			c := spec.(*ast.ValueSpec)
			if c.Type != nil {
				of = strings.ToLower(c.Type.(*ast.Ident).Name)
			}
			_, meaning, _ := strings.Cut(strings.Join(strings.Fields(c.Doc.Text()), " "), ": ")
			meanings[of] = append(meanings[of], meaning)
		}
	}
	return meanings
}

func id(role plugin.Role, s State) string {
	return string(role) + "_" + strings.ReplaceAll(s.String(), "-", "_")
}

// TestNames: every value has a name of its own, since they go into logs,
// scripts and the API.
func TestNames(t *testing.T) {
	for what, names := range map[string][]string{
		"state": stateNames[:], "reason": reasonNames[:], "event": eventNames[:], "action": actionNames[:], "notify": notifyNames[:],
	} {
		seen := make(map[string]bool)
		for i, n := range names {
			if n == "" || seen[n] {
				t.Errorf("%s %d is called %q", what, i, n)
			}
			seen[n] = true
		}
	}
	if got := State(200).String(); got != "pair.State(200)" {
		t.Errorf("an unknown state is called %q", got)
	}
}

// TestNotifies: whatever a machine tells has a meaning to the other.
func TestNotifies(t *testing.T) {
	for n := NotifyNone + 1; n < numNotifies; n++ {
		if _, ok := n.Event(); !ok {
			t.Errorf("no event for %s", n)
		}
	}
	for _, n := range []Notify{NotifyNone, numNotifies, 255} {
		if kind, ok := n.Event(); ok {
			t.Errorf("%s is taken for %s", n, kind)
		}
	}
}

func TestConfig(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*Config){
		"no grace":           func(c *Config) { c.Grace = 0 },
		"negative answer":    func(c *Config) { c.Answer = -1 },
		"no stall":           func(c *Config) { c.Stall = 0 },
		"retry relation":     func(c *Config) { c.RetryMax = c.RetryMin - 1 },
		"stopping too short": func(c *Config) { c.Stopping = c.Grace - 1 },
	} {
		cfg := DefaultConfig()
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s is accepted", what)
		}
	}
}
