// SPDX-License-Identifier: Apache-2.0

package paxos_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/arbiter/paxos"
)

// model is a network of proposers and acceptors in which everything that may
// go wrong does, drawn from one seed. The value is a list of the operations
// that were made on it, so that it tells their order.
type model struct {
	rng       *rand.Rand
	acceptors []paxos.Acceptor
	// amnesia lets acceptors forget when they crash, which breaks all.
	amnesia bool
	flights []flight
	clients []*client
	// finished are the operations that ended, in that order.
	finished []operation
	started  int
}

// flight is a message under way, to an acceptor or back.
type flight struct {
	client, acceptor int
	// op tells messages of the client's earlier operations apart, as a
	// connection of its own would.
	op    int
	reply bool
	req   paxos.Request
	rep   paxos.Reply
	lost  bool // the sender is told that the message failed
}

// client does one operation after the other. Some only read.
type client struct {
	p     *paxos.Proposer
	id    string
	op    int
	began int // how many operations had finished before this one
	seen  string
	reads bool
	idle  bool
	wait  bool // outrun, to start again
}

// operation is one that ended, and the list as it left it.
type operation struct {
	id    string
	reads bool
	began int
	list  string
}

func newModel(seed uint64, acceptors, clients int, amnesia bool) *model {
	m := &model{rng: rand.New(rand.NewPCG(seed, 1)), acceptors: make([]paxos.Acceptor, acceptors), amnesia: amnesia}
	for range clients {
		m.clients = append(m.clients, &client{idle: true})
	}
	return m
}

func (m *model) begin(i int) {
	c := m.clients[i]
	m.started++
	c.op++
	c.id = fmt.Sprintf("%d.%d", i, c.op)
	c.began, c.idle, c.wait, c.reads = len(m.finished), false, false, m.rng.IntN(3) == 0
	var req paxos.Request
	c.p, req = paxos.NewProposer(c.id, len(m.acceptors), func(old []byte) ([]byte, bool) {
		c.seen = string(old)
		if c.reads || slices.Contains(strings.Fields(c.seen), c.id) {
			return nil, false
		}
		c.seen += c.id + " "
		return []byte(c.seen), true
	})
	m.broadcast(i, req)
}

func (m *model) broadcast(client int, req paxos.Request) {
	for a := range m.acceptors {
		m.send(flight{client: client, acceptor: a, op: m.clients[client].op, req: req})
	}
}

// send puts a message on its way, perhaps twice, perhaps to be lost.
func (m *model) send(f flight) {
	if m.rng.IntN(10) == 0 {
		m.flights = append(m.flights, f)
	}
	f.lost = m.rng.IntN(8) == 0
	m.flights = append(m.flights, f)
}

// step lets one thing happen.
func (m *model) step() {
	switch n := m.rng.IntN(20); {
	case n == 0:
		// A client dies and is started again; what it sent stays under way.
		m.clients[m.rng.IntN(len(m.clients))].idle = true
	case n == 1 && m.amnesia:
		m.acceptors[m.rng.IntN(len(m.acceptors))] = paxos.Acceptor{}
	case n < 5:
		i := m.rng.IntN(len(m.clients))
		switch c := m.clients[i]; {
		case c.idle:
			m.begin(i)
		case c.wait:
			c.wait = false
			m.broadcast(i, c.p.Restart())
		}
	case len(m.flights) > 0:
		i := m.rng.IntN(len(m.flights))
		f := m.flights[i]
		m.flights = slices.Delete(m.flights, i, i+1)
		m.deliver(f)
	}
}

func (m *model) deliver(f flight) {
	c := m.clients[f.client]
	if !f.reply && !f.lost {
		var rep paxos.Reply
		m.acceptors[f.acceptor], rep, _ = m.acceptors[f.acceptor].Step(f.req)
		m.send(flight{client: f.client, acceptor: f.acceptor, op: f.op, reply: true, req: f.req, rep: rep})
		return
	}
	if c.op != f.op || c.idle {
		return
	}
	var outcome paxos.Outcome
	var req paxos.Request
	if f.lost {
		outcome, req = c.p.Failed(f.acceptor, f.req)
	} else {
		outcome, req = c.p.Step(f.acceptor, f.rep)
	}
	switch outcome {
	case paxos.Send:
		m.broadcast(f.client, req)
	case paxos.Done:
		c.idle = true
		m.finished = append(m.finished, operation{id: c.id, reads: c.reads, began: c.began, list: c.seen})
	case paxos.Outrun:
		c.wait = true
	case paxos.Unreachable:
		c.idle = true
	}
}

// verify checks that the operations happened one after the other, each between
// its beginning and its end.
func (m *model) verify() error {
	var longest string
	for i, o := range m.finished {
		if !o.reads && !slices.Contains(strings.Fields(o.list), o.id) {
			return fmt.Errorf("operation %s is done, but not part of %q", o.id, o.list)
		}
		// One order of all: of two lists, one begins with the other.
		if !strings.HasPrefix(longest, o.list) && !strings.HasPrefix(o.list, longest) {
			return fmt.Errorf("operation %d has %q, another has %q", i, o.list, longest)
		}
		if len(o.list) > len(longest) {
			longest = o.list
		}
		// What was done before it began, it saw.
		for _, earlier := range m.finished[:o.began] {
			if !strings.HasPrefix(o.list, earlier.list) {
				return fmt.Errorf("operation %s began after %s ended with %q, and has %q", o.id, earlier.id, earlier.list, o.list)
			}
		}
		if fields := strings.Fields(o.list); len(slices.Compact(slices.Sorted(slices.Values(fields)))) != len(fields) {
			return fmt.Errorf("an operation was made twice: %q", o.list)
		}
	}
	return nil
}

var errIdle = errors.New("nothing was done")

func (m *model) run(steps int) error {
	for range steps {
		m.step()
	}
	if len(m.finished) == 0 {
		return errIdle
	}
	return m.verify()
}

// TestModel runs random histories of changes that race over a bad network.
func TestModel(t *testing.T) {
	done, began := 0, 0
	for seed := range uint64(400) {
		for _, size := range []int{3, 5} {
			m := newModel(seed, size, 4, false)
			if err := m.run(1500); err != nil {
				t.Fatalf("seed %d with %d acceptors: %v", seed, size, err)
			}
			done += len(m.finished)
			began += m.started
		}
	}
	t.Logf("%d operations began, %d were carried through", began, done)
}

// TestModelBites: the model notices acceptors that do not keep their word.
func TestModelBites(t *testing.T) {
	for seed := range uint64(200) {
		if err := newModel(seed, 3, 4, true).run(1500); err != nil && !errors.Is(err, errIdle) {
			return
		}
	}
	t.Error("acceptors that forget make no difference")
}

// TestModelEnds: once the network behaves and nobody interferes, a change
// comes through whatever was left behind.
func TestModelEnds(t *testing.T) {
	for seed := range uint64(200) {
		m := newModel(seed, 3, 4, false)
		if err := m.run(int(seed) * 5); err != nil && !errors.Is(err, errIdle) {
			t.Fatal(err)
		}
		g := group{acceptors: [3]paxos.Acceptor(m.acceptors)}
		g.away[seed%3] = true
		change := func(old []byte) ([]byte, bool) {
			if bytes.Contains(old, []byte("last")) {
				return nil, false
			}
			return append(slices.Clone(old), "last"...), true
		}
		if o := g.run("last", change, 0, 1, 2); o != paxos.Done {
			t.Fatalf("seed %d: %v", seed, o)
		}
	}
}
