// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"os"

	"github.com/aymanbagabas/go-udiff"
	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/hooks"
)

// maxXML is libvirt's own limit.
const maxXML = 16 << 20

func xmlCommand() *cli.Command {
	return &cli.Command{
		Name:      "xml",
		Usage:     "print a domain's definition as it must be to be protected",
		ArgsUsage: "DOMAIN|FILE",
		Description: "A FILE that exists, or - for standard input, is read; anything else is a domain of this\n" +
			"host. Nothing is changed. Passwords are left out unless asked for, as by virsh dumpxml.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "diff", Usage: "print what changes, as a unified diff"},
			&cli.BoolFlag{Name: "security-info", Usage: "with the passwords of displays"},
			configFlag(), socketFlag(),
		},
		Action: printXML,
	}
}

func printXML(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	name := c.Args().First()
	text, found, err := readXML(c, name)
	if err != nil {
		return err
	}
	var opts hooks.Options
	if found {
		cfg, err := load(c, true)
		if err != nil {
			return err
		}
		opts = hooks.Options{PluginFile: cfg.Agent.PluginFile, PluginSocket: cfg.Agent.PluginSocket, ICountShift: cfg.Replay.ICountShift}
	} else {
		agt, err := connect(c)
		if err != nil {
			return err
		}
		x, err := agt.XML(c.Context, name)
		if err != nil {
			return err
		}
		name, text = x.Domain, x.XML
		opts = hooks.Options{PluginFile: x.PluginFile, PluginSocket: x.PluginSocket, ICountShift: x.ICountShift}
	}
	before, after, err := transform(text, opts, c.Bool("security-info"))
	if err != nil {
		if found {
			return fmt.Errorf("%s: %w", name, err)
		}
		return err
	}
	if c.Bool("diff") {
		after = udiff.Unified(name, name+" (ready)", before, after)
	}
	_, err = io.WriteString(c.App.Writer, after)
	return err
}

// readXML reads a file, if there is one of that name.
func readXML(c *cli.Context, name string) (text string, found bool, err error) {
	in := c.App.Reader
	if name != "-" {
		f, err := os.Open(name)
		if isNotExist(err) {
			return "", false, nil
		}
		if err != nil {
			return "", true, err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxXML+1))
	if err != nil {
		return "", true, fmt.Errorf("%s: %w", name, err)
	}
	if len(data) > maxXML {
		return "", true, fmt.Errorf("%s: larger than %d MiB, so it is no domain's definition", name, maxXML>>20)
	}
	return string(data), true, nil
}

// transform gives a definition before and after, both written in the same
// manner, so that they differ in nothing but content.
func transform(text string, opts hooks.Options, secrets bool) (before, after string, err error) {
	dom, err := hooks.Parse([]byte(text))
	if err != nil {
		return "", "", err
	}
	if dom.Devices != nil && !secrets {
		for i := range dom.Devices.Graphics {
			if g := &dom.Devices.Graphics[i]; g.VNC != nil {
				g.VNC.Passwd = ""
			} else if g.Spice != nil {
				g.Spice.Passwd = ""
			}
		}
	}
	if before, err = dom.Marshal(); err != nil {
		return "", "", err
	}
	out, err := hooks.Transform(dom, opts)
	if err != nil {
		return "", "", err
	}
	if after, err = out.Marshal(); err != nil {
		return "", "", err
	}
	return before + "\n", after + "\n", nil
}
