// SPDX-License-Identifier: Apache-2.0

// Package detect finds out that the other host of a pair is dead: UDP
// heartbeats both ways, and the progress of log and acks as a second signal
// (the paper, section 2.3). Monitor is the pure arithmetic of suspicion,
// Service the thin shell around it that owns the socket.
package detect

import (
	"errors"
	"fmt"
	"time"
)

// ErrConfig is wrapped by what Config.Validate returns.
var ErrConfig = errors.New("invalid failure detection configuration")

// Config says when a peer counts as dead.
type Config struct {
	// Interval is the time between two heartbeats, and between two ticks of
	// the monitor. Default 50 ms.
	Interval time.Duration
	// Suspect is the silence after which a peer is suspected. Nothing but a
	// line in the log follows from that. Default 200 ms.
	Suspect time.Duration
	// Timeout is the silence, of heartbeats as well as of log and acks, after
	// which a peer counts as dead. Default 500 ms.
	Timeout time.Duration
}

// DefaultConfig gives the defaults.
func DefaultConfig() Config {
	return Config{Interval: 50 * time.Millisecond, Suspect: 200 * time.Millisecond, Timeout: 500 * time.Millisecond}
}

// Validate checks the values and their relations.
func (c Config) Validate() error {
	switch {
	case c.Interval < time.Millisecond:
		return fmt.Errorf("%w: interval %v is below 1 ms", ErrConfig, c.Interval)
	case c.Suspect < 2*c.Interval:
		return fmt.Errorf("%w: suspect (%v) is below two intervals of %v; one lost datagram would raise suspicion",
			ErrConfig, c.Suspect, c.Interval)
	case c.Timeout < c.Suspect:
		return fmt.Errorf("%w: timeout (%v) is below suspect (%v)", ErrConfig, c.Timeout, c.Suspect)
	case c.Timeout < 4*c.Interval:
		return fmt.Errorf("%w: timeout (%v) is below four intervals of %v", ErrConfig, c.Timeout, c.Interval)
	}
	return nil
}

// Liveness is what a monitor thinks of its peer.
type Liveness uint8

const (
	// Unknown: nothing was heard of the peer yet. It cannot die before it was
	// seen alive; that a peer never comes up shows elsewhere.
	Unknown Liveness = iota
	// Alive: a signal came within Suspect.
	Alive
	// Suspected: no signal came for Suspect.
	Suspected
	// Dead: no signal came for Timeout. The next one makes it Alive again.
	Dead
)

func (l Liveness) String() string {
	switch l {
	case Unknown:
		return "unknown"
	case Alive:
		return "alive"
	case Suspected:
		return "suspected"
	case Dead:
		return "dead"
	default:
		return fmt.Sprintf("Liveness(%d)", uint8(l))
	}
}

// Monitor measures the silence of one peer. It has no clock of its own; its
// owner ticks it each Config.Interval. It is not safe for concurrent use.
//
// Silence counts only while this side was awake to hear: a tick that comes
// late adds no more than one and a half intervals. An agent that was starved
// or stopped for seconds therefore stretches its timeout by that time, instead
// of accusing a peer whose heartbeats wait unread in its own socket. Whatever
// the clock does, a peer is dead only after Timeout/(1.5 Interval) silent ticks.
type Monitor struct {
	cfg      Config
	liveness Liveness
	// heartbeat and progress are the two signals.
	heartbeat, progress signal
	lastTick            time.Time
	lateness            time.Duration
}

// signal is one way to hear of a peer.
type signal struct {
	// silence is what ticks have counted since the signal last came.
	silence time.Duration
	// heard is when it last came, until the next tick has seen that.
	heard time.Time
}

func (s *signal) hear(now time.Time) { s.silence, s.heard = 0, now }

// tick counts the silence since the last tick, or since the signal came after
// that; at most limit.
func (s *signal) tick(last, now time.Time, limit time.Duration) {
	const forever = 1 << 62
	if s.heard.After(last) {
		last = s.heard
	}
	s.heard = time.Time{}
	if s.silence < forever {
		// A clock that goes back adds nothing.
		s.silence += min(max(now.Sub(last), 0), limit)
	}
}

// NewMonitor gives the monitor of a peer that was not heard of yet.
func NewMonitor(cfg Config, now time.Time) (*Monitor, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Monitor{cfg: cfg, lastTick: now}, nil
}

// Heartbeat notes that an authentic heartbeat came.
func (m *Monitor) Heartbeat(now time.Time) {
	m.heartbeat.hear(now)
	m.liveness = Alive
}

// Progress notes that log data, or an ack, came from the peer.
func (m *Monitor) Progress(now time.Time) {
	m.progress.hear(now)
	m.liveness = Alive
}

// Tick lets time go by and returns what the peer is now.
func (m *Monitor) Tick(now time.Time) Liveness {
	limit := m.cfg.Interval + m.cfg.Interval/2
	m.heartbeat.tick(m.lastTick, now, limit)
	m.progress.tick(m.lastTick, now, limit)
	m.lateness += max(now.Sub(m.lastTick)-limit, 0)
	m.lastTick = now
	if m.liveness == Unknown {
		return Unknown
	}
	switch silence := m.Silence(); {
	case silence >= m.cfg.Timeout:
		m.liveness = Dead
	case silence >= m.cfg.Suspect && m.liveness != Dead:
		m.liveness = Suspected
	}
	return m.liveness
}

// Silence is how long both signals have been silent at the last tick: the
// shorter of the two.
func (m *Monitor) Silence() time.Duration { return min(m.heartbeat.silence, m.progress.silence) }

// Liveness is what the last tick or signal made of the peer.
func (m *Monitor) Liveness() Liveness { return m.liveness }

// Lateness is by how much, in all, this side's own ticks came too late. A
// growing value means that this host, not the peer, is in trouble.
func (m *Monitor) Lateness() time.Duration { return m.lateness }
