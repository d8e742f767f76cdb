// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"
)

// maxOutput bounds what a command may print.
const maxOutput = 1 << 20

// Marks are lines that a command may print to tell when what is to be measured
// begins and ends.
const (
	MarkBegin = "measure-begin"
	MarkEnd   = "measure-end"
)

// Run has a guest of BuildBench run a line of shell, and returns what it printed
// and how long that took: from when the line was sent to when the answer's end
// came, or from mark to mark. A line that fails is an ErrCommand with the end of
// what it printed.
func (c Client) Run(ctx context.Context, line string) (string, time.Duration, error) {
	fail := func(err error) (string, time.Duration, error) {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return "", 0, fmt.Errorf("guest %s: %q: %w", c.Address, line, err)
	}
	conn, err := c.Dial(ctx, netip.AddrPortFrom(c.Address, PortShell))
	if err != nil {
		return fail(err)
	}
	defer func() { _ = conn.Close() }()
	// A deadline in the past ends a read or write that ctx ends.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	begin := time.Now()
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return fail(err)
	}
	var answer strings.Builder
	var end time.Time
	for in := bufio.NewReader(io.LimitReader(conn, maxOutput)); ; {
		text, err := in.ReadString('\n')
		answer.WriteString(text)
		now := time.Now()
		switch strings.TrimSpace(text) {
		case MarkBegin:
			begin = now
		case MarkEnd:
			end = now
		}
		if errors.Is(err, io.EOF) {
			if end.IsZero() {
				end = now
			}
			break
		}
		if err != nil {
			return fail(err)
		}
	}
	output, code, ok := cutExit(answer.String())
	switch {
	case !ok:
		return fail(errors.New("the connection ended before the command"))
	case code != "0":
		return fail(fmt.Errorf("%w: exit code %s: %s", ErrCommand, code, output[max(0, len(output)-500):]))
	}
	return output, end.Sub(begin), nil
}

// cutExit splits an answer at its last line, "exit CODE".
func cutExit(answer string) (output, code string, ok bool) {
	rest, ok := strings.CutSuffix(answer, "\n")
	if !ok {
		return "", "", false
	}
	cut := strings.LastIndex(rest, "exit ")
	if cut < 0 || strings.Contains(rest[cut:], "\n") {
		return "", "", false
	}
	return rest[:cut], rest[cut+len("exit "):], true
}
