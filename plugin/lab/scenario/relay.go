// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
)

// Relay carries TCP connections from one address of a node to another, and can
// delay or hold what comes back. Between two agents it delays acks.
type Relay struct {
	listener net.Listener
	wg       sync.WaitGroup
	ctx      context.Context
	cancel   context.CancelFunc

	mu      sync.Mutex
	delay   time.Duration
	held    bool
	changed chan struct{} // closed and renewed when delay or held changes
}

// StartRelay listens on the node and connects from it to the target.
func StartRelay(ctx context.Context, node *lab.Node, listen, target netip.AddrPort) (*Relay, error) {
	l, err := node.Listen(ctx, listen)
	if err != nil {
		return nil, err
	}
	return newRelay(ctx, l, func(ctx context.Context) (net.Conn, error) { return node.Dial(ctx, target) }), nil
}

func newRelay(ctx context.Context, l net.Listener, dial func(context.Context) (net.Conn, error)) *Relay {
	r := &Relay{listener: l, changed: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(ctx)
	r.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() {
				defer func() { _ = in.Close() }()
				out, err := dial(r.ctx)
				if err != nil {
					return
				}
				defer func() { _ = out.Close() }()
				r.carry(in, out)
			})
		}
	})
	return r
}

// Delay makes everything that comes back wait for as long as d.
func (r *Relay) Delay(d time.Duration) { r.set(func() { r.delay = d }) }

// Hold keeps back all that comes back, until it is called with false.
func (r *Relay) Hold(held bool) { r.set(func() { r.held = held }) }

func (r *Relay) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
	close(r.changed)
	r.changed = make(chan struct{})
}

// Close ends the relay and its connections.
func (r *Relay) Close() {
	r.cancel()
	_ = r.listener.Close()
	r.wg.Wait()
}

type piece struct {
	arrived time.Time
	data    []byte
}

// carry returns when either end closes, or the relay.
func (r *Relay) carry(in, out net.Conn) {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _, _ = in.Close(), out.Close() })
	defer stop()
	// It holds more than a pair's acks of a minute.
	pieces := make(chan piece, 1<<16)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		_, _ = io.Copy(out, in)
	})
	wg.Go(func() {
		defer close(pieces)
		for {
			buf := make([]byte, 16<<10)
			n, err := out.Read(buf)
			if n > 0 {
				select {
				case pieces <- piece{time.Now(), buf[:n]}:
				case <-ctx.Done():
					return
				}
			}
			if err != nil {
				return
			}
		}
	})
	wg.Go(func() {
		defer cancel()
		for p := range pieces {
			if !r.wait(ctx, p.arrived) {
				return
			}
			if _, err := in.Write(p.data); err != nil {
				return
			}
		}
	})
	wg.Wait()
}

// wait returns when what arrived then may go on; false when the relay ends.
func (r *Relay) wait(ctx context.Context, arrived time.Time) bool {
	for {
		r.mu.Lock()
		rest, held, changed := time.Until(arrived.Add(r.delay)), r.held, r.changed
		r.mu.Unlock()
		var due <-chan time.Time
		if !held {
			if rest <= 0 {
				return ctx.Err() == nil
			}
			due = time.After(rest)
		}
		select {
		case <-due:
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}
