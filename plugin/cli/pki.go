// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/pki"
)

const pkiDescription = `The logging channel runs under TLS, with libvirt's files. If libvirt's own TLS
works between the hosts, all there is to see to is that the certificates, those
to call with included, have the host's name in [peers] among their alternative
names (dns_name in certtool's templates). Else, on a machine that is not one of
the hosts where possible:

   ftvirt pki init DIRECTORY
   ftvirt pki issue DIRECTORY hosta
   ftvirt pki issue DIRECTORY hostb

and copy the files to each host, where it says. The authority's key, cakey.pem,
stays where it is: who has it can be any host. To renew a certificate, move the
host's directory away, issue again, and copy; the agent takes the new files up
by itself.`

func pkiCommand() *cli.Command {
	return &cli.Command{
		Name:        "pki",
		Usage:       "make certificates for the logging channel",
		Description: pkiDescription,
		Subcommands: []*cli.Command{
			{
				Name:      "init",
				Usage:     "make a certificate authority in a directory",
				ArgsUsage: "DIRECTORY",
				Action: func(c *cli.Context) error {
					if err := arguments(c, 1, 1); err != nil {
						return err
					}
					dir := c.Args().First()
					ca, err := pki.NewCA("ftvirt " + filepath.Base(dir))
					if err != nil {
						return err
					}
					if err := os.MkdirAll(dir, 0o700); err != nil {
						return err
					}
					if err := ca.Save(dir); err != nil {
						return err
					}
					_, err = fmt.Fprintf(c.App.Writer, "copy %s to %s of every host\n",
						filepath.Join(dir, pki.CACert), config.Default().Channel.CACert)
					return err
				},
			},
			{
				Name:      "issue",
				Usage:     "make the certificates of a host, valid for two years",
				ArgsUsage: "DIRECTORY HOST [NAME...]",
				Description: "HOST is the host's name in [peers], or its certificate_name there. NAMEs are more DNS\n" +
					"names and IP addresses, as libvirt's clients may call it.",
				Action: issueCertificates,
			},
		},
	}
}

func issueCertificates(c *cli.Context) error {
	if err := arguments(c, 2, -1); err != nil {
		return err
	}
	dir, host := c.Args().First(), c.Args().Get(1)
	for _, name := range c.Args().Slice()[1:] {
		if !config.ValidCertificateName(name) {
			return usagef("%q is neither a DNS name nor an IP address", name)
		}
	}
	ca, err := pki.OpenCA(dir)
	if err != nil {
		return fmt.Errorf("%w; 'ftvirt pki init %s' makes an authority", err, dir)
	}
	h, err := ca.Issue(pki.Request{Host: host, Names: c.Args().Slice()[2:]})
	if err != nil {
		return err
	}
	own := filepath.Join(dir, host)
	if err := os.MkdirAll(own, 0o700); err != nil {
		return err
	}
	if err := h.Save(own); err != nil {
		return err
	}
	to := config.Default().Channel
	_, err = fmt.Fprintf(c.App.Writer, "copy %s/%s and %s to %s of %s,\nand %s and %s to %s\n",
		own, pki.ServerCert, pki.ClientCert, filepath.Dir(to.ServerCert), host, pki.ServerKey, pki.ClientKey, filepath.Dir(to.ServerKey))
	return err
}
