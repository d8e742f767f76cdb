// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

// ftPrefix sets our commands apart from those of virsh.
const ftPrefix = "ft-"

// notForVirsh are the commands that have nothing to do with a domain of libvirt.
var notForVirsh = []string{"agent", "arbiter", "config", "lab", "log", "virsh", "witness", "help"}

// virshOptions are those of virsh itself that take a value as the next word.
var virshOptions = []string{"-c", "--connect", "-d", "--debug", "-e", "--escape", "-k", "--keepalive-interval", "-K", "--keepalive-count", "-l", "--log"}

func virshCommand() *cli.Command {
	return &cli.Command{
		Name:      "virsh",
		Usage:     "run virsh, which then has ft-enable, ft-status and the like as well",
		ArgsUsage: "[OPTION...] [COMMAND [ARGUMENT...]]",
		Description: "A command that begins with ft- is the one of ftvirt: 'ftvirt virsh ft-status web' is 'ftvirt status\n" +
			"web'; ft-help lists them. All else, also no command at all, is for virsh, which takes the place of\n" +
			"this program. With alias virsh='ftvirt virsh' one tool does for both.",
		SkipFlagParsing: true,
		Action:          virsh,
	}
}

func virsh(c *cli.Context) error {
	args := c.Args().Slice()
	at, connected := virshVerb(args)
	if at < len(args) && strings.HasPrefix(args[at], ftPrefix) {
		if connected {
			return usagef("%s asks the agent of this host; run it there, without --connect", args[at])
		}
		return ftCommand(c, strings.TrimPrefix(args[at], ftPrefix), args[at+1:])
	}
	path, err := exec.LookPath("virsh")
	if err != nil {
		return fmt.Errorf("%w; install it: Debian has it in libvirt-clients", err)
	}
	if err := unix.Exec(path, append([]string{"virsh"}, args...), os.Environ()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// virshVerb finds the command behind virsh's own options, and tells whether
// they name a libvirtd to connect to.
func virshVerb(args []string) (at int, connected bool) {
	for at < len(args) && strings.HasPrefix(args[at], "-") {
		name, _, joined := strings.Cut(args[at], "=")
		if name == "-c" || name == "--connect" {
			connected = true
		}
		if slices.Contains(virshOptions, name) && !joined {
			at++
		}
		at++
	}
	return at, connected
}

func ftCommand(c *cli.Context, name string, args []string) error {
	var ours []*cli.Command
	for _, sub := range c.App.Commands {
		if !slices.Contains(notForVirsh, sub.Name) {
			ours = append(ours, sub)
		}
	}
	if name == "help" {
		return ftHelp(c.App.Writer, ours)
	}
	if find(ours, name) == nil {
		return usagef("unknown command %q; see '%s %shelp'", ftPrefix+name, commandName(c), ftPrefix)
	}
	return c.App.RunContext(c.Context, arrange(c.App, append([]string{c.App.Name, name}, args...)))
}

func ftHelp(w io.Writer, commands []*cli.Command) error {
	for _, sub := range commands {
		if _, err := fmt.Fprintf(w, "    %-24s %s\n", ftPrefix+sub.Name, sub.Usage); err != nil {
			return err
		}
	}
	return nil
}
