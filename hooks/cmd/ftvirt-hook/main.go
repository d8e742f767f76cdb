// SPDX-License-Identifier: Apache-2.0

// Command ftvirt-hook is what libvirt runs when something happens to a domain.
// Install it in /etc/libvirt/hooks/qemu.d/.
//
// It keeps a stale copy of a protected domain from starting, and a protected
// domain from being migrated by libvirt. It asks the arbiter itself, so that it
// needs no agent; it never calls libvirt, which waits for it; and it ends within
// five seconds, whatever hangs.
//
// Exit status 0 lets libvirt go on; 1 stops it, with the reason on standard
// error, which libvirt shows. "reconnect" is always 0, since libvirt would kill
// a running domain otherwise.
package main

import (
	"context"
	"os"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
)

// deadline bounds a whole run, in which libvirt holds the domain's lock.
const deadline = 5 * time.Second

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if len(os.Args) == 2 && os.Args[1] == askArg {
		ctx, cancel := context.WithTimeout(ctx, deadline-reserve)
		defer cancel()
		os.Exit(answer(ctx, os.Stdin, os.Stderr))
	}
	// The context ends whatever heeds it. A file system that hangs does not.
	time.AfterFunc(deadline, func() { os.Exit(overdue(os.Args[1:])) })
	h := hook{
		load: func() (config.Config, error) { return config.Load(config.Path()) },
		ask:  askChild,
	}
	os.Exit(h.run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// overdue is the exit status when time is up: what could not be decided in time
// is neither started nor migrated, and nothing else is stopped.
func overdue(args []string) int {
	c, err := parseCall(args)
	return exitStatus(err == nil && c.guarded())
}
