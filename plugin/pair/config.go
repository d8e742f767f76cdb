// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"errors"
	"fmt"
	"time"
)

// DefaultTick is the tick for which DefaultConfig is made.
const DefaultTick = 50 * time.Millisecond

// ErrConfig is wrapped by what Config.Validate returns.
var ErrConfig = errors.New("invalid pair configuration")

// Config holds a machine's limits. All count ticks.
type Config struct {
	// Grace is how long a broken session may take to come back before the
	// pair is given up. A peer or QEMU known to be dead gets none.
	Grace int
	// Hold is how long a session that came back must hold before the grace of
	// the next loss is a whole one again.
	Hold int
	// Stopping is the grace for a primary whose agent announced its stop: it
	// may be restarting.
	Stopping int
	// Away is the same for a backup whose agent did, which is shorter: outputs
	// wait for it.
	Away int
	// Adopt is how long an adopted copy's session may take to come back.
	Adopt int
	// Stall is how long a clone may go without EventCloneProgress, on either
	// side, before it is given up.
	Stall int
	// Settle is how long the primary waits, gate shut, between the switch and
	// the first sign of life of the backup.
	Settle int
	// Plugin is how long the plugin may be away before its QEMU is given up.
	Plugin int
	// Promote is how long a backup that won may take to consume the log.
	Promote int
	// Answer is how long an answer of the arbiter is waited for before it is
	// asked again.
	Answer int
	// RetryMin and RetryMax bound the pause after "unavailable"; it doubles.
	RetryMin, RetryMax int
	// Resume is the pause before a copy that is paused while it goes live is made
	// to try again.
	Resume int
	// Remove is the pause before an order to end QEMU is repeated.
	Remove int
	// Claim is how long the backup of a domain that was powered off leaves the
	// epoch to the primary, whose disks are the ones to start from, before it
	// acquires the epoch itself.
	Claim int
}

// DefaultConfig gives limits for DefaultTick.
func DefaultConfig() Config {
	return Config{
		Grace:    10,  // 500 ms
		Hold:     20,  // 1 s
		Stopping: 100, // 5 s
		Away:     20,  // 1 s
		Adopt:    20,  // 1 s
		Stall:    600, // 30 s
		Settle:   100, // 5 s
		Plugin:   20,  // 1 s
		Promote:  600, // 30 s: a long log is consumed at the guest's own speed
		Answer:   100, // 5 s
		RetryMin: 4,   // 200 ms
		RetryMax: 40,  // 2 s
		Resume:   20,  // 1 s
		Remove:   40,  // 2 s
		Claim:    60,  // 3 s
	}
}

// Validate checks the limits and their relations.
func (c Config) Validate() error {
	for _, f := range []struct {
		name  string
		value int
	}{
		{"grace", c.Grace}, {"hold", c.Hold}, {"stopping", c.Stopping}, {"away", c.Away}, {"adopt", c.Adopt},
		{"stall", c.Stall}, {"settle", c.Settle}, {"plugin", c.Plugin},
		{"promote", c.Promote}, {"answer", c.Answer}, {"retry-min", c.RetryMin}, {"retry-max", c.RetryMax},
		{"resume", c.Resume}, {"remove", c.Remove}, {"claim", c.Claim},
	} {
		if f.value < 1 {
			return fmt.Errorf("%w: %s is %d ticks, at least 1 is needed", ErrConfig, f.name, f.value)
		}
	}
	switch {
	case c.RetryMax < c.RetryMin:
		return fmt.Errorf("%w: retry-max (%d ticks) is below retry-min (%d)", ErrConfig, c.RetryMax, c.RetryMin)
	case c.Stopping < c.Grace:
		return fmt.Errorf("%w: stopping (%d ticks) is below grace (%d)", ErrConfig, c.Stopping, c.Grace)
	}
	return nil
}
