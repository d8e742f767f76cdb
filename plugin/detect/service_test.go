// SPDX-License-Identifier: Apache-2.0

package detect

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// network carries datagrams between services in memory, so that tests can run
// on synctest's clock.
type network struct {
	mu    sync.Mutex
	ports map[netip.AddrPort]*port
	// drop tells which datagrams get lost; nil loses none.
	drop func(from, to netip.AddrPort) bool
}

type port struct {
	net    *network
	addr   netip.AddrPort
	in     chan []byte
	closed chan struct{}
	once   sync.Once
}

func (n *network) listen(addr string) *port {
	p := &port{net: n, addr: netip.MustParseAddrPort(addr), in: make(chan []byte, 100), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ports[p.addr] = p
	return p
}

func (n *network) setDrop(drop func(from, to netip.AddrPort) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drop = drop
}

func (p *port) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	select {
	case d := <-p.in:
		return copy(b, d), netip.AddrPort{}, nil
	case <-p.closed:
		return 0, netip.AddrPort{}, net.ErrClosed
	}
}

func (p *port) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	if dst := p.net.ports[to]; dst != nil && (p.net.drop == nil || !p.net.drop(p.addr, to)) {
		select {
		case dst.in <- bytes.Clone(b):
		default: // A full socket loses datagrams.
		}
	}
	return len(b), nil
}

func (p *port) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(p.addr) }

func (p *port) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// side is one agent of a test.
type side struct {
	*Service
	peer  *Peer
	flags atomic.Uint32
	told  []error // of what was refused
}

func (s *side) localFlags() Flags { return Flags(s.flags.Load()) }

// couple makes two services that watch each other, and runs them.
func couple(t *testing.T, ca, cb conn) (a, b *side, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	a, b = &side{Service: newService(ca, DefaultConfig())}, &side{Service: newService(cb, DefaultConfig())}
	for _, s := range []struct{ me, other *side }{{a, b}, {b, a}} {
		s.me.flags.Store(uint32(QEMUAlive))
		s.me.Refused = func(_ netip.Addr, err error) { s.me.told = append(s.me.told, err) }
		var err error
		if s.me.peer, err = s.me.Register(testDomain, 1, s.other.Addr(), testKey, s.me.localFlags); err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			if err := s.me.Run(ctx); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	return a, b, func() {
		cancel()
		running.Wait()
	}
}

func inMemory(t *testing.T) (n *network, a, b *side, stop func()) {
	t.Helper()
	n = &network{ports: make(map[netip.AddrPort]*port)}
	a, b, stop = couple(t, n.listen("10.0.0.1:7410"), n.listen("10.0.0.2:7410"))
	return n, a, b, stop
}

// after waits on the test's clock until done, and says how long it took.
func (s *side) after(t *testing.T, limit time.Duration, done func(State) bool) time.Duration {
	t.Helper()
	start := time.Now()
	timeout := time.After(limit)
	for {
		changed := s.peer.Changed()
		if state := s.peer.State(); done(state) {
			return time.Since(start)
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("still %+v after %v", s.peer.State(), limit)
		}
	}
}

func is(l Liveness) func(State) bool { return func(s State) bool { return s.Liveness == l } }

func TestPeerDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b, stop := inMemory(t)
		defer stop()
		a.after(t, 100*ms, is(Alive))
		b.after(t, 100*ms, is(Alive))
		<-time.After(time.Minute)
		if got := a.peer.State(); got.Liveness != Alive || got.Flags != QEMUAlive || !got.Heard || got.Silence > 100*ms || got.Lateness != 0 {
			t.Fatalf("after a quiet minute: %+v", got)
		}
		n.setDrop(func(netip.AddrPort, netip.AddrPort) bool { return true })
		for _, s := range []*side{a, b} {
			if took := s.after(t, time.Second, is(Dead)); s == a && took < 450*ms || took > 600*ms {
				t.Errorf("dead after %v", took)
			}
		}
		n.setDrop(nil)
		a.after(t, 100*ms, is(Alive))
	})
}

func TestOneWayLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b, stop := inMemory(t)
		defer stop()
		a.after(t, 100*ms, is(Alive))
		b.after(t, 100*ms, is(Alive))
		n.setDrop(func(from, _ netip.AddrPort) bool { return from == a.Addr() })
		b.after(t, time.Second, is(Dead))
		if got := a.peer.State().Liveness; got != Alive {
			t.Errorf("a hears b and thinks it %v", got)
		}
	})
}

// TestLogKeepsAlive: heartbeats can be lost for as long as the log flows.
func TestLogKeepsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, _, stop := inMemory(t)
		defer stop()
		a.after(t, 100*ms, is(Alive))
		n.setDrop(func(netip.AddrPort, netip.AddrPort) bool { return true })
		for range 100 {
			<-time.After(150 * ms)
			a.peer.Progress()
			if got := a.peer.State().Liveness; got != Alive {
				t.Fatalf("%v while acks come", got)
			}
		}
		a.after(t, time.Second, is(Dead))
	})
}

// TestManyLost: two of three datagrams lost raise no suspicion.
func TestManyLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, _, stop := inMemory(t)
		defer stop()
		count := 0
		n.setDrop(func(_, to netip.AddrPort) bool {
			if to != a.Addr() {
				return false
			}
			count++
			return count%3 != 0
		})
		a.after(t, time.Second, is(Alive))
		for range 200 {
			<-time.After(50 * ms)
			if got := a.peer.State().Liveness; got != Alive {
				t.Fatalf("%v with every third heartbeat heard", got)
			}
		}
	})
}

func TestFlagsArriveAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b, stop := inMemory(t)
		defer stop()
		a.after(t, 100*ms, is(Alive))
		<-time.After(10 * ms)
		b.flags.Store(uint32(Stopping))
		b.peer.Beat()
		if took := a.after(t, time.Second, func(s State) bool { return s.Flags == Stopping }); took > ms {
			t.Errorf("the flags took %v", took)
		}
	})
}

func (p *Peer) nextSequence() uint64 {
	p.sendMu.Lock()
	defer p.sendMu.Unlock()
	return p.sequence
}

func (p *Peer) highestSeen() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.highest
}

// TestRefused: what is not from the peer does not count.
func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b, stop := inMemory(t)
		defer stop()
		a.after(t, 100*ms, is(Alive))
		n.setDrop(func(netip.AddrPort, netip.AddrPort) bool { return true })
		a.after(t, time.Second, is(Dead))

		inject := func(d []byte) Stats {
			before := a.Stats()
			a.told = nil
			n.ports[a.Addr()].in <- d
			synctest.Wait()
			after := a.Stats()
			return Stats{
				Received: after.Received - before.Received, Garbage: after.Garbage - before.Garbage,
				Unknown: after.Unknown - before.Unknown, Forged: after.Forged - before.Forged, Replayed: after.Replayed - before.Replayed,
			}
		}
		sign := func(key []byte, d Datagram) []byte { return newSigner(key).sign(nil, d) }
		next := Datagram{Domain: testDomain, Epoch: 1, Sender: b.peer.id, Sequence: b.peer.nextSequence() + 1000}
		otherDomain, otherEpoch, ours, old := next, next, next, next
		otherDomain.Domain[3]++
		otherEpoch.Epoch++
		ours.Sender = a.peer.id
		old.Sequence = a.peer.highestSeen()
		for _, c := range []struct {
			name string
			b    []byte
			want Stats
			told []error
		}{
			{"garbage", []byte("GET / HTTP/1.1"), Stats{Garbage: 1}, nil},
			{"empty", nil, Stats{Garbage: 1}, nil},
			{"long", append(sign(testKey, next), 0), Stats{Garbage: 1}, nil},
			{"other domain", sign(testKey, otherDomain), Stats{Unknown: 1}, nil},
			{"other epoch", sign(testKey, otherEpoch), Stats{Unknown: 1}, nil},
			{"other key", sign(bytes.ToUpper(testKey), next), Stats{Forged: 1}, []error{ErrForged}},
			{"our own", sign(testKey, ours), Stats{Replayed: 1}, []error{ErrReplayed}},
			{"seen before", sign(testKey, old), Stats{Replayed: 1}, []error{ErrReplayed}},
		} {
			if got := inject(c.b); got != c.want {
				t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
			}
			if !slices.Equal(a.told, c.told) {
				t.Errorf("%s: told of %v, want %v", c.name, a.told, c.told)
			}
			if got := a.peer.State().Liveness; got != Dead {
				t.Fatalf("%s makes the peer %v", c.name, got)
			}
		}
		if got := inject(sign(testKey, next)); got != (Stats{Received: 1}) || a.peer.State().Liveness != Alive {
			t.Errorf("the real one: %+v, %+v", got, a.peer.State())
		}
		// One that was overtaken is a sign of life, but its flags are old.
		next.Sequence--
		next.Flags = PoweredOff
		if got := inject(sign(testKey, next)); got != (Stats{Received: 1}) || a.peer.State().Flags != 0 {
			t.Errorf("an overtaken one: %+v, %+v", got, a.peer.State())
		}
	})
}

// TestRestart: an agent that registers the pair again, with the same key, is
// understood by a peer that did not.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b, stop := inMemory(t)
		defer stop()
		a.after(t, 100*ms, is(Alive))
		b.peer.Close()
		a.after(t, time.Second, is(Dead))
		if _, err := b.Register(testDomain, 1, a.Addr(), testKey, b.localFlags); err != nil {
			t.Fatal(err)
		}
		a.after(t, 100*ms, is(Alive))
	})
}

func TestRegisterRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b, stop := inMemory(t)
		defer stop()
		flags := a.localFlags
		if _, err := a.Register(testDomain, 2, b.Addr(), testKey, flags); !errors.Is(err, ErrRegistered) {
			t.Errorf("twice: %v", err)
		}
		other := plugin.UUID{2}
		if _, err := a.Register(other, 1, b.Addr(), testKey[:MinKey-1], flags); !errors.Is(err, ErrKey) {
			t.Errorf("short key: %v", err)
		}
		if _, err := a.Register(other, 1, netip.AddrPort{}, testKey, flags); !errors.Is(err, ErrConfig) {
			t.Errorf("no address: %v", err)
		}
		if _, err := a.Register(other, 1, b.Addr(), testKey, nil); !errors.Is(err, ErrConfig) {
			t.Errorf("no flags: %v", err)
		}
		a.peer.Close()
		a.peer.Close()
		if _, err := a.Register(testDomain, 2, b.Addr(), testKey, flags); err != nil {
			t.Errorf("after Close: %v", err)
		}
		stop()
		if _, err := a.Register(other, 1, b.Addr(), testKey, flags); !errors.Is(err, ErrClosed) {
			t.Errorf("after the end: %v", err)
		}
	})
}

// TestGarbageIsCheap: a flood must not become work for the collector.
func TestGarbageIsCheap(t *testing.T) {
	s := newService((&network{ports: make(map[netip.AddrPort]*port)}).listen("10.0.0.1:1"), DefaultConfig())
	p, err := s.Register(testDomain, 1, s.Addr(), testKey, func() Flags { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	forged := newSigner(bytes.ToUpper(testKey)).sign(nil, Datagram{Domain: testDomain, Epoch: 1, Sequence: 1})
	reserved := bytes.Clone(forged)
	reserved[6] = 1
	for name, b := range map[string][]byte{"garbage": []byte("x"), "forged": forged, "reserved": reserved, "zeroes": make([]byte, Size)} {
		if n := testing.AllocsPerRun(100, func() { s.receive(b, netip.Addr{}) }); n > 0 {
			t.Errorf("%s costs %v allocations", name, n)
		}
	}
}

// TestLoopback runs the service on real sockets.
func TestLoopback(t *testing.T) {
	listen := func() conn {
		s, err := Listen("127.0.0.1:0", DefaultConfig())
		if err != nil {
			t.Fatal(err)
		}
		return s.conn
	}
	a, b, stop := couple(t, listen(), listen())
	const limit = 20 * time.Second // for a machine that is busy with other things
	a.after(t, limit, is(Alive))
	b.after(t, limit, is(Alive))
	b.flags.Store(uint32(PoweredOff))
	b.peer.Beat()
	a.after(t, limit, func(s State) bool { return s.Flags == PoweredOff })
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	a.after(t, limit, is(Dead))
	stop()
	if s := a.Stats(); s.Sent == 0 || s.Received == 0 || s.Garbage+s.Forged+s.Replayed > 0 {
		t.Errorf("%+v", s)
	}
}

func TestListenRefuses(t *testing.T) {
	if _, err := Listen("not an address", DefaultConfig()); err == nil {
		t.Error("a bad address is accepted")
	}
	if _, err := Listen("127.0.0.1:0", Config{}); !errors.Is(err, ErrConfig) {
		t.Errorf("no configuration: %v", err)
	}
	s, err := Listen("127.0.0.1:0", DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := Listen(s.Addr().String(), DefaultConfig()); err == nil {
		t.Error("the same address can be used twice")
	}
}
