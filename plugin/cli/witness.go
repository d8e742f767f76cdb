// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin/config"
)

const (
	// witnessDir is where a witness keeps its votes unless told otherwise.
	witnessDir = "/var/lib/ftvirt-witness"
	// witnessListen is its port on every address.
	witnessListen = ":7702"
)

func witnessCommand() *cli.Command {
	return &cli.Command{
		Name:  "witness",
		Usage: "be one voter of the arbiter for hosts that share no storage",
		Subcommands: []*cli.Command{
			{
				Name:      "key",
				Usage:     "make the secret that hosts and witnesses share, once for all of them",
				ArgsUsage: "[FILE]",
				Description: "The default is " + config.Default().Arbiter.KeyFile + ". A file that exists is not overwritten. Copy it to all\n" +
					"hosts and witnesses, readable by root alone.",
				Action: func(c *cli.Context) error {
					if err := arguments(c, 0, 1); err != nil {
						return err
					}
					path := c.Args().First()
					if path == "" {
						path = config.Default().Arbiter.KeyFile
					}
					return arbiter.MakeKey(path)
				},
			},
			{
				Name:      "init",
				Usage:     "make a directory a witness's, once, and print the witness's id",
				ArgsUsage: "[DIRECTORY]",
				Description: "The default is " + witnessDir + ". It must exist, on a disk that no other witness uses.\n" +
					"Repeating it changes nothing and prints the same id. Never give a witness an older copy\n" +
					"of its directory: it would vote for what it has voted against.",
				Action: initWitness,
			},
			{
				Name:      "serve",
				Usage:     "vote, until ended by a signal",
				ArgsUsage: " ",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "path", Usage: "the witness's `DIRECTORY`", Value: witnessDir},
					&cli.StringFlag{Name: "listen", Usage: "the `ADDRESS` on which hosts reach it", Value: witnessListen},
					&cli.StringFlag{Name: "key-file", Usage: "the `FILE` with the secret", Value: config.Default().Arbiter.KeyFile},
				},
				Action: func(c *cli.Context) error {
					if err := arguments(c, 0, 0); err != nil {
						return err
					}
					ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
					defer stop()
					return serveWitness(ctx, c.String("path"), c.String("listen"), c.String("key-file"))
				},
			},
		},
	}
}

func initWitness(c *cli.Context) error {
	if err := arguments(c, 0, 1); err != nil {
		return err
	}
	path := c.Args().First()
	if path == "" {
		path = witnessDir
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	id, err := arbiter.InitWitness(ctx, path)
	if isNotExist(err) {
		return fmt.Errorf("%w; make the directory first, readable by root alone", err)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.App.Writer, id)
	return err
}

// serveWitness lets the witness in the directory path vote until ctx ends.
func serveWitness(ctx context.Context, path, listen, keyFile string) (err error) {
	key, err := arbiter.ReadKey(keyFile)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	w, err := arbiter.OpenWitness(ctx, arbiter.WitnessConfig{Path: path, Key: key, Log: log})
	if errors.Is(err, arbiter.ErrNotInitialised) {
		return fmt.Errorf("%w If its disk is there, 'ftvirt witness init %s' makes it a witness's", err, path)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", listen)
	if err != nil {
		return err
	}
	log.Info("voting", "witness", w.ID(), "address", ln.Addr().String())
	if err := notifyReady(os.Getenv("NOTIFY_SOCKET")); err != nil {
		log.Warn("cannot tell the service manager that the witness is ready", "error", err)
	}
	return w.Serve(ctx, ln)
}
