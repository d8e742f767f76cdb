// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

const (
	watchPeriod = 500 * time.Millisecond
	// watchKept is how many values a sparkline has: half a minute.
	watchKept = 60
)

// bars are the steps of a sparkline.
var bars = []rune("▁▂▃▄▅▆▇█")

// sparkline draws values from 0 to the largest of them; of more than width, the
// newest.
func sparkline(values []float64, width int) string {
	if len(values) > width {
		values = values[len(values)-width:]
	}
	top := 0.0
	for _, v := range values {
		top = max(top, v)
	}
	var b strings.Builder
	for _, v := range values {
		step := 0
		if top > 0 && v > 0 {
			step = min(int(v/top*float64(len(bars))), len(bars)-1)
		}
		b.WriteRune(bars[step])
	}
	return b.String()
}

// history is what a domain's figures were.
type history struct {
	lag, rate, delay []float64
	seen             bool // in the newest answer
}

func push(values []float64, v float64) []float64 {
	values = append(values, v)
	return values[max(0, len(values)-watchKept):]
}

// watch is a live view of a host's pairs.
type watch struct {
	domain string // only this one, or all
	past   map[string]*history
}

func newWatch(domain string) *watch { return &watch{domain: domain, past: map[string]*history{}} }

// add takes an answer of the agent.
func (v *watch) add(list []client.Status) {
	for _, h := range v.past {
		h.seen = false
	}
	for _, s := range list {
		h := v.past[s.UUID.String()]
		if h == nil {
			h = &history{}
			v.past[s.UUID.String()] = h
		}
		h.seen = true
		h.lag, h.rate, h.delay = push(h.lag, s.Lag), push(h.rate, s.LogRate), push(h.delay, s.OutputDelayMax)
	}
	for id, h := range v.past {
		if !h.seen {
			delete(v.past, id)
		}
	}
}

// frame draws what is known, in lines of at most width cells.
func (v *watch) frame(host string, list []client.Status, failure error, now time.Time, width int) string {
	var b strings.Builder
	line := func(format string, args ...any) {
		text := []rune(printable(fmt.Sprintf(format, args...)))
		b.WriteString(string(text[:min(len(text), width)]) + "\n")
	}
	line("ftvirt on %s  %s  (Ctrl-C ends)", host, now.Format("15:04:05"))
	if failure != nil {
		line("%s", failure)
	}
	spark := max(10, min(watchKept, width-40))
	for _, s := range list {
		primary, backup := hostsOf(s)
		line("")
		line("%s  %s  primary %s, backup %s, epoch %d", s.Domain, stateOf(s), primary, backup, s.Epoch)
		if s.State == "cloning" {
			done := percent(s)
			full := done * barWidth / 100
			line("  clone         [%s%s] %d %% %s", strings.Repeat("#", full), strings.Repeat(".", barWidth-full), done, s.ClonePhase)
		}
		if s.Failure != "" {
			line("  failure       %s", s.Failure)
		}
		h := v.past[s.UUID.String()]
		if h == nil || s.Position == 0 {
			continue
		}
		line("  lag           %-12s %s", milliseconds(s.Lag), sparkline(h.lag, spark))
		line("  log rate      %-12s %s", byteRate(s.LogRate), sparkline(h.rate, spark))
		if s.Mode == "record" {
			line("  output delay  %-12s %s", milliseconds(s.OutputDelayMax), sparkline(h.delay, spark))
		}
	}
	if len(list) == 0 && failure == nil {
		line("no domain of this host has to do with ftvirt")
	}
	return b.String()
}

// Control sequences of ECMA-48: a second screen, so that the first is as it was
// afterwards, and the home of the cursor.
const (
	screenEnter = "\x1b[?1049h\x1b[?25l"
	screenLeave = "\x1b[?25h\x1b[?1049l"
	screenHome  = "\x1b[H"
	lineClear   = "\x1b[K"
	restClear   = "\x1b[J"
)

// run draws until ctx ends. On what is no terminal each view stands below the
// one before.
func (v *watch) run(ctx context.Context, w io.Writer, agt *client.Client) error {
	f, ok := w.(*os.File)
	terminal := ok && isTerminal(f)
	if terminal {
		_, _ = io.WriteString(w, screenEnter)
		defer func() { _, _ = io.WriteString(w, screenLeave) }()
	}
	host, _ := os.Hostname()
	t := time.NewTicker(watchPeriod)
	defer t.Stop()
	var list []client.Status
	for first := true; ; first = false {
		now, err := v.ask(ctx, agt)
		switch {
		case ctx.Err() != nil:
			return nil // as much as was wanted
		case err != nil && first:
			return err
		case err == nil:
			list = now
			v.add(list)
		}
		for _, s := range list {
			host = s.Host
		}
		width, height := 80, 0
		if terminal {
			width, height = terminalSize(f)
		}
		text := v.frame(host, list, err, time.Now(), width)
		if terminal {
			lines := strings.SplitAfter(text, "\n")
			text = strings.Join(lines[:min(len(lines), max(1, height-1))], "")
			text = screenHome + strings.ReplaceAll(text, "\n", lineClear+"\n") + restClear
		}
		if _, err := io.WriteString(w, text); err != nil {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (v *watch) ask(ctx context.Context, agt *client.Client) ([]client.Status, error) {
	if v.domain == "" {
		return agt.Status(ctx)
	}
	s, err := agt.StatusOf(ctx, v.domain)
	return []client.Status{s}, err
}

func terminalSize(f *os.File) (width, height int) {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 || size.Row == 0 {
		return 80, 24
	}
	return int(size.Col), int(size.Row)
}
