// SPDX-License-Identifier: Apache-2.0

// Package labcli is the "ftvirt lab" command.
package labcli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// upTimeout bounds "lab up", the guest's build and its download included.
const upTimeout = 10 * time.Minute

// ErrUsage is returned for missing or superfluous arguments.
var ErrUsage = errors.New("wrong arguments")

// Command returns the command with its subcommands.
func Command() *cli.Command {
	name := &cli.StringFlag{
		Name:    "name",
		Usage:   "the `LAB`, if there are several on this machine",
		Value:   lab.DefaultName,
		EnvVars: []string{"FTVIRT_LAB"},
	}
	return &cli.Command{
		Name:  "lab",
		Usage: "run two or three hosts on this machine, to try ftvirt out",
		Description: "Each host has its own network, file systems, processes, libvirtd and ftvirt\n" +
			"agent. The machine's own network and libvirt are not touched. Needs root.",
		Subcommands: []*cli.Command{
			{
				Name:      "up",
				Usage:     "start a lab",
				ArgsUsage: " ",
				Flags: []cli.Flag{
					name,
					&cli.IntFlag{Name: "hosts", Usage: "how many hosts, 2 or 3", Value: 2},
					&cli.BoolFlag{Name: "no-agent", Usage: "do not start ftvirt's agents"},
					&cli.BoolFlag{Name: "no-guest", Usage: "do not build a test guest"},
				},
				Action: up,
			},
			{
				Name:      "down",
				Usage:     "end a lab and remove all of it",
				ArgsUsage: " ",
				Flags:     []cli.Flag{name},
				Action:    down,
			},
			{
				Name:      "exec",
				Usage:     "run a command on a host or on the client",
				ArgsUsage: "HOST COMMAND [ARGUMENT...]",
				Flags:     []cli.Flag{name},
				Action:    execute,
			},
			{
				Name:      "guest",
				Usage:     "define and start a test guest on a host",
				ArgsUsage: "HOST DOMAIN",
				Flags: []cli.Flag{
					name,
					&cli.IntFlag{Name: "number", Usage: "`N` selects its address; each guest of a lab needs another"},
					&cli.StringFlag{Name: "disk-format", Usage: "raw or qcow2", Value: "qcow2"},
				},
				Action: startGuest,
			},
		},
	}
}

// interruptible ends the command's context at the signals that a terminal or a
// service manager sends, so that "lab up" can undo what it has done.
func interruptible(c *cli.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	return ctx, func() { cancel(); stop() }
}

func arguments(c *cli.Context, least, most int) error {
	if n := c.NArg(); n < least || most >= 0 && n > most {
		return fmt.Errorf("%w: usage: ftvirt lab %s %s", ErrUsage, c.Command.Name, strings.TrimSpace(c.Command.ArgsUsage))
	}
	return nil
}

func up(c *cli.Context) error {
	if err := arguments(c, 0, 0); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return lab.ErrNotRoot // before a download
	}
	ctx, cancel := interruptible(c, upTimeout)
	defer cancel()
	bin, build, err := directories()
	if err != nil {
		return err
	}
	options := lab.Options{Name: c.String("name"), Hosts: c.Int("hosts"), NoAgent: c.Bool("no-agent"), Bin: bin}
	if !c.Bool("no-guest") {
		if options.Guest, err = guest.Build(ctx, build); err != nil {
			return err
		}
	}
	l, err := lab.Up(ctx, options)
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "HOST\tSERVICE\tLOGGING\tLIBVIRT")
	for _, h := range l.Hosts() {
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", h.Name, h.ServiceAddr(), h.LoggingAddr(), h.LibvirtURI())
	}
	_, _ = fmt.Fprintf(table, "%s\t%s\t\t\n", l.Client.Name, lab.ClientAddr)
	return table.Flush()
}

// directories returns where this program's files are, and where to build the
// guest: in the repository that the program was built in, or else in the
// system's cache.
func directories() (bin, build string, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", "", err
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", "", err
	}
	bin = filepath.Dir(self)
	if root := filepath.Dir(bin); exists(filepath.Join(root, "go.mod")) {
		return bin, filepath.Join(root, "build", "guest"), nil
	}
	return bin, "/var/cache/ftvirt/guest", nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func down(c *cli.Context) error {
	if err := arguments(c, 0, 0); err != nil {
		return err
	}
	ctx, cancel := interruptible(c, time.Minute)
	defer cancel()
	return lab.Remove(ctx, c.String("name"))
}

func execute(c *cli.Context) error {
	if err := arguments(c, 2, -1); err != nil {
		return err
	}
	l, err := lab.Open(c.Context, c.String("name"))
	if err != nil {
		return err
	}
	node, err := l.Node(c.Args().First())
	if err != nil {
		return err
	}
	argv, err := node.Argv(c.Args().Tail()...)
	if err != nil {
		return err
	}
	// Becoming the command keeps its terminal, signals and exit status its own.
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", path, unix.Exec(path, argv, os.Environ()))
}

func startGuest(c *cli.Context) error {
	if err := arguments(c, 2, 2); err != nil {
		return err
	}
	ctx, cancel := interruptible(c, 2*time.Minute)
	defer cancel()
	l, err := lab.Open(ctx, c.String("name"))
	if err != nil {
		return err
	}
	h, err := l.Host(c.Args().Get(0))
	if err != nil {
		return err
	}
	d, err := h.GuestDomain(ctx, c.Int("number"), c.Args().Get(1), c.String("disk-format"))
	if err != nil {
		return err
	}
	xml, err := guest.DomainXML(d)
	if err != nil {
		return err
	}
	if err := h.Define(ctx, xml); err != nil {
		return err
	}
	if _, err := h.Virsh(ctx, "start", d.Name); err != nil {
		return err
	}
	if err := (guest.Client{Dial: l.Client.Dial, Address: d.Address.Addr()}).WaitReady(ctx); err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.Writer, "%s runs on %s; its echo is at %s port %d, its commands at port %d\n",
		d.Name, h.Name, d.Address.Addr(), guest.PortEcho, guest.PortControl)
	return err
}
