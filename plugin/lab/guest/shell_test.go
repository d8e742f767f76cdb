// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// TestRun has a guest that answers what a test says, with pauses between.
func TestRun(t *testing.T) {
	const pause = 50 * time.Millisecond
	for name, c := range map[string]struct {
		answer      []string
		output      string
		least, most time.Duration
		wrong       error
	}{
		"whole":    {[]string{"a\n", "b\n", "exit 0\n"}, "a\nb\n", 2 * pause, time.Second, nil},
		"no lines": {[]string{"a", "exit 0\n"}, "a", pause, time.Second, nil},
		"marks": {
			[]string{"", "", "", guest.MarkBegin + "\n", guest.MarkEnd + "\n", "", "", "exit 0\n"},
			guest.MarkBegin + "\n" + guest.MarkEnd + "\n", pause, 5 * pause, nil,
		},
		"failure": {[]string{"no such thing\nexit 1\n"}, "", 0, time.Second, guest.ErrCommand},
		"broken":  {[]string{"a\n"}, "", 0, time.Second, errAny},
	} {
		t.Run(name, func(t *testing.T) {
			client := guest.Client{Dial: func(context.Context, netip.AddrPort) (net.Conn, error) {
				here, there := net.Pipe()
				go func() {
					_, _ = bufio.NewReader(there).ReadString('\n')
					for i, part := range c.answer {
						if i > 0 {
							<-time.After(pause)
						}
						_, _ = io.WriteString(there, part)
					}
					_ = there.Close()
				}()
				return here, nil
			}}
			output, took, err := client.Run(t.Context(), "do it")
			if c.wrong != nil {
				if err == nil || !errors.Is(c.wrong, errAny) && !errors.Is(err, c.wrong) {
					t.Errorf("%q, %v; want the error %v", output, err, c.wrong)
				}
				return
			}
			if err != nil || output != c.output || took < c.least || took > c.most {
				t.Errorf("%q in %v, %v; want %q in %v to %v", output, took, err, c.output, c.least, c.most)
			}
		})
	}
}

var errAny = errors.New("any")
