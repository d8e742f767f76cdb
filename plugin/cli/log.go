// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

func logCommand() *cli.Command {
	qemu := &cli.StringFlag{Name: "qemu", Usage: "the `VERSION` of the QEMU that wrote the log", Value: "10.0"}
	return &cli.Command{
		Name:  "log",
		Usage: "look into event logs of QEMU's record/replay",
		Subcommands: []*cli.Command{
			{
				Name:      "dump",
				Usage:     "print a log event by event",
				ArgsUsage: "FILE",
				Flags: []cli.Flag{
					&cli.Uint64Flag{Name: "from", Usage: "begin at `POSITION`"},
					&cli.Uint64Flag{Name: "to", Usage: "end before `POSITION`; 0 is the log's end"},
					&cli.Uint64Flag{Name: "limit", Usage: "print at most `N` events; 0 is no limit"},
					qemu, outputFlag(formatTable, formatJSON),
				},
				Action: dumpLog,
			},
			{
				Name:      "stat",
				Usage:     "sum a log up by kinds of events",
				ArgsUsage: "FILE",
				Flags:     []cli.Flag{qemu, outputFlag(formatTable, formatJSON, formatYAML)},
				Action:    statLog,
			},
		},
	}
}

func dumpLog(c *cli.Context) error {
	format, err := outputFormat(c, formatTable, formatJSON)
	if err != nil {
		return err
	}
	in, layout, err := openLog(c)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	err = rrlog.WriteDump(c.App.Writer, in, layout, rrlog.DumpOptions{
		JSON: format == formatJSON, From: plugin.Position(c.Uint64("from")), To: plugin.Position(c.Uint64("to")), Limit: c.Uint64("limit"),
	})
	return logError(c, err)
}

func statLog(c *cli.Context) error {
	format, err := outputFormat(c, formatTable, formatJSON, formatYAML)
	if err != nil {
		return err
	}
	in, layout, err := openLog(c)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	stat, readErr := rrlog.StatReader(in, layout)
	if readErr != nil && stat.Events == 0 {
		return logError(c, readErr)
	}
	// What precedes the damage is worth knowing, too.
	if err := write(c.App.Writer, format, stat, stat.WriteTable); err != nil {
		return err
	}
	return logError(c, readErr)
}

func openLog(c *cli.Context) (io.ReadCloser, rrlog.Layout, error) {
	if err := arguments(c, 1, 1); err != nil {
		return nil, rrlog.Layout{}, err
	}
	var major, minor int
	var rest string
	version := c.String("qemu")
	// A third number is accepted and does not matter.
	if n, _ := fmt.Sscanf(version, "%d.%d%s", &major, &minor, &rest); n < 2 || rest != "" && !strings.HasPrefix(rest, ".") {
		return nil, rrlog.Layout{}, usagef("--qemu %q is not a version; write it like 10.0", version)
	}
	layout, err := rrlog.LayoutFor(major, minor)
	if err != nil {
		return nil, rrlog.Layout{}, err
	}
	if c.Args().First() == "-" {
		return io.NopCloser(c.App.Reader), layout, nil
	}
	f, err := os.Open(c.Args().First())
	return f, layout, err
}

func logError(c *cli.Context, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w; was it written by QEMU %s?", c.Args().First(), err, c.String("qemu"))
}
