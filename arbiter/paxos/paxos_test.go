// SPDX-License-Identifier: Apache-2.0

package paxos_test

import (
	"testing"

	"ftvirt.org/ftvirt/arbiter/paxos"
)

func ballot(round uint64, proposer string) paxos.Ballot {
	return paxos.Ballot{Round: round, Proposer: proposer}
}

func TestAcceptor(t *testing.T) {
	var a paxos.Acceptor
	step := func(op paxos.Op, b paxos.Ballot, value string) paxos.Reply {
		t.Helper()
		next, reply, changed := a.Step(paxos.Request{Op: op, Ballot: b, Value: []byte(value)})
		if changed != (next.Promised != a.Promised || next.Accepted != a.Accepted) {
			t.Errorf("%s %v: changed is %v", op, b, changed)
		}
		if next.Accepted.Compare(next.Promised) > 0 || next.Promised.Compare(a.Promised) < 0 || next.Accepted.Compare(a.Accepted) < 0 {
			t.Errorf("%s %v: %+v after %+v", op, b, next, a)
		}
		a = next
		return reply
	}
	for i, c := range []struct {
		op       paxos.Op
		ballot   paxos.Ballot
		value    string
		ok       bool
		promised paxos.Ballot
		stored   string
	}{
		{paxos.OpRead, ballot(0, ""), "", true, ballot(0, ""), ""},
		{paxos.OpPrepare, ballot(2, "a"), "", true, ballot(2, "a"), ""},
		{paxos.OpPrepare, ballot(1, "z"), "", false, ballot(2, "a"), ""},
		{paxos.OpAccept, ballot(1, "z"), "old", false, ballot(2, "a"), ""},
		{paxos.OpAccept, ballot(2, "a"), "x", true, ballot(2, "a"), "x"},
		{paxos.OpPrepare, ballot(2, "b"), "", true, ballot(2, "b"), "x"},
		{paxos.OpAccept, ballot(2, "a"), "y", false, ballot(2, "b"), "x"},
		// A message that comes twice does no harm.
		{paxos.OpPrepare, ballot(2, "b"), "", true, ballot(2, "b"), "x"},
		// Acceptance does not need a promise of its own.
		{paxos.OpAccept, ballot(3, "a"), "z", true, ballot(3, "a"), "z"},
		{paxos.OpRead, ballot(0, ""), "", true, ballot(3, "a"), "z"},
		{"nonsense", ballot(9, "a"), "n", false, ballot(3, "a"), "z"},
	} {
		r := step(c.op, c.ballot, c.value)
		if r.OK != c.ok || r.Promised != c.promised || string(r.Value) != c.stored || r.Op != c.op || r.Ballot != c.ballot {
			t.Errorf("step %d: %+v, want ok %v, promised %v, value %q", i, r, c.ok, c.promised, c.stored)
		}
	}
}

// group is three acceptors of which some may be away.
type group struct {
	acceptors [3]paxos.Acceptor
	away      [3]bool
}

// run carries a change through, at most ten attempts, reaching the acceptors
// in the given order.
func (g *group) run(id string, change paxos.Change, order ...int) paxos.Outcome {
	p, req := paxos.NewProposer(id, len(g.acceptors), change)
	for range 10 {
		outcome := paxos.Send
		for outcome == paxos.Send {
			outcome = paxos.Pending
			next := req
			for _, i := range order {
				var o paxos.Outcome
				var r paxos.Request
				if g.away[i] {
					o, r = p.Failed(i, req)
				} else {
					var reply paxos.Reply
					g.acceptors[i], reply, _ = g.acceptors[i].Step(req)
					o, r = p.Step(i, reply)
				}
				if o != paxos.Pending {
					outcome, next = o, r
				}
			}
			req = next
		}
		if outcome != paxos.Outrun {
			return outcome
		}
		req = p.Restart()
	}
	return paxos.Outrun
}

// once writes value if there is none, the test-and-set; it tells what is there.
func once(value string, got *string) paxos.Change {
	return func(old []byte) ([]byte, bool) {
		if old != nil {
			*got = string(old)
			return nil, false
		}
		*got = value
		return []byte(value), true
	}
}

// TestSplitVote: each of two proposers won over one acceptor, and the third is
// away. The vote must neither hang nor be decided twice.
func TestSplitVote(t *testing.T) {
	var g group
	g.away[2] = true
	// What proposers that died between two messages leave behind.
	for i, v := range []string{"a", "b"} {
		b := ballot(uint64(i+1), v)
		g.acceptors[i] = paxos.Acceptor{Promised: b, Accepted: b, Value: []byte(v)}
	}
	var first, second string
	if o := g.run("c", once("c", &first), 0, 1, 2); o != paxos.Done {
		t.Fatalf("first: %v", o)
	}
	// The higher of the two may have been decided with the third's vote.
	if first != "b" {
		t.Errorf("%q is decided, want b", first)
	}
	g.away = [3]bool{true, false, false}
	if o := g.run("d", once("d", &second), 2, 1, 0); o != paxos.Done || second != first {
		t.Errorf("%v with %q after %q", o, second, first)
	}
}

// TestLoneAcceptance: what a single acceptor accepted is told to nobody before
// a majority has it.
func TestLoneAcceptance(t *testing.T) {
	var g group
	b := ballot(1, "a")
	g.acceptors[0] = paxos.Acceptor{Promised: b, Accepted: b, Value: []byte("a")}
	var got string
	if o := g.run("r", once("r", &got), 0, 1, 2); o != paxos.Done || got != "a" {
		t.Fatalf("%v with %q", o, got)
	}
	held := 0
	for _, a := range g.acceptors {
		if string(a.Value) == "a" {
			held++
		}
	}
	if held < 2 {
		t.Errorf("%d acceptors hold what was reported", held)
	}
}

func TestUnreachable(t *testing.T) {
	var g group
	g.away = [3]bool{true, false, true}
	var got string
	if o := g.run("a", once("a", &got), 0, 1, 2); o != paxos.Unreachable {
		t.Errorf("%v with one of three", o)
	}
	if g.acceptors[1].Accepted != (paxos.Ballot{}) {
		t.Errorf("a minority was made to accept: %+v", g.acceptors[1])
	}
}

// TestLaggard: one acceptor that missed the last decision and answers first
// does not make a reader write.
func TestLaggard(t *testing.T) {
	var g group
	b := ballot(7, "a")
	for i := range 2 {
		g.acceptors[i] = paxos.Acceptor{Promised: b, Accepted: b, Value: []byte("a")}
	}
	before := g.acceptors
	var got string
	if o := g.run("r", once("r", &got), 2, 1, 0); o != paxos.Done || got != "a" {
		t.Fatalf("%v with %q", o, got)
	}
	for i, a := range g.acceptors {
		if a.Promised != before[i].Promised {
			t.Errorf("reader bound acceptor %d to %v", i, a.Promised)
		}
	}
	// Without the third, the two must be brought together.
	g.away[1] = true
	if o := g.run("s", once("s", &got), 2, 1, 0); o != paxos.Done || got != "a" || string(g.acceptors[2].Value) != "a" {
		t.Fatalf("%v with %q, the laggard has %q", o, got, g.acceptors[2].Value)
	}
}
