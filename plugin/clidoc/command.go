// SPDX-License-Identifier: Apache-2.0

// Package clidoc makes manual pages and shell completions from a command as
// urfave/cli has it, and from the example of its configuration file, so that
// they cannot differ from what the program does.
package clidoc

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// command is a command with all that its documentation needs.
type command struct {
	path        []string // without the program's name; empty for the program
	usage       string
	description string
	args        string // such as "[DOMAIN]"
	flags       []option
	commands    []command
	rest        bool // what follows its first argument is another command
}

// option is one flag.
type option struct {
	names []string // with their dashes
	value string   // placeholder, empty if it takes none
	usage string   // without the marks of the placeholder
	deflt string
	env   []string
	// choices are the values of a flag whose usage ends in ": a, b, c".
	choices []string
}

func describe(app *cli.App) command {
	c := command{usage: app.Usage, description: app.Description}
	for _, sub := range app.Commands {
		if !sub.Hidden {
			c.commands = append(c.commands, describeCommand(sub, nil))
		}
	}
	return c
}

func describeCommand(from *cli.Command, parent []string) command {
	c := command{
		path: append(slices.Clone(parent), from.Name), usage: from.Usage, description: from.Description, args: strings.TrimSpace(from.ArgsUsage),
	}
	c.rest = strings.Contains(c.args, "COMMAND [ARGUMENT")
	for _, f := range from.VisibleFlags() {
		if f.Names()[0] != "help" {
			c.flags = append(c.flags, describeFlag(f))
		}
	}
	for _, sub := range from.Subcommands {
		if !sub.Hidden && sub.Name != "help" {
			c.commands = append(c.commands, describeCommand(sub, c.path))
		}
	}
	return c
}

func describeFlag(f cli.Flag) option {
	var o option
	for _, n := range f.Names() {
		if len(n) == 1 {
			n = "-" + n
		} else {
			n = "--" + n
		}
		o.names = append(o.names, n)
	}
	doc, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return o
	}
	o.usage, o.env = doc.GetUsage(), doc.GetEnvVars()
	if !doc.TakesValue() {
		return o
	}
	o.value = "VALUE"
	if before, rest, ok := strings.Cut(o.usage, "`"); ok {
		if name, after, ok := strings.Cut(rest, "`"); ok {
			o.value, o.usage = name, before+name+after
		}
	}
	if o.deflt = doc.GetDefaultText(); o.deflt == "" {
		o.deflt = doc.GetValue()
	}
	o.deflt = strings.Trim(o.deflt, `"`)
	if _, list, ok := strings.Cut(o.usage, o.value+": "); ok && !strings.Contains(list, ";") {
		o.choices = strings.Split(list, ", ")
	}
	return o
}

// all gives c and all below it.
func (c command) all() []command {
	list := []command{c}
	for _, sub := range c.commands {
		list = append(list, sub.all()...)
	}
	return list
}

// name is how the user calls it.
func (c command) name(program string) string {
	return strings.Join(append([]string{program}, c.path...), " ")
}

// kind is what completes an argument or a value.
type kind int

const (
	nothing kind = iota
	file
	domain
	choice
)

// takes tells what the arguments are.
func (c command) takes() kind {
	switch {
	case strings.Contains(c.args, "FILE") && !strings.Contains(c.args, "DOMAIN"), strings.Contains(c.args, "DIRECTORY"):
		return file
	case strings.Contains(c.args, "DOMAIN") && !strings.HasPrefix(c.args, "HOST"):
		return domain
	}
	return nothing
}

func (o option) takes() kind {
	switch {
	case len(o.choices) > 0:
		return choice
	case o.value == "FILE" || o.value == "SOCKET" || o.value == "DIRECTORY":
		return file
	}
	return nothing
}
