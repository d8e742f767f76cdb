// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/web"
)

const (
	// samplePeriod is between two values of a timeline, and samplesKept bounds
	// it: five minutes.
	samplePeriod = time.Second
	samplesKept  = 300
	// eventsShown of each pair are the newest.
	eventsShown = 50
)

// timelines are what the figures of this host's domains were.
type timelines struct {
	mu      sync.Mutex
	domains map[plugin.UUID]*timeline
}

type timeline struct{ lag, log, delay []float64 }

// sample takes in how things are. What is no more is forgotten.
func (t *timelines) sample(list []Status) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := make(map[plugin.UUID]*timeline, len(list))
	push := func(values []float64, v float64) []float64 {
		values = append(values, v)
		return values[max(0, len(values)-samplesKept):]
	}
	for _, s := range list {
		l := t.domains[s.UUID]
		if l == nil {
			l = &timeline{}
		}
		l.lag, l.log, l.delay = push(l.lag, s.Lag), push(l.log, s.LogRate), push(l.delay, s.OutputDelayMax)
		next[s.UUID] = l
	}
	t.domains = next
}

func (t *timelines) of(id plugin.UUID) timeline {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.domains[id]
	if l == nil {
		return timeline{}
	}
	return timeline{slices.Clone(l.lag), slices.Clone(l.log), slices.Clone(l.delay)}
}

// keepTimelines samples until ctx ends.
func (a *Agent) keepTimelines(ctx context.Context) error {
	t := time.NewTicker(samplePeriod)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			a.past.sample(a.Status())
		case <-ctx.Done():
			return nil
		}
	}
}

// page is what people see.
func (a *Agent) page() web.Page {
	p := web.Page{Host: a.cfg.Host, Time: time.Now()}
	events, _, _ := a.events.since(0)
	slices.Reverse(events)
	ms := func(v float64) string { return fmt.Sprintf("%.1f ms", v) }
	for _, s := range a.Status() {
		l := a.past.of(s.UUID)
		line := func(name string, values []float64, format func(float64) string) web.Line {
			return web.Line{Name: name, Values: values, Format: format, Every: samplePeriod}
		}
		v := web.Pair{
			ID: "domain-" + s.UUID.String(), Domain: s.Domain, State: s.State.String(), Role: string(s.Role), Peer: s.Peer, Epoch: uint64(s.Epoch),
			Failure: s.Failure, Lag: line("Lag", l.lag, ms), Delay: line("Output delay", l.delay, ms),
			Log: line("Log", l.log, func(v float64) string { return fmt.Sprintf("%.1f KiB/s", v/1024) }),
		}
		if s.Reason != pair.ReasonNone {
			v.Reason = s.Reason.String()
		}
		if all := s.CloneTransferred + s.CloneRemaining; s.State == pair.Cloning && all > 0 {
			v.Clone = fmt.Sprintf("%s %d %%", s.ClonePhase, s.CloneTransferred*100/all)
		}
		for _, e := range events {
			if e.UUID == s.UUID && len(v.Events) < eventsShown {
				v.Events = append(v.Events, web.Event{Time: e.Time, Epoch: uint64(e.Epoch), State: e.State, Reason: e.Reason})
			}
		}
		p.Pairs = append(p.Pairs, v)
	}
	return p
}
