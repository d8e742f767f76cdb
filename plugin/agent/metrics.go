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

// listenMetrics opens the address of [metrics], nil if there is none.
func (a *Agent) listenMetrics(ctx context.Context) (net.Listener, error) {
	if a.cfg.Metrics.Listen == "" {
		return nil, nil
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", a.cfg.Metrics.Listen)
	if err != nil {
		return nil, fmt.Errorf("metrics.listen: %w", err)
	}
	return l, nil
}

// metrics answers GET /metrics.
func (a *Agent) metrics() http.Handler {
	var states []string
	for _, s := range pair.States() {
		states = append(states, s.String())
	}
	return metrics.New(states, a.measure).Handler()
}

// serveMetrics answers Prometheus until ctx ends.
func (a *Agent) serveMetrics(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.metrics())
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
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
