// SPDX-License-Identifier: Apache-2.0

package clidoc_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	libcli "github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/cli"
	"ftvirt.org/ftvirt/plugin/config"
)

const top = "../.."

var (
	fence  = regexp.MustCompile("(?ms)^ *```([a-z]*)\n(.*?)^ *```")
	inline = regexp.MustCompile("`(ftvirt [^`]+)`")
	link   = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
)

// misused tells what of a call of ftvirt the program would not know.
func misused(app *libcli.App, call string) string {
	call, _, _ = strings.Cut(call, " #")
	commands := app.Commands
	var c *libcli.Command
	for _, w := range strings.Fields(call)[1:] {
		if strings.HasPrefix(w, "-") {
			name, _, _ := strings.Cut(strings.TrimLeft(w, "-"), "=")
			if c == nil || name == "help" {
				continue
			}
			if !slices.ContainsFunc(c.Flags, func(f libcli.Flag) bool { return slices.Contains(f.Names(), name) }) {
				return "no option " + w
			}
			continue
		}
		i := slices.IndexFunc(commands, func(c *libcli.Command) bool { return c.HasName(w) })
		if i < 0 && (c == nil || len(c.Subcommands) > 0) {
			return "no command " + w
		}
		if i >= 0 {
			c, commands = commands[i], commands[i].Subcommands
		}
	}
	return ""
}

func TestMisused(t *testing.T) {
	t.Parallel()
	for call, bad := range map[string]bool{
		"ftvirt status --watch": false, "ftvirt enable web --peer hostb": false, "ftvirt log stat x": false, "ftvirt --help": false,
		"ftvirt stauts": true, "ftvirt status --wacht": true, "ftvirt log staat": true,
	} {
		if got := misused(cli.App(), call); (got != "") != bad {
			t.Errorf("%s: %q", call, got)
		}
	}
}

// What documents tell people to type exists, their configurations can be read,
// and their links lead somewhere.
func TestDocuments(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(top + "/contrib/docs/*.md")
	if err != nil || len(files) < 5 {
		t.Fatalf("documents: %v, %v", files, err)
	}
	files = append(files, top+"/README.md", top+"/contrib/README.md", top+"/ARCHITECTURE.md")
	calls := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		check := func(call string) {
			calls++
			if bad := misused(cli.App(), call); bad != "" {
				t.Errorf("%s: %s: %s", filepath.Base(file), call, bad)
			}
		}
		for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
			switch m[1] {
			case "sh":
				for _, l := range strings.Split(m[2], "\n") {
					if l = strings.TrimSpace(l); strings.HasPrefix(l, "ftvirt ") {
						check(l)
					}
				}
			case "toml":
				if _, err := config.Parse(filepath.Base(file), []byte(m[2])); err != nil {
					t.Error(err)
				}
			}
		}
		for _, m := range inline.FindAllStringSubmatch(string(text), -1) {
			check(m[1])
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), m[1])); err != nil {
				t.Errorf("%s: a link: %v", filepath.Base(file), err)
			}
		}
	}
	if calls < 40 {
		t.Errorf("only %d calls were found", calls)
	}
}
