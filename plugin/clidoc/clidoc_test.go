// SPDX-License-Identifier: Apache-2.0

package clidoc_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	libcli "github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin/cli"
	"ftvirt.org/ftvirt/plugin/clidoc"
	"ftvirt.org/ftvirt/plugin/config"
)

// output runs a program that make deps installs.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "HOME="+t.TempDir(), "MANWIDTH=78")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func file(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// pages are all manual pages, as they are installed.
func pages(t *testing.T) map[string]string {
	t.Helper()
	domain, err := filepath.Abs("../../contrib/man/ftvirt-domain.7")
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		"ftvirt.8":        file(t, "ftvirt.8", clidoc.Man(cli.App())),
		"ftvirt.toml.5":   file(t, "ftvirt.toml.5", clidoc.ManConfig("ftvirt.toml", config.DefaultPath, config.Example)),
		"ftvirt-domain.7": domain,
	}
}

// shown is a page as people read it, without the breaks of lines.
func shown(t *testing.T, path string) string {
	t.Helper()
	text := regexp.MustCompile(`.\x08|\x1b\[[0-9;]*m`).ReplaceAllString(output(t, "man", "-P", "cat", "-l", path), "")
	return strings.Join(strings.Fields(text), " ")
}

// Both formatters that are in use take the pages without a word.
func TestPagesAreClean(t *testing.T) {
	t.Parallel()
	for name, path := range pages(t) {
		var bad []string
		cmd := exec.CommandContext(t.Context(), "mandoc", "-T", "lint", "-W", "warning", path)
		out, err := cmd.Output()
		if err != nil && len(out) == 0 {
			t.Fatalf("mandoc: %v", err)
		}
		for _, l := range strings.Split(string(out), "\n") {
			// A page of the same program is the same, whenever it was made.
			if l != "" && !strings.Contains(l, "missing date") {
				bad = append(bad, l)
			}
		}
		if len(bad) > 0 {
			t.Errorf("%s: mandoc says:\n%s", name, strings.Join(bad, "\n"))
		}
		if out := output(t, "sh", "-c", `man --warnings -E UTF-8 -l "$1" 2>&1 >/dev/null`, "sh", path); out != "" {
			t.Errorf("%s: man says:\n%s", name, out)
		}
	}
}

// walk calls f with each command that does something.
func walk(app *libcli.App, f func(path string, c *libcli.Command)) {
	var down func(prefix string, list []*libcli.Command)
	down = func(prefix string, list []*libcli.Command) {
		for _, c := range list {
			path := strings.TrimSpace(prefix + " " + c.Name)
			if c.Name == "help" || c.Hidden {
				continue
			}
			if len(c.Subcommands) == 0 {
				f(path, c)
			}
			down(path, c.Subcommands)
		}
	}
	down("", app.Commands)
}

func TestPageHasAllCommands(t *testing.T) {
	t.Parallel()
	text := shown(t, pages(t)["ftvirt.8"])
	n := 0
	walk(cli.App(), func(path string, c *libcli.Command) {
		n++
		at := strings.Index(text, strings.TrimSpace("ftvirt "+path+" "+strings.Join(strings.Fields(c.ArgsUsage), " ")))
		if at < 0 {
			t.Errorf("the page lacks ftvirt %s", path)
			return
		}
		for _, f := range c.Flags {
			for _, name := range f.Names() {
				if dashed := "--" + name; len(name) > 1 && !strings.Contains(text[at:], dashed) {
					t.Errorf("ftvirt %s: the page lacks %s", path, dashed)
				}
			}
		}
	})
	if n < 15 {
		t.Errorf("only %d commands were looked for", n)
	}
	for _, want := range []string{"EXIT STATUS 0 done", "4 the agent could not be reached", "ENVIRONMENT FTVIRT_CONFIG"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}

func TestPageHasAllKeys(t *testing.T) {
	t.Parallel()
	text := shown(t, pages(t)["ftvirt.toml.5"])
	for _, l := range strings.Split(config.Example, "\n") {
		l = strings.TrimPrefix(l, "# ")
		if !regexp.MustCompile(`^[a-z_]+ = |^\[`).MatchString(l) {
			continue
		}
		if !strings.Contains(text, strings.Join(strings.Fields(l), " ")) {
			t.Errorf("the page lacks %q", l)
		}
	}
	if !strings.Contains(text, "[peers.hostb] One table for each host") {
		t.Error("the comment above a table is not in its section")
	}
}

// The page about domains is written by hand: what it shows must be understood.
func TestDomainPage(t *testing.T) {
	t.Parallel()
	text := shown(t, pages(t)["ftvirt-domain.7"])
	for _, want := range []string{hooks.Namespace, string(hooks.ModeProtected), string(hooks.ModeSuspended), " mode ", " peer ", " role ", " epoch "} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	found := regexp.MustCompile(`<ft:pair [^>]*/>|<pair [^>]*/>`).FindAllString(text, -1)
	if len(found) != 3 {
		t.Fatalf("elements: %q", found)
	}
	for _, e := range found {
		e = strings.Replace(e, "<pair", `<pair xmlns="`+hooks.Namespace+`"`, 1)
		dom, err := hooks.Parse([]byte(`<domain type="qemu"><name>web</name><metadata>` + e + `</metadata></domain>`))
		if err != nil {
			t.Fatal(err)
		}
		if a, ok, err := hooks.ReadAnnotation(dom); err != nil || !ok || a.Peer != "hostb" {
			t.Errorf("%s: %+v, %v, %v", e, a, ok, err)
		}
	}
}

// completions are what each shell offers behind words.
var completions = map[string]func(*testing.T, ...string) []string{
	"bash": func(t *testing.T, words ...string) []string {
		script := "source " + file(t, "ftvirt.bash", clidoc.Bash(cli.App())) + "\nvirsh() { :; }\n" +
			"COMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1))\n_ftvirt\nprintf '%s\\n' \"${COMPREPLY[@]}\""
		return strings.Fields(output(t, "bash", append([]string{"-c", script, "bash", "ftvirt"}, words...)...))
	},
	"fish": func(t *testing.T, words ...string) []string {
		script := "source " + file(t, "ftvirt.fish", clidoc.Fish(cli.App())) + "; complete -C '" + strings.Join(append([]string{"ftvirt"}, words...), " ") + "'"
		var list []string
		for _, l := range strings.Split(output(t, "fish", "--no-config", "-c", script), "\n") {
			word, _, _ := strings.Cut(l, "\t")
			list = append(list, word)
		}
		return list
	},
	// zsh's own part needs a terminal; here it tells what it was asked for.
	"zsh": func(t *testing.T, words ...string) []string {
		script := "compdef() { :; }\n" +
			"_describe() { print -rl -- ${${(P)4}%%:*}; }\n" +
			"_arguments() { local s; for s; do s=${s#\\(*\\)}; print -rl -- ${${s%%\\[*}%=}; print -rl -- ${=${s##*:}//[()]/}; done }\n" +
			"source " + file(t, "ftvirt.zsh", clidoc.Zsh(cli.App())) + "\nwords=(\"$@\") CURRENT=$#\n_ftvirt"
		return strings.Fields(output(t, "zsh", append([]string{"-f", "-c", script, "zsh", "ftvirt"}, words...)...))
	},
}

func TestCompletions(t *testing.T) {
	t.Parallel()
	for shell, complete := range completions {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			for _, tc := range []struct {
				words    []string
				has, not []string
			}{
				{[]string{""}, []string{"enable", "status", "arbiter", "lab"}, []string{"--peer", "dump"}},
				{[]string{"log", ""}, []string{"dump", "stat"}, []string{"enable", "status"}},
				{[]string{"enable", "--"}, []string{"--peer", "--wait", "--config", "--help"}, []string{"--follow", "--output"}},
				{[]string{"log", "dump", "--"}, []string{"--from", "--limit"}, []string{"--peer", "--follow"}},
				{[]string{"enable", "web", "--"}, []string{"--peer"}, []string{"--follow"}},
				{[]string{"status", "--output", ""}, []string{"json", "yaml"}, []string{"enable"}},
				{[]string{"status", "-o", ""}, []string{"json", "yaml"}, []string{"enable"}},
			} {
				got := complete(t, tc.words...)
				for _, w := range tc.has {
					if !slices.Contains(got, w) {
						t.Fatalf("%q lacks %s: %.500q", tc.words, w, got)
					}
				}
				for _, w := range tc.not {
					if slices.Contains(got, w) {
						t.Fatalf("%q has %s: %.500q", tc.words, w, got)
					}
				}
			}
			// Every command and every flag is known.
			walk(cli.App(), func(path string, c *libcli.Command) {
				got := complete(t, append(strings.Fields(path), "--")...)
				for _, f := range c.Flags {
					for _, name := range f.Names() {
						if name != "help" && len(name) > 1 && !slices.Contains(got, "--"+name) {
							t.Fatalf("%s lacks --%s: %.500q", path, name, got)
						}
					}
				}
			})
		})
	}
}

// What a shell splits in its own way, and what is not one of a few words.
func TestBashDetails(t *testing.T) {
	t.Parallel()
	bash := completions["bash"]
	if got := bash(t, "status", "--output", "=", "j"); !slices.Equal(got, []string{"json"}) {
		t.Errorf("--output=j: %q", got)
	}
	if got := bash(t, "status", "--output", "="); !slices.Contains(got, "table") {
		t.Errorf("--output=: %q", got)
	}
	dir := filepath.Dir(file(t, "some.rrlog", nil))
	if got := bash(t, "log", "stat", dir+"/so"); !slices.Equal(got, []string{dir + "/some.rrlog"}) {
		t.Errorf("a file: %q", got)
	}
	if got := bash(t, "enable", "--peer", ""); len(got) != 0 {
		t.Errorf("a host: %q", got)
	}
}
