// SPDX-License-Identifier: Apache-2.0

// Package doctest runs the commands that the documents show, as somebody would
// who has bare hosts, the packages and the documents.
//
// A comment before a block of commands, which readers do not see, says where it
// is run, or why it is not:
//
//	<!-- run: hosta hostb -->
//	<!-- run: where web runs, when web is protected, for 5s -->
//	<!-- run: hostb, with newer packages -->
//	<!-- run: where web runs, web is shut down -->
//	<!-- run: where web was -->
//	<!-- not run: it needs a cluster -->
//
// A block of shell ("sh") is run as a whole and has to succeed. In a block of
// "console" the prompt names the host ("hosta# virsh list"), and what stands
// below it is compared with what the command prints: words must be there,
// numbers may be others, a line of three dots stands for any lines.
package doctest

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Block is a fenced block of a document.
type Block struct {
	File    string
	Line    int    // of the fence, from 1
	Section string // the heading above
	Lang    string // what stands behind the fence
	Text    string

	// NotRun is why the block is not run; empty if it is.
	NotRun string
	// Hosts are where it is run, each on its own. None of a console block.
	Hosts []string
	// Running is a domain on whose primary's host it is run, instead of Hosts.
	Running string
	// Was says that it is run where the domain ran when that was asked last.
	Was bool
	// Protected is a domain whose pair must be whole before it is run.
	Protected string
	// Stays says that the pair has to be the same afterwards, in the same epoch.
	Stays bool
	// For is how long it runs before it is interrupted, as by Ctrl-C; 0 means that
	// it ends by itself.
	For time.Duration
	// Exit is the status that it has to end with.
	Exit int
	// Down says that the domain is shut down by it, so that its clients are cut off.
	Down bool
	// Newer says that packages of a newer version lie there before.
	Newer bool
}

// Command is what is typed at a prompt of a console block.
type Command struct {
	Host string
	Text string
	Want []string // lines that it is to print
}

// ErrDocument is wrapped by what is wrong with a document.
var ErrDocument = errors.New("document")

// hostNames are the hosts that documents may speak of.
var hostNames = []string{"hosta", "hostb", "hostc"}

// domainName is the domain that the documents protect.
const domainName = "web"

var (
	fence     = regexp.MustCompile("^( *)(`{3,})([a-z]*) *$")
	directive = regexp.MustCompile(`^ *<!-- (run|not run): (.*) -->$`)
	heading   = regexp.MustCompile(`^#+ +(.*)$`)
	prompt    = regexp.MustCompile(`^(host[a-z])# (.+)$`)
)

// commandLanguages are those of blocks that are to be run or marked.
var commandLanguages = []string{"sh", "console"}

// looksLikeCommands finds commands in a block that claims to be none.
var looksLikeCommands = regexp.MustCompile(`(?m)^ *(\$ |# |[a-z0-9]+# )?(ftvirt|virsh|systemctl|apt|apt-get|make|pcs|scp|ssh) [a-z-]`)

// Blocks finds the blocks of a document.
func Blocks(file, text string) ([]Block, error) {
	var (
		all     []Block
		open    *Block
		indent  string
		pending *Block
		section = path.Base(file)
	)
	fail := func(line int, format string, args ...any) error {
		return fmt.Errorf("%w: %s:%d: %s", ErrDocument, file, line, fmt.Sprintf(format, args...))
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSuffix(line, "\n")
		if open != nil {
			if m := fence.FindStringSubmatch(line); m != nil && m[1] == indent && m[3] == "" {
				if err := open.check(); err != nil {
					return nil, fail(open.Line, "%v", err)
				}
				all = append(all, *open)
				open = nil
				continue
			}
			open.Text += strings.TrimPrefix(line, indent) + "\n"
			continue
		}
		if m := directive.FindStringSubmatch(line); m != nil {
			if pending != nil {
				return nil, fail(n, "two directives for one block")
			}
			pending = &Block{}
			if err := pending.direct(m[1], m[2]); err != nil {
				return nil, fail(n, "%v", err)
			}
			continue
		}
		if m := fence.FindStringSubmatch(line); m != nil {
			open, indent = &Block{}, m[1]
			if pending != nil {
				open, pending = pending, nil
			}
			open.File, open.Line, open.Section, open.Lang = file, n, section, m[3]
			continue
		}
		if pending != nil {
			return nil, fail(n, "a directive that no block follows")
		}
		if m := heading.FindStringSubmatch(line); m != nil {
			section = m[1]
		}
	}
	if open != nil {
		return nil, fail(open.Line, "the block does not end")
	}
	return all, nil
}

func (b *Block) direct(verb, text string) error {
	if verb == "not run" {
		b.NotRun = text
		return nil
	}
	for i, part := range strings.Split(text, ",") {
		words := strings.Fields(part)
		phrase := strings.Join(words, " ")
		var err error
		switch {
		case len(words) == 3 && words[0] == "where" && words[2] == "runs":
			b.Running = words[1]
		case phrase == "where "+domainName+" was":
			b.Was = true
		case len(words) == 4 && words[0] == "when" && words[2] == "is" && words[3] == "protected":
			b.Protected = words[1]
		case phrase == domainName+" is shut down":
			b.Down = true
		case len(words) == 2 && words[0] == "for":
			b.For, err = time.ParseDuration(words[1])
		case len(words) == 2 && words[0] == "exit":
			b.Exit, err = strconv.Atoi(words[1])
		case phrase == "its pair stays":
			b.Stays = true
		case phrase == "with newer packages":
			b.Newer = true
		case i == 0:
			b.Hosts = words
		default:
			err = errors.New("not known")
		}
		if err != nil {
			return fmt.Errorf("%q: %w", phrase, err)
		}
	}
	if b.Stays && b.Protected == "" {
		return errors.New("a pair stays that was not asked for")
	}
	for _, host := range b.Hosts {
		if !slices.Contains(hostNames, host) {
			return fmt.Errorf("there is no host %q", host)
		}
	}
	return nil
}

func (b *Block) directed() bool {
	return b.NotRun != "" || len(b.Hosts) > 0 || b.Running != "" || b.Was
}

// IsCommands tells whether the block has commands.
func (b *Block) IsCommands() bool { return slices.Contains(commandLanguages, b.Lang) }

func (b *Block) check() error {
	switch {
	case b.Lang == "console" && b.NotRun == "":
		if len(b.Hosts) > 0 || b.Running != "" {
			return errors.New("a console's prompts say where its commands are run")
		}
		_, err := b.Commands()
		return err
	case b.IsCommands() && !b.directed():
		return errors.New("commands without a word where they are run, or why not")
	case !b.IsCommands() && b.Lang != "toml" && b.directed():
		return fmt.Errorf("a block of %q is not run", b.Lang)
	case !b.IsCommands() && looksLikeCommands.MatchString(b.Text):
		return errors.New("commands that do not say so: call the block sh or console")
	}
	return nil
}

// Commands gives what is typed in a console block.
func (b *Block) Commands() ([]Command, error) {
	var all []Command
	for line := range strings.Lines(b.Text) {
		line = strings.TrimSuffix(line, "\n")
		if m := prompt.FindStringSubmatch(line); m != nil {
			if !slices.Contains(hostNames, m[1]) {
				return nil, fmt.Errorf("there is no host %q", m[1])
			}
			all = append(all, Command{Host: m[1], Text: m[2]})
			continue
		}
		if len(all) == 0 {
			return nil, errors.New("a console begins with a prompt that names a host, as hosta# ")
		}
		last := &all[len(all)-1]
		last.Want = append(last.Want, line)
	}
	if len(all) == 0 {
		return nil, errors.New("a console without commands")
	}
	return all, nil
}

// Typed is how many characters are typed for the block, ends of lines included,
// comments not.
func (b *Block) Typed() int {
	count := func(line string) int {
		line, _, _ = strings.Cut(line, "  #")
		if line = strings.TrimRight(line, " "); line == "" {
			return 0
		}
		return len([]rune(line)) + 1
	}
	n := 0
	switch b.Lang {
	case "console":
		commands, _ := b.Commands()
		for _, c := range commands {
			n += count(c.Text)
		}
	case "sh":
		for line := range strings.Lines(b.Text) {
			n += count(strings.TrimSuffix(line, "\n"))
		}
		n *= max(1, len(b.Hosts))
	}
	return n
}
