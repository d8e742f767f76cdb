// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

const barWidth = 30

// progress shows how far a clone is: a bar that moves on a terminal, and
// elsewhere a line for each phase and each tenth.
type progress struct {
	w        io.Writer
	terminal bool
	shown    string
	width    int
}

func newProgress(w io.Writer) *progress {
	if w == nil {
		w = os.Stderr
	}
	f, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && isTerminal(f)}
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (p *progress) show(s client.Status) {
	phase := s.ClonePhase
	if phase == "" {
		phase = "starting"
	}
	done := percent(s)
	if !p.terminal {
		line := fmt.Sprintf("cloning %s to %s: %s %d %%\n", s.Domain, s.Peer, phase, done/10*10)
		if line != p.shown {
			p.shown = line
			_, _ = io.WriteString(p.w, line) // progress is not worth failing for
		}
		return
	}
	full := done * barWidth / 100
	line := fmt.Sprintf("cloning %s to %s: [%s%s] %3d %% %s", s.Domain, s.Peer,
		strings.Repeat("#", full), strings.Repeat(".", barWidth-full), done, phase)
	pad := max(0, p.width-len(line))
	p.width = len(line)
	_, _ = fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", pad))
}

// done leaves the bar's line.
func (p *progress) done() {
	if p.terminal && p.width > 0 {
		_, _ = io.WriteString(p.w, "\n")
	}
}
