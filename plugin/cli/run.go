// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab/labcli"
)

// The exit codes, as --help documents them.
const (
	exitOK = iota
	exitFailure
	exitUsage
	exitProblems
	exitAgent
	exitDiffers
)

// Run runs the command as a program and returns its exit code. Errors go to
// the app's ErrWriter, or else to standard error.
func Run(ctx context.Context, app *cli.App, args []string) int {
	stderr := app.ErrWriter
	if stderr == nil {
		stderr = os.Stderr
	}
	err := app.RunContext(ctx, arrange(app, args))
	report(stderr, err)
	return exitCode(err)
}

func exitCode(err error) int {
	var usage *usageError
	var noAnswer *client.NoAnswerError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage), errors.Is(err, labcli.ErrUsage):
		return exitUsage
	case errors.Is(err, errProblems), errors.Is(err, errIll):
		return exitProblems
	case errors.Is(err, errDiffers):
		return exitDiffers
	case errors.As(err, &noAnswer):
		return exitAgent
	}
	return exitFailure
}

// report writes an error as virsh does.
func report(w io.Writer, err error) {
	if err == nil || errors.Is(err, errProblems) || errors.Is(err, errIll) || errors.Is(err, errDiffers) {
		return // what was found was the output
	}
	// What is joined of several errors has one on each line.
	_, _ = fmt.Fprintf(w, "error: %s\n", strings.ReplaceAll(explain(err), "\n", "\n       "))
}

// explain adds to an error what who runs the command can do about it.
func explain(err error) string {
	text := err.Error()
	if e, ok := errors.AsType[*client.NoAnswerError](err); ok {
		if e.NotRunning() {
			text += ", or name its socket with --socket"
		}
		return text
	}
	if e, ok := errors.AsType[*client.Error](err); ok && len(e.Problems) > 0 {
		// The text repeats the problems in one long line.
		text, _, _ = strings.Cut(text, e.Problems[0].String())
		text = strings.TrimSpace(text)
		for _, p := range e.Problems {
			text += "\n" + p.String()
		}
		return text
	}
	switch {
	case errors.Is(err, client.ErrNoDomain):
		text += "; see 'virsh list --all' for those that this host has"
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		text += "; run it as root"
	}
	return text
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// arrange moves a command's flags before its arguments, where urfave/cli wants
// them: people write 'ftvirt enable web --peer hostb', as with virsh.
func arrange(app *cli.App, args []string) []string {
	if len(args) < 2 {
		return args
	}
	out := args[:1:1]
	rest := args[1:]
	commands, flags := app.Commands, app.Flags
	var command *cli.Command
	for len(rest) > 0 {
		next := find(commands, rest[0])
		if next == nil {
			break
		}
		command, commands, flags = next, next.Subcommands, next.Flags
		out = append(out, rest[0])
		rest = rest[1:]
	}
	// What follows the command of 'lab exec' belongs to that command.
	if command == nil || len(command.Subcommands) > 0 || strings.Contains(command.ArgsUsage, "COMMAND [ARGUMENT") {
		return append(out, rest...)
	}
	var first, last []string
	for i := 0; i < len(rest); i++ {
		a := rest[i]
		switch {
		case a == "--":
			last = append(last, rest[i+1:]...)
			i = len(rest)
		case len(a) < 2 || a[0] != '-':
			last = append(last, a) // also "-", for standard input
		default:
			first = append(first, a)
			if !strings.Contains(a, "=") && takesValue(flags, strings.TrimLeft(a, "-")) && i+1 < len(rest) {
				i++
				first = append(first, rest[i])
			}
		}
	}
	out = append(out, first...)
	if len(last) > 0 {
		out = append(append(out, "--"), last...)
	}
	return out
}

func find(commands []*cli.Command, name string) *cli.Command {
	for _, c := range commands {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

func takesValue(flags []cli.Flag, name string) bool {
	for _, f := range flags {
		for _, n := range f.Names() {
			if n == name {
				_, isBool := f.(*cli.BoolFlag)
				return !isBool
			}
		}
	}
	return false
}
