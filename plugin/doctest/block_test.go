// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// Each block of commands in each document says where it is run, or why it is not,
// and each of these documents is run.
func TestDocuments(t *testing.T) {
	t.Parallel()
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, pattern := range []string{"../../README.md", "../../contrib/README.md", "../../contrib/docs/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %v, %v", pattern, found, err)
		}
		files = append(files, found...)
	}
	run := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		blocks, err := Blocks(file, string(text))
		if err != nil {
			t.Error(err)
		}
		for _, b := range blocks {
			if b.IsCommands() && b.NotRun == "" {
				run++
			}
		}
		if name := strings.TrimPrefix(file, "../../"); !strings.Contains(string(makefile), name) {
			t.Errorf("make test-docs does not run %s", name)
		}
	}
	if run < 50 {
		t.Errorf("only %d blocks are run", run)
	}
}

func TestBlocks(t *testing.T) {
	t.Parallel()
	text := strings.Join([]string{
		"# One", "", "<!-- run: hosta hostb, when web is protected, for 3s, exit 2 -->", "```sh", "ftvirt status  # all", "```",
		"- list", "  <!-- run: where web runs, web is shut down -->", "  ```sh", "  a", "    b", "  ```",
		"## Two", "```console", "hosta# virsh list", " Id", "", "hostb# true", "```",
		"<!-- not run: no cluster -->", "```sh", "pcs", "```", "```toml", "x = 1", "```", "```", "drawing", "```",
	}, "\n")
	got, err := Blocks("f.md", text)
	if err != nil {
		t.Fatal(err)
	}
	want := []Block{
		{
			File: "f.md", Line: 4, Section: "One", Lang: "sh", Text: "ftvirt status  # all\n", Hosts: []string{"hosta", "hostb"},
			Protected: "web", For: 3 * time.Second, Exit: 2,
		},
		{File: "f.md", Line: 9, Section: "One", Lang: "sh", Text: "a\n  b\n", Running: "web", Down: true},
		{File: "f.md", Line: 14, Section: "Two", Lang: "console", Text: "hosta# virsh list\n Id\n\nhostb# true\n"},
		{File: "f.md", Line: 21, Section: "Two", Lang: "sh", Text: "pcs\n", NotRun: "no cluster"},
		{File: "f.md", Line: 24, Section: "Two", Lang: "toml", Text: "x = 1\n"},
		{File: "f.md", Line: 27, Section: "Two", Text: "drawing\n"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	commands, err := got[2].Commands()
	if want := []Command{{"hosta", "virsh list", []string{" Id", ""}}, {"hostb", "true", nil}}; err != nil || !reflect.DeepEqual(commands, want) {
		t.Errorf("got %+v, %v", commands, err)
	}
	// On two hosts, without the comment.
	if n := got[0].Typed(); n != 2*len("ftvirt status\n") {
		t.Errorf("%d characters", n)
	}
}

func TestWrongDocuments(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"no word where":           "```sh\ntrue\n```\n",
		"no end":                  "<!-- run: hosta -->\n```sh\ntrue\n",
		"an unknown host":         "<!-- run: hostz -->\n```sh\ntrue\n```\n",
		"an unknown word":         "<!-- run: hosta, soon -->\n```sh\ntrue\n```\n",
		"no block":                "<!-- run: hosta -->\ntext\n",
		"two words":               "<!-- run: hosta -->\n<!-- run: hostb -->\n```sh\ntrue\n```\n",
		"a wrong time":            "<!-- run: hosta, for ever -->\n```sh\ntrue\n```\n",
		"commands in disguise":    "```\n  ftvirt status\n```\n",
		"a prompt in disguise":    "```text\n# virsh list\n```\n",
		"a console elsewhere":     "<!-- run: hosta -->\n```console\nhosta# true\n```\n",
		"a console of no host":    "```console\n$ true\n```\n",
		"a console of hostz":      "```console\nhostz# true\n```\n",
		"an empty console":        "```console\n```\n",
		"yaml that is run":        "<!-- run: hosta -->\n```yaml\na: b\n```\n",
		"a pair stays from where": "<!-- run: hosta, its pair stays -->\n```sh\ntrue\n```\n",
	} {
		if _, err := Blocks("f.md", text); !errors.Is(err, ErrDocument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestShape(t *testing.T) {
	t.Parallel()
	want := strings.Split("DOMAIN   LAG\nweb      11 ms\n...\nend 3", "\n")
	for printed, same := range map[string]bool{
		"DOMAIN  LAG\nweb  7.5 s\nend 4\n":            true,
		"DOMAIN LAG\nweb 11 ms\nmore\nand\nend 3\n\n": true,
		"DOMAIN LAG\nweb -\nend 3\n":                  false,
		"DOMAIN LAG\nmail 11 ms\nend 3\n":             false,
		"DOMAIN LAG\nweb 11 ms\n":                     false,
		"DOMAIN LAG\nweb 11 ms\nend 3\nmore\n":        false,
		"":                                            false,
	} {
		if sameShape(want, printed) != same {
			t.Errorf("%q", printed)
		}
	}
	if !sameShape([]string{"id 6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001 1.3 KiB/s"}, "id 00000000-0000-0000-0000-00000000000a 9 B/s") {
		t.Error("numbers, identities and units are told apart")
	}
}
