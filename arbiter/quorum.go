// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/arbiter/paxos"
	"ftvirt.org/ftvirt/plugin"
)

// WitnessAddress says where a witness is and who it must be.
type WitnessAddress struct {
	// ID is the identity that InitWitness gave.
	ID string
	// Address is HOST:PORT.
	Address string
}

// ParseWitnessAddress reads "ID@HOST:PORT".
func ParseWitnessAddress(s string) (WitnessAddress, error) {
	id, address, ok := strings.Cut(s, "@")
	if _, _, err := net.SplitHostPort(address); !ok || id == "" || err != nil {
		return WitnessAddress{}, fmt.Errorf("%w: witness %q is not ID@HOST:PORT", ErrInvalid, s)
	}
	return WitnessAddress{ID: id, Address: address}, nil
}

func (w WitnessAddress) String() string { return w.ID + "@" + w.Address }

// QuorumConfig configures the majority backend.
type QuorumConfig struct {
	// Witnesses are all voters, an odd number from 3, the same on every host.
	Witnesses []WitnessAddress
	// Key is the secret shared with the witnesses, at least 32 bytes.
	Key []byte
	// TLS, if set, is used to reach the witnesses. Without it, an onlooker can
	// read host names and epochs, but change nothing.
	TLS *tls.Config
	// Timeout bounds each operation whose context sets no earlier deadline.
	// Default 5 s.
	Timeout time.Duration
	// Seen, if set, is what this host remembers, against which all that is read
	// is held.
	Seen *Seen
	// WitnessTimeout bounds each request to one witness. Default 1 s.
	WitnessTimeout time.Duration
	// Fault interferes with the requests. For tests only.
	Fault FaultFunc
}

// NewQuorum gives the arbiter that a majority of witnesses make up, for hosts
// that share no storage (the paper, section 4.1). What is decided stays so as
// long as no witness forgets, and decisions can be made while a majority of
// the witnesses answers. It does not touch the network.
//
// A call that ends with ErrUnavailable may still come about later, when other
// hosts find what a minority accepted of it. For the host that gave up, nothing
// changed but that it may find itself the owner when it asks again.
func NewQuorum(cfg QuorumConfig) (Arbiter, error) {
	q, err := newQuorum(cfg)
	if err != nil {
		return nil, err
	}
	return registered{reg: q, seen: cfg.Seen, guard: &guard{limit: 64, timeout: cmp.Or(cfg.Timeout, 5*time.Second)}}, nil
}

// AskWitnesses asks each witness for its vote on a domain that nobody has, and
// gives what kept it from answering, in the order of cfg.Witnesses.
func AskWitnesses(ctx context.Context, cfg QuorumConfig) ([]error, error) {
	q, err := newQuorum(cfg)
	if err != nil {
		return nil, err
	}
	defer q.client.CloseIdleConnections()
	errs := make([]error, len(q.witnesses))
	var asked sync.WaitGroup
	for i := range q.witnesses {
		asked.Go(func() { _, errs[i] = q.ask(ctx, i, plugin.UUID{}, paxos.Request{Op: paxos.OpRead}) })
	}
	asked.Wait()
	return errs, nil
}

func newQuorum(cfg QuorumConfig) (*quorum, error) {
	if n := len(cfg.Witnesses); n < 3 || n%2 == 0 {
		return nil, fmt.Errorf("%w: %d witnesses; use 3 or 5, so that there always is a majority", ErrInvalid, n)
	}
	if len(cfg.Key) < minKey {
		return nil, fmt.Errorf("%w: key of %d bytes, at least %d are needed", ErrInvalid, len(cfg.Key), minKey)
	}
	if cfg.Timeout < 0 || cfg.WitnessTimeout < 0 {
		return nil, fmt.Errorf("%w: negative limit for the witnesses", ErrInvalid)
	}
	seen, ids := make(map[string]bool), make(map[string]bool)
	for _, w := range cfg.Witnesses {
		if w.ID == "" || w.Address == "" {
			return nil, fmt.Errorf("%w: witness %q", ErrInvalid, w)
		}
		// One that is counted twice would be a majority of its own.
		if seen[w.ID] || seen[w.Address] {
			return nil, fmt.Errorf("%w: witness %s is named twice", ErrInvalid, w)
		}
		seen[w.ID], seen[w.Address], ids[w.ID] = true, true, true
	}
	q := &quorum{
		identity:  strings.Join(slices.Sorted(maps.Keys(ids)), ","),
		witnesses: cfg.Witnesses, key: cfg.Key, fault: cfg.Fault, scheme: "http",
		timeout: cmp.Or(cfg.WitnessTimeout, time.Second),
		client: &http.Client{Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: time.Second}).DialContext,
			TLSClientConfig:     cfg.TLS,
			MaxIdleConnsPerHost: 4,
			IdleConnTimeout:     30 * time.Second,
		}},
	}
	if cfg.TLS != nil {
		q.scheme = "https"
	}
	return q, nil
}

// maxOutrun bounds the pause of a proposer that was outrun.
const maxOutrun = time.Second

// quorum is the register that a majority of witnesses make up.
type quorum struct {
	witnesses []WitnessAddress
	identity  string // of all of them together
	key       key
	scheme    string
	timeout   time.Duration
	client    *http.Client
	fault     FaultFunc
}

// answered is what came of one request to one witness.
type answered struct {
	from  int
	req   paxos.Request
	reply paxos.Reply
	err   error
}

func (q *quorum) forget(ctx context.Context, domain plugin.UUID) error {
	return q.update(ctx, domain, func(s state) (state, error) { return s.forget(), nil })
}

// probe lets the witnesses agree on something new of the domain that nobody has.
func (q *quorum) probe(ctx context.Context) error {
	token := newToken()
	return q.update(ctx, plugin.UUID{}, func(s state) (state, error) {
		s.token = token
		return s, nil
	})
}

func (q *quorum) update(ctx context.Context, domain plugin.UUID, change func(state) (state, error)) error {
	ask, cancel := q.lifetime(ctx)
	// verdict is of the last call of change, which is the one that counts.
	var verdict error
	p, req := paxos.NewProposer(newToken(), len(q.witnesses), func(value []byte) ([]byte, bool) {
		var s, next state
		var text []byte
		if s, verdict = decodeState(value, "of the witnesses", domain); verdict != nil {
			return nil, false
		}
		s.from = q.identity
		if next, verdict = change(s); verdict != nil || next == s {
			return nil, false
		}
		text, verdict = next.encode()
		return text, verdict == nil
	})
	answers := make(chan answered)
	errs := make([]error, len(q.witnesses))
	q.broadcast(ask, domain, req, answers)
	began := time.Now()
	for attempt := 0; ; {
		var outcome paxos.Outcome
		select {
		case <-ctx.Done():
			cancel(false)
			return errors.Join(gone(ctx, "asking the witnesses"), errors.Join(errs...))
		case a := <-answers:
			if errs[a.from] = a.err; a.err != nil {
				outcome, req = p.Failed(a.from, a.req)
			} else {
				outcome, req = p.Step(a.from, a.reply)
			}
		}
		switch outcome {
		case paxos.Pending:
		case paxos.Done:
			cancel(true)
			return verdict
		case paxos.Unreachable:
			cancel(false)
			return fmt.Errorf("%w: no majority of the witnesses: %w", ErrUnavailable, errors.Join(errs...))
		case paxos.Outrun:
			// Proposers that outrun each other must fall out of step, by more
			// than an attempt takes on these witnesses.
			attempt++
			if err := pause(ctx, rand.N(min(max(time.Since(began), time.Millisecond)<<min(attempt, 8), maxOutrun))); err != nil {
				cancel(false)
				return err
			}
			began = time.Now()
			q.broadcast(ask, domain, p.Restart(), answers)
		case paxos.Send:
			q.broadcast(ask, domain, req, answers)
		}
	}
}

// lifetime gives a context for the requests of one operation. They end with
// ctx and with an operation that failed. After success, those that are still
// under way get some time, so that a slow witness does not fall behind for ever.
func (q *quorum) lifetime(ctx context.Context) (context.Context, func(success bool)) {
	ask, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	return ask, func(success bool) {
		stop()
		if success {
			time.AfterFunc(q.timeout, cancel)
		} else {
			cancel()
		}
	}
}

// broadcast asks every witness. Answers that nobody waits for are dropped.
func (q *quorum) broadcast(ctx context.Context, domain plugin.UUID, req paxos.Request, answers chan<- answered) {
	for i := range q.witnesses {
		go func() {
			reply, err := q.ask(ctx, i, domain, req)
			select {
			case answers <- answered{from: i, req: req, reply: reply, err: err}:
			case <-ctx.Done():
			}
		}()
	}
}

// ask sends one request to one witness.
func (q *quorum) ask(ctx context.Context, i int, domain plugin.UUID, req paxos.Request) (paxos.Reply, error) {
	w := q.witnesses[i]
	ctx, cancel := context.WithTimeout(ctx, q.timeout)
	defer cancel()
	op := map[paxos.Op]Op{paxos.OpRead: OpAsk, paxos.OpPrepare: OpPrepare, paxos.OpAccept: OpAccept}[req.Op]
	reply, err := func() (paxos.Reply, error) {
		if err := q.interfere(Fault{Op: op, Path: w.Address}); err != nil {
			return paxos.Reply{}, err
		}
		reply, err := q.post(ctx, w, domain, req)
		if err != nil {
			return paxos.Reply{}, err
		}
		return reply, q.interfere(Fault{Op: op, Path: w.Address, After: true})
	}()
	if err != nil {
		return paxos.Reply{}, fmt.Errorf("witness %s: %w", w.Address, err)
	}
	return reply, nil
}

func (q *quorum) interfere(f Fault) error {
	if q.fault == nil {
		return nil
	}
	return q.fault(f)
}

func (q *quorum) post(ctx context.Context, w WitnessAddress, domain plugin.UUID, req paxos.Request) (paxos.Reply, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return paxos.Reply{}, fmt.Errorf("encoding request: %w", err)
	}
	path, nonce := witnessPath+domain.String(), newToken()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, q.scheme+"://"+w.Address+path, bytes.NewReader(body))
	if err != nil {
		return paxos.Reply{}, err
	}
	r.Header.Set(headerNonce, nonce)
	r.Header.Set(headerMAC, q.key.request(w.ID, nonce, path, body))
	// Not sent; it tells net/http that the request may be repeated when the
	// witness has closed an idle connection.
	r.Header["Idempotency-Key"] = nil
	resp, err := q.client.Do(r)
	if err != nil {
		return paxos.Reply{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxMessage))
	if err != nil {
		return paxos.Reply{}, err
	}
	if !equalMAC(resp.Header.Get(headerMAC), q.key.reply(w.ID, nonce, resp.StatusCode, text)) {
		return paxos.Reply{}, fmt.Errorf("%s: it has another key, or is not witness %s", resp.Status, w.ID)
	}
	if resp.StatusCode != http.StatusOK {
		return paxos.Reply{}, fmt.Errorf("%s: %s", resp.Status, text)
	}
	var reply paxos.Reply
	if err := json.Unmarshal(text, &reply); err != nil {
		return paxos.Reply{}, fmt.Errorf("decoding reply: %w", err)
	}
	return reply, nil
}

// pause waits for d, or fails because ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return gone(ctx, "waiting for another host")
	case <-timer.C:
		return nil
	}
}
