// SPDX-License-Identifier: Apache-2.0

// Package cli is the ftvirt command: one file for each subcommand.
package cli

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab/labcli"
)

const description = `ftvirt protects libvirt domains against the death of their host: a backup on
another host replays all that the primary does, and goes on where it ended.

'ftvirt agent' must run on each host; the other commands ask the agent of the
host that they are run on, and need root.

Exit codes:
   0  done
   1  it failed; standard error says what, why, and what to do
   2  wrong arguments
  3  'ftvirt check' or 'ftvirt doctor' found problems
  4  the agent could not be reached
  5  'ftvirt verify' found a difference`

// App returns the whole command. Run runs it as a program.
func App() *cli.App {
	app := &cli.App{
		Name:        "ftvirt",
		Usage:       "fault-tolerant libvirt domains",
		Description: description,
		HideVersion: true,
		Commands: []*cli.Command{
			enableCommand(), disableCommand(), suspendCommand(), resumeCommand(), failoverCommand(), handoverCommand(),
			restartBackupCommand(), migrateBackupCommand(), statusCommand(), listCommand(), checkCommand(), doctorCommand(), eventsCommand(), verifyCommand(), diagnoseCommand(),
			xmlCommand(), virshCommand(), logCommand(), arbiterCommand(), witnessCommand(), pkiCommand(), configCommand(), agentCommand(), labcli.Command(),
		},
		Action: unknownCommand,
		// Run reports errors and chooses the exit code.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   onUsageError,
	}
	finish(app.Commands)
	return app
}

// finish gives all commands what urfave/cli does not hand down.
func finish(commands []*cli.Command) {
	for _, c := range commands {
		c.OnUsageError = onUsageError
		// A domain may be called "help".
		c.HideHelpCommand = len(c.Subcommands) == 0
		if len(c.Subcommands) > 0 && c.Action == nil {
			c.Action = unknownCommand
		}
		finish(c.Subcommands)
	}
}

// usageError is a mistake in the arguments.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }

func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

func onUsageError(c *cli.Context, err error, _ bool) error {
	return usagef("%w; see '%s --help'", err, commandName(c))
}

// commandName is how the user calls the command, such as "ftvirt log dump".
func commandName(c *cli.Context) string {
	if c.Command == nil || c.Command.HelpName == "" {
		return c.App.Name
	}
	return c.Command.HelpName
}

// unknownCommand is the action where a subcommand is missing.
func unknownCommand(c *cli.Context) error {
	name := c.Args().First()
	if name == "" {
		return cli.ShowSubcommandHelp(c)
	}
	commands := c.App.Commands
	if c.Command != nil && len(c.Command.Subcommands) > 0 {
		commands = c.Command.Subcommands
	}
	hint := ""
	if s := cli.SuggestCommand(commands, name); s != "" {
		hint = fmt.Sprintf("did you mean %q? ", strings.TrimSuffix(strings.TrimPrefix(s, "Did you mean \""), "\"?"))
	}
	return usagef("unknown command %q; %ssee '%s --help'", name, hint, commandName(c))
}

// arguments refuses a wrong number of them; most < 0 is no limit.
func arguments(c *cli.Context, least, most int) error {
	n := c.NArg()
	if n >= least && (most < 0 || n <= most) {
		return nil
	}
	what := "missing argument"
	if n > least {
		what = fmt.Sprintf("superfluous argument %q", c.Args().Get(most))
	}
	return usagef("%s; usage: %s %s", what, commandName(c), strings.TrimSpace(c.Command.ArgsUsage))
}

func configFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "config", Usage: "the configuration `FILE`", EnvVars: []string{config.PathEnv}, Value: config.DefaultPath,
	}
}

func socketFlag() cli.Flag {
	return &cli.StringFlag{Name: "socket", Usage: "the agent's admin `SOCKET`; the default is from the configuration"}
}

// connect makes the client for a command; it does not dial yet.
func connect(c *cli.Context) (*client.Client, error) {
	socket := c.String("socket")
	if socket == "" {
		cfg, err := load(c, true)
		if err != nil {
			return nil, err
		}
		socket = cfg.Agent.AdminSocket
	}
	return client.New(socket), nil
}

// load reads the configuration; a command that can do without one takes the
// defaults if none is installed.
func load(c *cli.Context, optional bool) (config.Config, error) {
	cfg, err := config.Load(c.String("config"))
	if err == nil {
		return cfg, nil
	}
	if optional && !c.IsSet("config") && isNotExist(err) {
		return config.Default(), nil
	}
	return config.Config{}, fmt.Errorf("configuration: %w", err)
}
