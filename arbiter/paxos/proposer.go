// SPDX-License-Identifier: Apache-2.0

package paxos

// Change says what follows value, which is nil at first. Without write, value
// stays. It is called again for each attempt.
type Change func(value []byte) (next []byte, write bool)

// Outcome tells what became of a proposer's attempt.
type Outcome uint8

const (
	// Pending: replies are missing.
	Pending Outcome = iota
	// Send: broadcast the new Request.
	Send
	// Done: the value that Change was given last, and what it made of it, are
	// decided.
	Done
	// Outrun: another proposer is at work. Wait for a random time and Restart.
	Outrun
	// Unreachable: no majority of the acceptors answers. What was asked may
	// or may not come about.
	Unreachable
)

func (o Outcome) String() string {
	return [...]string{"pending", "send", "done", "outrun", "unreachable"}[o]
}

// Proposer carries one change through. It takes replies in any order, late and
// more than once.
type Proposer struct {
	id       string
	majority int
	size     int
	change   Change

	round uint64 // the highest that was seen
	req   Request
	// heard holds what each acceptor made of req.
	heard map[int]verdict
	// best is the highest accepted ballot of the replies to req, and value
	// what was accepted there.
	best  Ballot
	value []byte
	// agree counts the acceptors that accepted best last.
	agree int
	// concluded tells that more replies to req make no difference.
	concluded bool
}

// verdict is one acceptor's on a request.
type verdict uint8

const (
	granted verdict = iota
	refused
	failed
)

// NewProposer gives a proposer of change to size acceptors and its first
// request. The id must be used by no other proposer, not even an earlier one.
//
// The first request only reads. A majority that accepted the same ballot last
// proves that its value is decided and the newest: a later decision would have
// left its mark on one of them. That is all that a change without write needs.
func NewProposer(id string, size int, change Change) (*Proposer, Request) {
	p := &Proposer{id: id, size: size, majority: size/2 + 1, change: change}
	p.ask(Request{Op: OpRead})
	return p, p.req
}

// Restart begins another attempt, with a ballot above all that were seen.
func (p *Proposer) Restart() Request {
	p.round++
	p.ask(Request{Op: OpPrepare, Ballot: Ballot{Round: p.round, Proposer: p.id}})
	return p.req
}

func (p *Proposer) ask(r Request) {
	p.req = r
	p.heard = make(map[int]verdict)
	p.best, p.value, p.agree, p.concluded = Ballot{}, nil, 0, false
}

// Failed notes that acceptor from will not answer r.
func (p *Proposer) Failed(from int, r Request) (Outcome, Request) {
	return p.hear(from, r.Op, r.Ballot, failed)
}

// Step takes the reply of acceptor from, 0 to size-1.
func (p *Proposer) Step(from int, r Reply) (Outcome, Request) {
	p.round = max(p.round, r.Promised.Round)
	if r.Op != p.req.Op || r.Ballot != p.req.Ballot {
		return Pending, Request{}
	}
	if _, twice := p.heard[from]; twice {
		return Pending, Request{}
	}
	if !r.OK {
		return p.hear(from, r.Op, r.Ballot, refused)
	}
	if p.req.Op != OpAccept {
		switch r.Accepted.Compare(p.best) {
		case 1:
			p.best, p.value, p.agree = r.Accepted, r.Value, 1
		case 0:
			p.agree++
		}
	}
	return p.hear(from, r.Op, r.Ballot, granted)
}

// hear counts the verdict, and moves on when it is enough.
func (p *Proposer) hear(from int, op Op, b Ballot, v verdict) (Outcome, Request) {
	if op != p.req.Op || b != p.req.Ballot {
		return Pending, Request{}
	}
	if _, twice := p.heard[from]; twice || from < 0 || from >= p.size {
		return Pending, Request{}
	}
	if p.concluded {
		return Pending, Request{}
	}
	p.heard[from] = v
	switch {
	case p.count(granted) >= p.majority:
		return p.advance()
	case !p.lost():
		return Pending, Request{}
	}
	p.concluded = true
	if p.count(refused) > 0 {
		return Outrun, Request{}
	}
	return Unreachable, Request{}
}

// lost tells that a majority cannot grant the request any more.
func (p *Proposer) lost() bool { return p.size-p.count(refused)-p.count(failed) < p.majority }

func (p *Proposer) count(v verdict) int {
	n := 0
	for _, h := range p.heard {
		if h == v {
			n++
		}
	}
	return n
}

// advance goes on after a majority granted the request.
func (p *Proposer) advance() (Outcome, Request) {
	if p.req.Op == OpAccept {
		p.concluded = true
		return Done, Request{}
	}
	next, write := p.change(p.value)
	// What one acceptor alone accepted is not decided yet, and nobody may be
	// told of it before it is.
	decided := p.agree >= p.majority
	if !write && decided {
		p.concluded = true
		return Done, Request{}
	}
	if p.req.Op == OpRead {
		if missing := p.size - len(p.heard); !write && p.agree+missing >= p.majority {
			// One that lags answered early; another may settle it without
			// binding anybody.
			return Pending, Request{}
		}
		return Send, p.Restart()
	}
	if !write {
		next = p.value
	}
	p.ask(Request{Op: OpAccept, Ballot: p.req.Ballot, Value: next})
	return Send, p.req
}
