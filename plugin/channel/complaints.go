// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// Complaints limit what the log is told of those who are refused: each address's
// first at once, and then one a minute. The zero value is ready.
type Complaints struct {
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

// Warn logs, if it is the address's turn, and adds how many were passed over.
func (c *Complaints) Warn(log *slog.Logger, from netip.Addr, text string, args ...any) {
	skipped, due := c.due(from, time.Now())
	if !due {
		return
	}
	if skipped > 0 {
		args = append(args, "more_like_it", skipped)
	}
	log.Warn(text, args...)
}

func (c *Complaints) due(from netip.Addr, now time.Time) (skipped int, due bool) {
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
