// SPDX-License-Identifier: Apache-2.0

// Package paxos keeps one value on several witnesses such that a majority of
// them is enough to read and to change it, and that no change is ever lost or
// made on top of a value that another change replaced.
//
// It is single-decree Paxos (Lamport, "Paxos Made Simple", 2001) in the form
// for registers that change (Rystsov, "CASPaxos: Replicated State Machines
// without logs", 2018): there is no leader and no log, and each change is one
// run of both phases. The package does no I/O and knows no clock; who uses it
// carries the messages and keeps acceptors on stable storage.
package paxos

import (
	"cmp"
	"fmt"
)

// Ballot orders the attempts of all proposers. The zero Ballot is before all.
type Ballot struct {
	Round uint64 `json:"round"`
	// Proposer tells attempts of one round apart. No two proposers that ever
	// live may share it.
	Proposer string `json:"proposer"`
}

// Compare gives -1, 0 or 1 as b comes before, is, or comes after o.
func (b Ballot) Compare(o Ballot) int {
	return cmp.Or(cmp.Compare(b.Round, o.Round), cmp.Compare(b.Proposer, o.Proposer))
}

func (b Ballot) String() string { return fmt.Sprintf("%d/%s", b.Round, b.Proposer) }

// Op is what a proposer asks of an acceptor.
type Op string

const (
	// OpRead asks what was accepted, and binds the acceptor to nothing.
	OpRead Op = "read"
	// OpPrepare asks what was accepted, and for the promise to accept nothing
	// below the ballot from now on (phase 1).
	OpPrepare Op = "prepare"
	// OpAccept asks to accept the value at the ballot (phase 2).
	OpAccept Op = "accept"
)

// Request is a proposer's message.
type Request struct {
	Op     Op     `json:"op"`
	Ballot Ballot `json:"ballot"`
	Value  []byte `json:"value,omitempty"`
}

// Reply is an acceptor's answer to a Request.
type Reply struct {
	// Op and Ballot are those of the request.
	Op     Op     `json:"op"`
	Ballot Ballot `json:"ballot"`
	// OK is false if a promise forbids what was asked.
	OK bool `json:"ok"`
	// Promised is the acceptor's highest promise.
	Promised Ballot `json:"promised"`
	// Accepted and Value are what was accepted last.
	Accepted Ballot `json:"accepted"`
	Value    []byte `json:"value,omitempty"`
}

// Acceptor is the state of one witness for one value. The zero Acceptor has
// promised and accepted nothing.
type Acceptor struct {
	Promised Ballot `json:"promised"`
	Accepted Ballot `json:"accepted"`
	Value    []byte `json:"value,omitempty"`
}

// Step answers r. If changed, next must be on stable storage before the reply
// leaves. Requests may come late, in any order and more than once.
//
// Invariant: Accepted never is above Promised, and neither ever falls.
func (a Acceptor) Step(r Request) (next Acceptor, reply Reply, changed bool) {
	next = a
	ok := r.Op == OpRead
	switch {
	case r.Op == OpPrepare && r.Ballot.Compare(a.Promised) >= 0:
		next.Promised, ok = r.Ballot, true
	case r.Op == OpAccept && r.Ballot.Compare(a.Promised) >= 0:
		next = Acceptor{Promised: r.Ballot, Accepted: r.Ballot, Value: r.Value}
		ok = true
	}
	return next, Reply{
		Op: r.Op, Ballot: r.Ballot, OK: ok,
		Promised: next.Promised, Accepted: next.Accepted, Value: next.Value,
	}, next.Promised != a.Promised || next.Accepted != a.Accepted
}
