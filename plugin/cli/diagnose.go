// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"
)

func diagnoseCommand() *cli.Command {
	return &cli.Command{
		Name:      "diagnose",
		Usage:     "put all that this host knows of a domain into an archive",
		ArgsUsage: "DOMAIN",
		Description: "The archive has status, events, configuration, definitions without passwords, the log of\n" +
			"QEMU, and of each backup that diverged here a report and the event log around that\n" +
			"place. That log holds what the guest received, so mind whom you give it to. Run it on\n" +
			"both hosts of a pair.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "the `FILE` to write; default: ftvirt-UUID-TIME.tar.gz"},
			configFlag(), socketFlag(),
		},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 1, 1); err != nil {
				return err
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			s, err := agt.StatusOf(c.Context, c.Args().First())
			if err != nil {
				return err
			}
			path := c.String("output")
			if path == "" {
				path = fmt.Sprintf("ftvirt-%s-%s.tar.gz", s.UUID, time.Now().Format("20060102-150405"))
			}
			f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			if err := errors.Join(agt.Diagnose(c.Context, s.UUID.String(), f), f.Close()); err != nil {
				return errors.Join(err, os.Remove(path))
			}
			_, err = fmt.Fprintf(c.App.Writer, "diagnosis of domain %s is in %s\n", s.Domain, path)
			return err
		},
	}
}
