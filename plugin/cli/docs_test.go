// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

var shell = regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```$")

// Each ftvirt command in a block of shell that a document has is there, with the
// flags that are given.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	documents, err := filepath.Glob("../../contrib/docs/*.md")
	if err != nil || len(documents) < 5 {
		t.Fatalf("documents: %v, %v", documents, err)
	}
	n := 0
	for _, file := range append(documents, "../../README.md", "../../contrib/README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range shell.FindAllStringSubmatch(string(text), -1) {
			for line := range strings.Lines(block[1]) {
				line, _, _ = strings.Cut(line, " #")
				for command := range strings.SplitSeq(line, "&&") {
					words := strings.Fields(command)
					if len(words) == 0 || words[0] != "ftvirt" {
						continue
					}
					n++
					if problem := wrongCommand(words[1:]); problem != "" {
						t.Errorf("%s: %s: %s", file, strings.TrimSpace(command), problem)
					}
				}
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d commands were found", n)
	}
	for _, wrong := range []string{"protect web", "arbiter look", "status --colour", "failover"} {
		if wrongCommand(strings.Fields(wrong)) == "" {
			t.Errorf("%q passes", wrong)
		}
	}
}

func wrongCommand(words []string) string {
	app := App()
	commands, flags, usage := app.Commands, app.Flags, ""
	for len(words) > 0 {
		var found *cli.Command
		for _, c := range commands {
			if c.HasName(words[0]) {
				found = c
			}
		}
		if found == nil {
			break
		}
		commands, flags, usage, words = found.Subcommands, found.Flags, found.ArgsUsage, words[1:]
	}
	if len(commands) > 0 {
		return "there is no such command"
	}
	for _, w := range words {
		if !strings.HasPrefix(w, "-") {
			continue
		}
		name, _, _ := strings.Cut(strings.TrimLeft(w, "-"), "=")
		known := false
		for _, f := range flags {
			for _, n := range f.Names() {
				known = known || n == name
			}
		}
		if !known {
			return "there is no flag " + w
		}
	}
	if len(words) == 0 && usage != "" && !strings.HasPrefix(strings.TrimSpace(usage), "[") && strings.TrimSpace(usage) != "" {
		return "it wants " + usage
	}
	return ""
}
