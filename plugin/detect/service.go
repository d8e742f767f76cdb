// SPDX-License-Identifier: Apache-2.0

package detect

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

var (
	// ErrRegistered: the service watches this domain already.
	ErrRegistered = errors.New("domain is being watched already")
	// ErrKey: the pair's key is too short.
	ErrKey = errors.New("heartbeat key is too short")
	// ErrClosed: the service has ended.
	ErrClosed = errors.New("heartbeat service is closed")
)

// conn is what the service needs of its socket.
type conn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	LocalAddr() net.Addr
	Close() error
}

// Service sends and receives the heartbeats of all pairs of one agent through
// one UDP socket. Heartbeats wait for nothing: neither for data nor for disks.
type Service struct {
	// Refused, if set before Run, is told of each heartbeat of a pair that is
	// ErrForged or ErrReplayed. It must not block.
	Refused func(from netip.Addr, err error)

	cfg  Config
	conn conn

	mu     sync.Mutex
	peers  map[plugin.UUID]*Peer
	closed bool

	stats struct{ sent, sendErrors, received, garbage, unknown, forged, replayed atomic.Uint64 }
}

// Stats counts datagrams since the service began.
type Stats struct {
	Sent, SendErrors uint64
	// Received are those that counted.
	Received uint64
	// Garbage is what is not a heartbeat, Unknown is of no pair or of another
	// epoch of one, Forged has the wrong key, Replayed came before.
	Garbage, Unknown, Forged, Replayed uint64
}

// Listen opens the socket at addr, such as "10.0.0.1:7410" or ":7410". Run
// must be called for anything to happen.
func Listen(addr string, cfg Config) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	local, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, fmt.Errorf("heartbeat address %q: %w", addr, err)
	}
	c, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, fmt.Errorf("listening for heartbeats: %w", err)
	}
	return newService(c, cfg), nil
}

func newService(c conn, cfg Config) *Service {
	return &Service{cfg: cfg, conn: c, peers: make(map[plugin.UUID]*Peer)}
}

// Addr is the address of the socket.
func (s *Service) Addr() netip.AddrPort {
	if a, ok := s.conn.LocalAddr().(*net.UDPAddr); ok {
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// Stats gives the counters.
func (s *Service) Stats() Stats {
	c := &s.stats
	return Stats{
		Sent: c.sent.Load(), SendErrors: c.sendErrors.Load(), Received: c.received.Load(), Garbage: c.garbage.Load(),
		Unknown: c.unknown.Load(), Forged: c.forged.Load(), Replayed: c.replayed.Load(),
	}
}

// Run sends and receives until ctx ends, then closes the socket and returns
// nil. It returns an error only if the socket fails for good.
func (s *Service) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Closing the socket is what ends a read that waits.
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()

	var reading sync.WaitGroup
	var readErr error
	reading.Go(func() {
		defer cancel()
		readErr = s.read(ctx)
	})
	s.beat(ctx)
	reading.Wait()
	return readErr
}

// Close ends a service whose Run was not called, or will not return by itself.
func (s *Service) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	if err := s.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("closing heartbeat socket: %w", err)
	}
	return nil
}

// beat ticks all monitors and sends all heartbeats each interval.
func (s *Service) beat(ctx context.Context) {
	ticker := time.NewTicker(s.cfg.Interval)
	defer ticker.Stop()
	var peers []*Peer
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			// The time in the channel is when the tick was due. When this
			// goroutine came to run is what tells a starved agent.
			now := time.Now()
			peers = peers[:0]
			s.mu.Lock()
			for _, p := range s.peers {
				peers = append(peers, p)
			}
			s.mu.Unlock()
			for _, p := range peers {
				p.tick(now)
				p.Beat()
			}
		}
	}
}

func (s *Service) read(ctx context.Context) error {
	// One byte more than a datagram has, to tell a longer one.
	buf := make([]byte, Size+1)
	failures := 0
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(buf)
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			// ICMP errors of what was sent turn up here; they pass.
			if failures++; failures > 100 {
				return fmt.Errorf("receiving heartbeats: %w", err)
			}
			continue
		}
		failures = 0
		s.receive(buf[:n], from.Addr().Unmap())
	}
}

// receive takes in one datagram. Whatever it is, the work is bounded: one look
// at its head, one at the table of pairs and at most one hash, no allocation
// for garbage and no line in a log.
func (s *Service) receive(b []byte, from netip.Addr) {
	d, err := Decode(b)
	if err != nil {
		s.stats.garbage.Add(1)
		return
	}
	s.mu.Lock()
	p := s.peers[d.Domain]
	s.mu.Unlock()
	if p == nil || p.epoch != d.Epoch {
		s.stats.unknown.Add(1)
		return
	}
	err = p.receive(b, d)
	switch {
	case err == nil:
		s.stats.received.Add(1)
		return
	case errors.Is(err, ErrForged):
		s.stats.forged.Add(1)
	default:
		s.stats.replayed.Add(1)
	}
	if s.Refused != nil {
		s.Refused(from, err)
	}
}

// State is what is known of a peer.
type State struct {
	Liveness Liveness
	// Silence is how long nothing was heard, as far as this side was awake.
	Silence time.Duration
	// Flags are those of the newest heartbeat; 0 before the first.
	Flags Flags
	// Heard tells that a heartbeat came at all, so that Flags mean something.
	Heard bool
	// Lateness is by how much this side's own ticks were late, in all.
	Lateness time.Duration
}

// Peer is the other host of one pair, as heartbeats show it.
type Peer struct {
	service *Service
	domain  plugin.UUID
	epoch   plugin.Epoch
	addr    netip.AddrPort
	flags   func() Flags
	id      uint64

	sendMu   sync.Mutex
	out      *signer
	sequence uint64
	buf      []byte

	mu      sync.Mutex
	in      *signer
	seen    window
	monitor *Monitor
	last    Flags
	newest  uint64 // the sequence number that last came with
	heard   bool
	changed chan struct{}
}

// Register begins to watch the peer of one domain, and to send it heartbeats.
// The key is the pair's own, agreed over the channel for this epoch. localFlags
// is called for each heartbeat and must not block. A domain can be watched in
// one epoch at a time.
func (s *Service) Register(domain plugin.UUID, epoch plugin.Epoch, peer netip.AddrPort, key []byte, localFlags func() Flags) (*Peer, error) {
	if len(key) < MinKey {
		return nil, fmt.Errorf("%w: %d bytes, at least %d are needed", ErrKey, len(key), MinKey)
	}
	if !peer.IsValid() || peer.Port() == 0 {
		return nil, fmt.Errorf("%w: peer address %q of domain %s", ErrConfig, peer, domain)
	}
	if localFlags == nil {
		return nil, fmt.Errorf("%w: no source of flags for domain %s", ErrConfig, domain)
	}
	now := time.Now()
	monitor, err := NewMonitor(s.cfg, now)
	if err != nil {
		return nil, err
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // It never fails.
	p := &Peer{
		service: s, domain: domain, epoch: epoch, addr: peer, flags: localFlags,
		id: binary.BigEndian.Uint64(id[:]), out: newSigner(key), in: newSigner(key),
		// An agent that restarts within an epoch must go on above what it
		// sent before, and has nothing but the clock to know it by.
		sequence: uint64(max(now.UnixMicro(), 0)),
		monitor:  monitor, buf: make([]byte, 0, Size), changed: make(chan struct{}),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	if other := s.peers[domain]; other != nil {
		return nil, fmt.Errorf("%w: %s in epoch %d", ErrRegistered, domain, other.epoch)
	}
	s.peers[domain] = p
	return p, nil
}

// Close ends the watch. The peer's state stays what it was.
func (p *Peer) Close() {
	p.service.mu.Lock()
	defer p.service.mu.Unlock()
	if p.service.peers[p.domain] == p {
		delete(p.service.peers, p.domain)
	}
}

// Beat sends a heartbeat at once, for flags that changed: a dead QEMU should
// not wait for the next interval. Errors are counted, not returned, since the
// next heartbeat follows anyhow.
func (p *Peer) Beat() {
	flags := p.flags()
	p.sendMu.Lock()
	defer p.sendMu.Unlock()
	p.sequence++
	p.buf = p.out.sign(p.buf[:0], Datagram{
		Flags: flags, Domain: p.domain, Epoch: p.epoch, Sender: p.id, Sequence: p.sequence,
	})
	if _, err := p.service.conn.WriteToUDPAddrPort(p.buf, p.addr); err != nil {
		p.service.stats.sendErrors.Add(1)
		return
	}
	p.service.stats.sent.Add(1)
}

// Progress notes that log data, or an ack, came from the peer by the channel.
func (p *Peer) Progress() {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.monitor.Liveness()
	p.monitor.Progress(time.Now())
	p.changedIf(before != p.monitor.Liveness())
}

// State is what is known of the peer now.
func (p *Peer) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	return State{
		Liveness: p.monitor.Liveness(), Silence: p.monitor.Silence(), Flags: p.last, Heard: p.heard,
		Lateness: p.monitor.Lateness(),
	}
}

// Changed gives a channel that is closed when Liveness, Flags or Heard change
// next. Get it before State, and get a new one after each change.
func (p *Peer) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

func (p *Peer) tick(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.monitor.Liveness()
	p.changedIf(p.monitor.Tick(now) != before)
}

func (p *Peer) receive(b []byte, d Datagram) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.in.authentic(b):
		return ErrForged
	case d.Sender == p.id:
		// Both directions share a key. Our own words, sent back, must not
		// make a dead peer look alive.
		return ErrReplayed
	case !p.seen.accept(d.Sequence):
		return ErrReplayed
	}
	before, flags, heard := p.monitor.Liveness(), p.last, p.heard
	p.monitor.Heartbeat(time.Now())
	p.heard = true
	// One that was overtaken tells of life, but not of how things are now.
	if d.Sequence > p.newest {
		p.newest, p.last = d.Sequence, d.Flags
	}
	p.changedIf(before != p.monitor.Liveness() || flags != p.last || !heard)
	return nil
}

// changedIf wakes those who wait for a change. p.mu is held.
func (p *Peer) changedIf(changed bool) {
	if changed {
		close(p.changed)
		p.changed = make(chan struct{})
	}
}
