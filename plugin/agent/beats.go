// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/detect"
	"ftvirt.org/ftvirt/plugin/pair"
)

// beats are the heartbeats of one epoch; the zero value has none.
type beats struct {
	peer   *detect.Peer
	cancel context.CancelFunc
}

// stop ends them.
func (b beats) stop() {
	if b.cancel != nil {
		b.cancel()
	}
}

// progress notes that something came from the peer by the channel.
func (b beats) progress() {
	if b.peer != nil {
		b.peer.Progress()
	}
}

// beat exchanges heartbeats with the peer of a session until ctx ends, and posts
// that the peer is dead when both they and the log have been silent for too
// long: of, which names epoch and session. That the peer's QEMU is dead is told
// over the session, behind the last of its log. A peer whose session came back
// has just been heard of, so its silence counts from now on.
func (d *domain) beat(ctx context.Context, of pair.Event, peer string, key []byte, again bool, alive func() bool) (beats, error) {
	conf, err := d.a.cfg.Peer(peer)
	if err != nil {
		return beats{}, err
	}
	addr, err := resolve(ctx, conf.Heartbeat)
	if err != nil {
		return beats{}, fmt.Errorf("heartbeat address of %s: %w", peer, err)
	}
	p, err := d.register(ctx, of.Epoch, addr, key, func() detect.Flags {
		var f detect.Flags
		if alive() {
			f |= detect.QEMUAlive
		}
		if d.cutOff.Load() {
			f |= detect.ServiceLost
		}
		return f
	})
	if err != nil {
		return beats{}, err
	}
	if again {
		p.Progress()
	}
	of.Kind = pair.EventPeerDead
	d.a.wg.Go(func() {
		defer p.Close()
		for {
			changed := p.Changed()
			s := p.State()
			var wait <-chan time.Time
			if s.Liveness == detect.Dead {
				if rest := d.patience() - s.Silence; rest > 0 {
					wait = time.After(rest)
				} else {
					d.post(of)
				}
			}
			select {
			case <-changed:
			case <-wait:
			case <-ctx.Done():
				return
			}
		}
	})
	return beats{peer: p}, nil
}

// clonePatience is how many times longer than in a pair a peer may be silent
// while a clone is under way: the guest runs and no output waits, and the start of
// a QEMU and the copy of its memory take both hosts' time.
const clonePatience = 4

// patience is how long a silent peer is waited for before the machine hears of it.
func (d *domain) patience() time.Duration {
	s, v, _, _ := d.snapshot()
	if s.State != pair.Cloning || v != nil && v.reports().Mode == control.ModeRecord {
		return 0
	}
	return clonePatience * d.a.cfg.Heartbeat.Timeout
}

// register waits for the heartbeats of the epoch before to end.
func (d *domain) register(ctx context.Context, epoch plugin.Epoch, addr netip.AddrPort, key []byte, flags func() detect.Flags) (*detect.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		p, err := d.a.detect.Register(d.id, epoch, addr, key, flags)
		if !errors.Is(err, detect.ErrRegistered) {
			return p, err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, err
		}
	}
}

func resolve(ctx context.Context, address string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(ips[0].Unmap(), uint16(n)), nil
}
