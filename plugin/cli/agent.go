// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent"
)

func agentCommand() *cli.Command {
	return &cli.Command{
		Name:      "agent",
		Usage:     "serve this host, until it is ended by a signal",
		ArgsUsage: " ",
		Flags:     []cli.Flag{configFlag()},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 0, 0); err != nil {
				return err
			}
			cfg, err := load(c, false)
			if err != nil {
				return err
			}
			log := newLogger(os.Stderr, os.Getenv("JOURNAL_STREAM"), journalSocket, cfg.Agent.LogLevel)
			a, err := agent.New(cfg, log)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return a.Run(ctx, func() {
				if err := notifyReady(os.Getenv("NOTIFY_SOCKET")); err != nil {
					log.Warn("cannot tell the service manager that the agent is ready", "error", err)
				}
			})
		},
	}
}

// notifyReady tells systemd that the service is up, see sd_notify(3).
func notifyReady(socket string) error {
	if socket == "" {
		return nil
	}
	// A leading @ stands for an abstract socket, for Go as well.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	defer func() { _ = conn.Close() }()
	_, err = conn.Write([]byte("READY=1"))
	return err
}
