// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

// eventTime is RFC 3339 with milliseconds: failovers are measured in them.
const eventTime = "2006-01-02T15:04:05.000Z07:00"

func eventsCommand() *cli.Command {
	return &cli.Command{
		Name:      "events",
		Usage:     "tell what happened to this host's pairs",
		ArgsUsage: " ",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with those to come"},
			outputFlag(formatText, formatJSON), configFlag(), socketFlag(),
		},
		Action: events,
	}
}

func events(c *cli.Context) error {
	if err := arguments(c, 0, 0); err != nil {
		return err
	}
	format, err := outputFormat(c, formatText, formatJSON)
	if err != nil {
		return err
	}
	agt, err := connect(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err = agt.Events(ctx, c.Bool("follow"), func(e client.Event) error { return writeEvent(c.App.Writer, format, e) })
	if ctx.Err() != nil {
		return nil // as much as was wanted
	}
	return err
}

func writeEvent(w io.Writer, format string, e client.Event) error {
	if format == formatJSON {
		return json.NewEncoder(w).Encode(e)
	}
	_, err := fmt.Fprintf(w, "%s  %s  %s  epoch %d  %s\n", e.Time.Format(eventTime), printable(e.Host), printable(e.Domain),
		e.Epoch, printable(withReason(e.State, e.Reason)))
	return err
}
