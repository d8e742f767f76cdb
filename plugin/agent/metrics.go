// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/metrics"
	"ftvirt.org/ftvirt/plugin/pair"
)

// listenHTTP opens an address that the configuration names, nil if it names none.
func listenHTTP(ctx context.Context, key, address string) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return l, nil
}

// serveHTTP answers until ctx ends. It does nothing without a listener.
func serveHTTP(ctx context.Context, l net.Listener, handler http.Handler) error {
	if l == nil {
		return nil
	}
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("%s: %w", l.Addr(), err)
	}
	return nil
}

// metrics answers GET /metrics.
func (a *Agent) metrics() http.Handler {
	var states []string
	for _, s := range pair.States() {
		states = append(states, s.String())
	}
	return metrics.New(states, a.measure).Handler()
}

// measure is what the metrics are made of.
func (a *Agent) measure() metrics.Host {
	b := a.detect.Stats()
	h := metrics.Host{Heartbeats: metrics.Heartbeats{
		Sent: b.Sent, SendErrors: b.SendErrors, Received: b.Received,
		Garbage: b.Garbage, Unknown: b.Unknown, Forged: b.Forged, Replayed: b.Replayed,
	}}
	for _, d := range a.known() {
		if s := d.report(); s.relevant() {
			h.Domains = append(h.Domains, d.measure(s))
		}
	}
	return h
}

func seconds(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

// measure adds to a report what only metrics show.
func (d *domain) measure(s Status) metrics.Domain {
	_, v, p, b := d.snapshot()
	m := metrics.Domain{
		Name: s.Domain, UUID: s.UUID, Role: s.Role, State: s.State.String(), Peer: s.Peer, Epoch: s.Epoch,
		Instructions: s.Instructions, ClonePause: seconds(s.ClonePause), Events: d.tally.read(), Failing: s.Failure != "",
		Running: v != nil && s.Paused == "",
	}
	if s.ClonePhase != "" {
		m.Clone = &metrics.Clone{Transferred: s.CloneTransferred, Remaining: s.CloneRemaining}
	}
	var h beats
	switch {
	case p != nil:
		p.mu.Lock()
		h, m.Connected = p.beats, p.conn != nil
		p.mu.Unlock()
		m.Ack = d.acks
	case b != nil:
		b.mu.Lock()
		h, m.Connected = b.beats, b.conn != nil
		b.mu.Unlock()
	}
	if h.peer != nil && d.paired() {
		silence := h.peer.State().Silence
		m.Silence = &silence
	}
	if v == nil {
		return m
	}
	r := v.reports()
	switch {
	case r.Mode == control.ModeRecord && p != nil:
		m.Log = &metrics.Log{
			Position: s.Position, Acked: s.Acked, Lag: seconds(s.Lag), Slowed: s.Slowed, Held: time.Duration(r.stats.HeldNS),
		}
		m.Output = &metrics.Output{
			Queued: r.stats.Queued, Released: r.stats.Released, Dropped: r.stats.Dropped,
			Delay: time.Duration(r.stats.DelayNS), DelayMax: time.Duration(r.stats.DelayMaxNS), Bounds: control.DelayBounds[:],
		}
		if r.stats.Counted {
			m.Output.Delays = r.stats.Delays[:]
		}
	case r.Mode == control.ModeReplay && b != nil && b.log() != nil:
		m.Log = &metrics.Log{Position: s.Position, Acked: s.Acked, Lag: seconds(s.Lag)}
	}
	return m
}
