// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"io"
	"sync/atomic"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/pki"
)

// A clock that jumps by an hour, in either direction and on either host, costs no
// connection that is there, and none that is to come: certificates begin an hour
// before they were made. One that jumps further costs new ones for as long.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	var jump [2]atomic.Int64
	host := func(i int, name string) *secure {
		s := transport(t, install(t, t.TempDir(), ca.PEM(), issue(t, ca, pki.Request{Host: name})), io.Discard).(*secure)
		s.now = func() time.Time { return time.Now().Add(time.Duration(jump[i].Load())) }
		return s
	}
	hosta, hostb := host(0, "hosta"), host(1, "hostb")
	addr, _ := startTLS(t, hostb, io.Discard)
	before, _, err := Dial(t.Context(), hosta, addr, testHello, DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	const hour, tenYears = time.Hour - time.Minute, 10 * 365 * 24 * time.Hour
	for _, c := range []struct {
		by      time.Duration
		refused bool
	}{{hour, false}, {-hour, false}, {tenYears, true}, {-2 * time.Hour, true}, {0, false}} {
		for i := range jump {
			jump[i].Store(int64(c.by))
			conn, _, err := Dial(t.Context(), hosta, addr, testHello, DefaultConfig())
			if refused := err != nil; refused != c.refused {
				t.Errorf("host %d, clock off by %v: %v", i, c.by, err)
			}
			if err == nil {
				echoOver(t, conn)
			}
			jump[i].Store(0)
		}
	}
	jump[0].Store(int64(tenYears))
	jump[1].Store(int64(-tenYears))
	echoOver(t, before)
}
