// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/pair"
)

// errLeavingHost is the answer to whoever wants a pair on a host that was handed over.
var errLeavingHost = errors.New("the host was handed over with 'ftvirt handover', or is being shut down, and takes no part in a pair until its agent is restarted")

// HandoverReply tells how far a handover is.
type HandoverReply struct {
	Domains []HandoverDomain `json:"domains"`
}

// HandoverDomain is one domain that was part of a pair on this host, or runs here
// without a backup.
type HandoverDomain struct {
	Domain string      `json:"domain"`
	UUID   plugin.UUID `json:"uuid"`
	// Open: it may yet be handed over; ask again.
	Open bool `json:"open"`
	// Stays: it runs here and ends with the host.
	Stays bool `json:"stays"`
	// Text says what became of it, or what is waited for.
	Text string `json:"text"`
}

// Handover begins to clear this host of pairs, before it is shut down: each
// domain that runs here goes over to its backup, and each backup here is given up,
// so that its primary need not find out. It tells how far that is and is to be
// called until nothing is open. From then on the host takes no part in new pairs.
func (a *Agent) Handover(ctx context.Context) HandoverReply {
	a.leaving.Store(true)
	reply := HandoverReply{Domains: []HandoverDomain{}}
	for _, d := range a.known() {
		if h, ok := d.handOver(ctx); ok {
			h.Domain, h.UUID = d.label(), d.id
			reply.Domains = append(reply.Domains, h)
		}
	}
	return reply
}

// handOver takes the next step with a domain. It is false for one that has
// nothing to do with this host.
func (d *domain) handOver(ctx context.Context) (HandoverDomain, bool) {
	s, v, p, b := d.snapshot()
	open := func(format string, args ...any) (HandoverDomain, bool) {
		return HandoverDomain{Open: true, Stays: v != nil && p != nil, Text: fmt.Sprintf(format, args...)}, true
	}
	switch {
	case b != nil && s.Epoch == b.epoch && (s.State == pair.Cloning || s.State == pair.Protected):
		d.post(pair.Event{Kind: pair.EventDiscard, Epoch: s.Epoch, Reason: pair.HostStopping})
		return open("its backup here is being given up")
	case s.Removing:
		return open("its copy here is being ended")
	case b != nil && s.Epoch == b.epoch && s.State == pair.Unprotected && s.Reason == pair.HostStopping:
		return HandoverDomain{Text: "goes on without its backup here, on " + s.Peer}, true
	case p != nil && s.Epoch == p.epoch && s.State == pair.Failed && s.Reason == pair.UserRequest:
		return d.handedOver(ctx, s)
	case s.State == pair.Protected && p != nil && (s.Reason != pair.ReasonNone || p.session() == nil):
		return open("its backup on %s may not be well: %s", s.Peer, s)
	case s.State == pair.Protected && p != nil:
		// It is carried out if the arbiter answers.
		d.post(pair.Event{Kind: pair.EventUserFailover})
		return open("is being handed over to %s", s.Peer)
	case s.State == pair.Cloning || s.State == pair.GoingLive:
		return open("is %s", s)
	case v != nil:
		return HandoverDomain{Stays: true, Text: "has no backup that could take over: it is " + s.String()}, true
	}
	return HandoverDomain{}, false
}

// handedOver looks whether the backup has taken over from the copy that was ended
// here.
func (d *domain) handedOver(ctx context.Context, s pair.Status) (HandoverDomain, bool) {
	ctx, cancel := context.WithTimeout(ctx, arbiterTimeout)
	defer cancel()
	rec, err := d.a.arbiter.Lookup(ctx, d.id)
	switch {
	case err != nil:
		return HandoverDomain{Open: true, Text: fmt.Sprintf("was ended here, and the arbiter does not say whether %s has taken over: %v", s.Peer, err)}, true
	case rec.Epoch == s.Epoch && rec.Owner == "":
		return HandoverDomain{Open: true, Text: fmt.Sprintf("was ended here, and %s has not taken over yet", s.Peer)}, true
	}
	return HandoverDomain{Text: "was handed over to " + s.Peer}, true
}

func (a *Agent) serveHandover(w http.ResponseWriter, r *http.Request) {
	reply(w, a.Handover(r.Context()), nil)
}
