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

var (
	shell  = regexp.MustCompile("(?ms)^ *```(?:sh|console)\n(.*?)^ *```$")
	inline = regexp.MustCompile("`(ftvirt [^`]*)`")
)

// Each ftvirt command that a document has, in a block or in a sentence, is there,
// with the flags that are given.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	documents, err := filepath.Glob("../../contrib/docs/*.md")
	if err != nil || len(documents) < 5 {
		t.Fatalf("documents: %v, %v", documents, err)
	}
	documents = append(documents, "../../README.md", "../../contrib/README.md", "../../ARCHITECTURE.md", "../e2e/VIRSH.md")
	n := 0
	for _, file := range documents {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		for _, block := range shell.FindAllStringSubmatch(string(text), -1) {
			for line := range strings.Lines(block[1]) {
				line, _, _ = strings.Cut(line, " #")
				for command := range strings.SplitSeq(line, "&&") {
					words := strings.Fields(command)
					if len(words) > 1 && strings.HasPrefix(words[0], "host") {
						words = words[1:] // a prompt
					}
					if len(words) > 0 && words[0] == "ftvirt" {
						found = append(found, strings.Join(words, " "))
					}
				}
			}
		}
		for _, m := range inline.FindAllStringSubmatch(string(text), -1) {
			// What is only named needs no arguments.
			words := strings.Fields(m[1])
			if problem := wrongCommand(words[1:]); problem != "" && !strings.HasPrefix(problem, wants) {
				t.Errorf("%s: %s: %s", file, m[1], problem)
			}
			n++
		}
		for _, command := range found {
			n++
			if problem := wrongCommand(strings.Fields(command)[1:]); problem != "" {
				t.Errorf("%s: %s: %s", file, command, problem)
			}
		}
	}
	if n < 100 {
		t.Errorf("only %d commands were found", n)
	}
	for _, wrong := range []string{"protect web", "arbiter look", "status --colour", "failover"} {
		if wrongCommand(strings.Fields(wrong)) == "" {
			t.Errorf("%q passes", wrong)
		}
	}
}

// wants begins what is said of a command without its arguments.
const wants = "it wants "

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
		if len(words) == 0 {
			return wants + "one of its commands"
		}
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
		return wants + usage
	}
	return ""
}
