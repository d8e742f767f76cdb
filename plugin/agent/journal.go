// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// Entry is one thing that happened to a domain on this host.
type Entry struct {
	Time   time.Time    `json:"time"`
	Host   string       `json:"host"`
	Domain string       `json:"domain"`
	UUID   plugin.UUID  `json:"uuid"`
	Epoch  plugin.Epoch `json:"epoch"`
	State  string       `json:"state"`
	Reason string       `json:"reason,omitempty"`
}

// journalSize bounds what is kept for those who ask later.
const journalSize = 1000

// journal keeps the newest entries and wakes those who follow.
type journal struct {
	mu      sync.Mutex
	entries []Entry
	dropped int // entries that were forgotten, so that followers keep their place
	changed chan struct{}
}

func newJournal() *journal { return &journal{changed: make(chan struct{})} }

func (j *journal) add(e Entry) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entries = append(j.entries, e)
	if over := len(j.entries) - journalSize; over > 0 {
		j.entries = append([]Entry(nil), j.entries[over:]...)
		j.dropped += over
	}
	close(j.changed)
	j.changed = make(chan struct{})
}

// since gives the entries from place n on, and the next place.
func (j *journal) since(n int) ([]Entry, int, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	from := max(0, n-j.dropped)
	return append([]Entry(nil), j.entries[min(from, len(j.entries)):]...), j.dropped + len(j.entries), j.changed
}

// follow calls f with each entry, those kept first, until ctx ends or f fails.
func (j *journal) follow(ctx context.Context, f func([]Entry) error) error {
	place := 0
	for {
		entries, next, changed := j.since(place)
		place = next
		if len(entries) > 0 {
			if err := f(entries); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}
