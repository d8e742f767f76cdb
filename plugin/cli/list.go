// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"io"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

func listCommand() *cli.Command {
	return &cli.Command{
		Name:      "list",
		Usage:     "list all domains of this host, protected or not",
		ArgsUsage: " ",
		Flags:     []cli.Flag{outputFlag(formatTable, formatJSON, formatYAML), configFlag(), socketFlag()},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 0, 0); err != nil {
				return err
			}
			format, err := outputFormat(c, formatTable, formatJSON, formatYAML)
			if err != nil {
				return err
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			list, err := agt.Domains(c.Context)
			if err != nil {
				return err
			}
			return write(c.App.Writer, format, list, func(w io.Writer) error { return listTable(w, list) })
		},
	}
}

func listTable(w io.Writer, list []client.DomainInfo) error {
	t := newTable(w, "DOMAIN", "RUNNING", "ROLE", "STATE", "PEER")
	for _, d := range list {
		running, peer := "no", d.Peer
		if d.Running {
			running = "yes"
		}
		if peer == "" && d.Wanted != "" {
			peer = d.Wanted + " (wanted)"
		}
		t.row(d.Domain, running, string(d.Role), d.State, peer)
	}
	return t.flush()
}
