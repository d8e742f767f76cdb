// SPDX-License-Identifier: Apache-2.0

// Package metrics shows to Prometheus what an agent knows. All figures are of
// the moment in which they are asked for; a counter of a domain begins anew when
// what it counts does, which its help text tells.
package metrics

import (
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// Host is what one agent knows.
type Host struct {
	Heartbeats Heartbeats
	Domains    []Domain
}

// Heartbeats counts datagrams since the agent was started.
type Heartbeats struct {
	Sent, SendErrors, Received         uint64
	Garbage, Unknown, Forged, Replayed uint64
}

// Domain is what one agent knows of one domain. A part that is nil is not known
// at the moment.
type Domain struct {
	Name string
	UUID plugin.UUID
	Role plugin.Role
	// State is one of States given to New, Peer the host of the other copy.
	State, Peer string
	Epoch       plugin.Epoch
	// Connected tells that the session with the peer's agent is there.
	Connected bool
	// Running tells that there is a copy here, and that it is not paused.
	Running bool
	// Failing tells that the newest try to get a backup failed.
	Failing bool
	// Silence is how long the peer sent neither heartbeats nor log nor acks.
	Silence *time.Duration

	Instructions uint64
	Log          *Log
	Output       *Output
	Clone        *Clone
	ClonePause   time.Duration
	// Ack is how long pieces of the log waited for their acks.
	Ack *Histogram

	Events Events
}

// Log is how far a copy is in the log of its epoch.
type Log struct {
	Position, Acked plugin.Position
	Lag             time.Duration
	// Slowed is the part of its time that the primary pauses, and Held how long
	// its guest has waited for room in the log. Both are of a primary.
	Slowed float64
	Held   time.Duration
}

// Output is the output gate of a primary.
type Output struct {
	Queued, Released, Dropped uint64
	Delay                     time.Duration // sum over those released
	DelayMax                  time.Duration
	// Bounds and Delays count the released packets by their delay; Delays has
	// one element more than Bounds, or none if the plugin does not count them.
	Bounds []time.Duration
	Delays []uint64
}

// Clone is a clone under way.
type Clone struct{ Transferred, Remaining int64 }

// Events counts what became of a domain on this host since its agent was
// started.
type Events struct {
	Failovers, BackupsLost, Divergences    uint64
	ClonesDone, ClonesFailed               uint64
	ArbiterWon, ArbiterLost, ArbiterAbsent uint64
}
