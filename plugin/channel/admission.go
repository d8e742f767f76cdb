// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// admission holds the connections that have not said who they are. There is room
// for a few; when it is full, the oldest of the address that has the most makes
// room. So strangers who connect and say nothing push each other out, and an
// agent, which is done within milliseconds, gets through.
type admission struct {
	mu      sync.Mutex
	most    int
	waiting []waiting // oldest first
}

type waiting struct {
	conn net.Conn
	from netip.Addr
}

// enter takes a connection in, and closes another if need be.
func (a *admission) enter(conn net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting = append(a.waiting, waiting{conn, origin(conn)})
	if len(a.waiting) <= a.most {
		return
	}
	count := map[netip.Addr]int{}
	for _, w := range a.waiting {
		count[w.from]++
	}
	victim := 0
	for i, w := range a.waiting {
		if count[w.from] > count[a.waiting[victim].from] {
			victim = i
		}
	}
	evicted := a.waiting[victim].conn
	a.remove(victim)
	_ = abort(evicted)
}

// leave tells that a connection said who it is, or ended.
func (a *admission) leave(conn net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, w := range a.waiting {
		if w.conn == conn {
			a.remove(i)
			return
		}
	}
}

func (a *admission) remove(i int) { a.waiting = append(a.waiting[:i], a.waiting[i+1:]...) }

// abort closes a connection without a word to the peer.
func abort(conn net.Conn) error {
	if wrapped, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = wrapped.NetConn()
	}
	return conn.Close()
}

// origin is the address that a connection comes from, without its port.
func origin(conn net.Conn) netip.Addr {
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// complaints are what the log is told of connections that were refused: each
// address's first at once, and then one a minute, with the number of those that
// were passed over.
type complaints struct {
	log *slog.Logger

	mu   sync.Mutex
	told map[netip.Addr]*complaint
}

type complaint struct {
	at      time.Time
	skipped int
}

const (
	// complainEach is the least time between two lines about one address.
	complainEach = time.Minute
	// complainOf bounds the addresses that are told apart. All others count as
	// one.
	complainOf = 256
)

func (c *complaints) warn(ctx context.Context, text string, conn net.Conn, args ...any) {
	from := origin(conn)
	skipped, due := c.due(from, time.Now())
	if !due {
		return
	}
	args = append([]any{"peer", conn.RemoteAddr()}, args...)
	if skipped > 0 {
		args = append(args, "more_like_it", skipped)
	}
	c.log.WarnContext(ctx, text, args...)
}

func (c *complaints) due(from netip.Addr, now time.Time) (skipped int, due bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.told == nil {
		c.told = map[netip.Addr]*complaint{}
	}
	known := c.told[from]
	if known == nil && len(c.told) >= complainOf {
		for addr, old := range c.told {
			if now.Sub(old.at) >= complainEach {
				delete(c.told, addr)
			}
		}
		if len(c.told) >= complainOf {
			from = netip.Addr{}
			known = c.told[from]
		}
	}
	if known == nil {
		c.told[from] = &complaint{at: now}
		return 0, true
	}
	if now.Sub(known.at) < complainEach {
		known.skipped++
		return 0, false
	}
	skipped = known.skipped
	*known = complaint{at: now}
	return skipped, true
}
