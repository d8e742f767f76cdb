// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// ErrPgbench is wrapped when pgbench saw an error.
var ErrPgbench = errors.New("pgbench")

// Of pgbench: how many connections it has, how many transactions a second it
// asks for, and how long a run is. A run is as long as it takes to be in the
// midst of it at most failovers.
const (
	pgbenchClients = 2
	pgbenchRate    = 10
	pgbenchRun     = 30 * time.Second
	pgbenchLimit   = 4 * pgbenchRun
)

// Pgbench runs pgbench again and again. Each run must end without an error, so
// none of its connections may break.
type Pgbench struct {
	progress // a step is a run
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	done     int // transactions that it counted
}

// pgbenchOf is the command that runs pgbench from the lab's client.
func (r *run) pgbenchOf(debian guest.Debian, addr netip.Addr) func(context.Context, ...string) *exec.Cmd {
	return func(ctx context.Context, arguments ...string) *exec.Cmd {
		command := append([]string{debian.Pgbench, "--host", addr.String(), "--username", "postgres", "--no-vacuum", "--client", strconv.Itoa(pgbenchClients)}, arguments...)
		return r.Client.Command(ctx, append(command, "postgres")...)
	}
}

// StartPgbench begins with the command that runs it with some arguments.
func StartPgbench(ctx context.Context, pgbench func(context.Context, ...string) *exec.Cmd) *Pgbench {
	p := &Pgbench{}
	work, stop := context.WithCancel(ctx)
	p.cancel = stop
	p.wg.Go(func() {
		for work.Err() == nil {
			n, err := runPgbench(ctx, pgbench)
			p.done += n
			if err != nil {
				p.fail(err)
				return
			}
			p.advance()
		}
	})
	return p
}

func runPgbench(ctx context.Context, pgbench func(context.Context, ...string) *exec.Cmd) (int, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, pgbenchLimit, fmt.Errorf("a run of %v has not ended within %v", pgbenchRun, pgbenchLimit))
	defer cancel()
	report, err := reportOf(ctx, pgbench(ctx, "--rate", strconv.Itoa(pgbenchRate), "--time", strconv.Itoa(int(pgbenchRun.Seconds()))))
	if err != nil {
		return 0, err
	}
	return transactions(report)
}

// reportOf runs pgbench and returns what it printed.
func reportOf(ctx context.Context, pgbench *exec.Cmd) (string, error) {
	var said strings.Builder
	pgbench.Stderr = &said
	out, err := pgbench.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %w: %w: %s", ErrPgbench, err, context.Cause(ctx), tail(said.String(), 5))
	}
	return string(out), nil
}

var (
	processed = regexp.MustCompile(`(?m)^number of transactions actually processed: (\d+)`)
	failed    = regexp.MustCompile(`(?m)^number of failed transactions: (\d+)`)
)

// transactions reads how many transactions a run made, from its report.
func transactions(report string) (int, error) {
	done, bad := processed.FindStringSubmatch(report), failed.FindStringSubmatch(report)
	if done == nil || bad == nil || bad[1] != "0" {
		return 0, fmt.Errorf("%w: its report is %q", ErrPgbench, report)
	}
	n, err := strconv.Atoi(done[1])
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrPgbench, err)
	}
	return n, nil
}

// Stop waits for the end of the run that it is at, and returns how many
// transactions all runs made.
func (p *Pgbench) Stop() (int, error) {
	p.cancel()
	p.wg.Wait()
	return p.done, p.Err()
}
