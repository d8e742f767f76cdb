// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
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
	cmd := pgbench(ctx, "--no-vacuum", "--client", strconv.Itoa(pgbenchClients), "--rate", strconv.Itoa(pgbenchRate),
		"--time", strconv.Itoa(int(pgbenchRun.Seconds())))
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%w: %w: %w: %s", ErrPgbench, err, context.Cause(ctx), tail(said.String(), 5))
	}
	return transactions(string(out))
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
