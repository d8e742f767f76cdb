// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/config"
)

func configCommand() *cli.Command {
	return &cli.Command{
		Name:  "config",
		Usage: "print or check the configuration file",
		Subcommands: []*cli.Command{
			{
				Name:      "default",
				Usage:     "print a configuration file that explains every key",
				ArgsUsage: " ",
				Action: func(c *cli.Context) error {
					if err := arguments(c, 0, 0); err != nil {
						return err
					}
					_, err := io.WriteString(c.App.Writer, config.Example)
					return err
				},
			},
			{
				Name:      "check",
				Usage:     "tell whether a configuration file can be used",
				ArgsUsage: "[FILE]",
				Action: func(c *cli.Context) error {
					if err := arguments(c, 0, 1); err != nil {
						return err
					}
					path := c.Args().First()
					if path == "" {
						path = config.Path()
					}
					if _, err := config.Load(path); err != nil {
						return err
					}
					_, err := fmt.Fprintf(c.App.Writer, "%s is valid\n", path)
					return err
				},
			},
		},
	}
}
