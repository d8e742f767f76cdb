// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

func disableCommand() *cli.Command {
	return &cli.Command{
		Name:      "disable",
		Usage:     "take protection away; the domain goes on where it is",
		ArgsUsage: "DOMAIN",
		Description: "The backup of a running domain is discarded; nothing changes if the arbiter does not\n" +
			"answer. A domain that is not running gets the definition back that it had before it was\n" +
			"enabled.",
		Flags: []cli.Flag{configFlag(), socketFlag()},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 1, 1); err != nil {
				return err
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			dom, err := agt.Domain(c.Context, c.Args().First())
			if err != nil {
				return err
			}
			disable, done := agt.Disable, "is no longer protected"
			if !dom.Running {
				disable, done = agt.Restore, "has its ordinary definition back"
			}
			if err := disable(c.Context, dom.UUID.String()); err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.App.Writer, "domain %s %s\n", dom.Domain, done)
			return err
		},
	}
}
