// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/doctor"
)

// Methods by which doctors ask each other.
const (
	// methodDoctor asks for what a host tells of itself.
	methodDoctor = "doctor.host"
	// methodClock asks what time it is, and how many datagrams came that are
	// no heartbeats.
	methodClock = "doctor.clock"
	// methodPoke asks for datagrams that are no heartbeats.
	methodPoke = "doctor.poke"
)

type clockReply struct {
	Now     time.Time `json:"now"`
	Garbage uint64    `json:"garbage"`
}

const (
	doctorTimeout = 40 * time.Second
	// clockTries are how many round trips are measured, of which the shortest
	// counts.
	clockTries = 7
	// pokeTimeout is how long a datagram may take, and pokes how many are sent.
	pokeTimeout = time.Second
	pokes       = 3
)

// Doctor checks this host, and with a peer that host and what is between them.
func (a *Agent) Doctor(ctx context.Context, peer string) ([]doctor.Finding, error) {
	var conf string
	if peer != "" {
		p, err := a.cfg.Peer(peer)
		if err != nil {
			return nil, err
		}
		conf = p.Channel
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	ours := a.examine(ctx)
	findings := ours.Findings
	if peer == "" {
		return findings, nil
	}
	conn, _, err := a.dial(ctx, peer, plugin.UUID{}, 0, "")
	if err != nil {
		return append(findings, doctor.Unreachable(a.cfg.Host, peer, err)), nil
	}
	defer func() { _ = conn.Close() }()
	go func() { _, _ = conn.Receive(ctx) }()
	var theirs doctor.Report
	if err := conn.Call(ctx, methodDoctor, struct{}{}, &theirs); err != nil {
		return append(findings, doctor.Unreachable(a.cfg.Host, peer, err)), nil
	}
	findings = append(findings, theirs.Findings...)
	findings = append(findings, doctor.Reachable(a.cfg.Host, peer, conf))
	link, err := a.measureLink(ctx, conn, peer)
	if err != nil {
		return append(findings, doctor.Unreachable(a.cfg.Host, peer, err)), nil
	}
	return slices.Concat(findings, link.Judge(), doctor.Compare(ours.Facts, theirs.Facts)), nil
}

// examine is what this host tells of itself. It starts a QEMU, so that one at a
// time is done, whoever asks.
func (a *Agent) examine(ctx context.Context) doctor.Report {
	a.examining.Lock()
	defer a.examining.Unlock()
	r := doctor.ThisMachine().Look(ctx, a.cfg)
	add := func(f doctor.Finding) {
		f.Host = a.cfg.Host
		r.Findings = append(r.Findings, f)
	}
	qemu, err := a.virt.Hypervisor(ctx)
	if err == nil {
		r.Facts.Libvirt, err = a.virt.Library(ctx)
	}
	r.Facts.QEMU = qemu
	problems := unknownQEMU(qemu)
	switch {
	case err != nil:
		add(doctor.Finding{Check: "libvirt", Level: doctor.Problem, Text: err.Error(), Remedy: "see 'systemctl status libvirtd' and libvirt_uri in ftvirt.toml"})
	case len(problems) > 0:
		add(doctor.Finding{Check: "qemu", Level: doctor.Problem, Text: problems[0].Reason, Remedy: problems[0].Remedy})
	default:
		add(doctor.Finding{Check: "libvirt", Level: doctor.OK, Text: "libvirt " + r.Facts.Libvirt + " runs QEMU " + qemu})
	}
	began := time.Now()
	asked, cancel := context.WithTimeout(ctx, arbiterTimeout)
	_, err = a.arbiter.Lookup(asked, plugin.UUID{})
	took := time.Since(began)
	if errors.Is(err, arbiter.ErrNoRecord) {
		err = nil // there is none of this domain
	}
	if id, ok := a.arbiter.(interface {
		ID(context.Context) (string, error)
	}); ok && err == nil {
		r.Facts.Arbiter, err = id.ID(asked)
	}
	cancel()
	r.Findings = append(r.Findings, doctor.Storage(a.cfg.Host, a.cfg.Arbiter.Kind+" arbiter", took, err, a.cfg.Heartbeat.Timeout))
	return r
}

// doctorHandlers serve a peer's doctor.
func (a *Agent) doctorHandlers(from string) channel.Handlers {
	return channel.Handlers{
		methodDoctor: handler(func(ctx context.Context, _ struct{}) (any, error) { return a.examine(ctx), nil }),
		methodClock: handler(func(context.Context, struct{}) (any, error) {
			return clockReply{Now: time.Now(), Garbage: a.detect.Stats().Garbage}, nil
		}),
		methodPoke: handler(func(ctx context.Context, _ struct{}) (any, error) { return struct{}{}, a.poke(ctx, from) }),
	}
}

// poke sends datagrams to a peer's heartbeat address that it counts, and takes
// for nothing.
func (a *Agent) poke(ctx context.Context, peer string) error {
	conf, err := a.cfg.Peer(peer)
	if err != nil {
		return err
	}
	addr, err := resolve(ctx, conf.Heartbeat)
	if err != nil {
		return fmt.Errorf("heartbeat address of %s: %w", peer, err)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "udp", addr.String())
	if err != nil {
		return fmt.Errorf("heartbeat address of %s: %w", peer, err)
	}
	defer func() { _ = conn.Close() }()
	for range pokes {
		// A port that nobody listens on answers the second with an error; that
		// nothing came through tells it as well.
		_, _ = conn.Write([]byte("doctor"))
	}
	return nil
}

// measureLink measures what is between this host and its peer.
func (a *Agent) measureLink(ctx context.Context, conn *channel.Conn, peer string) (doctor.Link, error) {
	m := doctor.Link{From: a.cfg.Host, To: peer, Timeout: a.cfg.Heartbeat.Timeout}
	ask := func() (clockReply, error) {
		var r clockReply
		return r, conn.Call(ctx, methodClock, struct{}{}, &r)
	}
	var garbage uint64
	for i := range clockTries {
		began := time.Now()
		r, err := ask()
		if err != nil {
			return m, err
		}
		if rtt := time.Since(began); i == 0 || rtt < m.RTT {
			m.RTT, m.Offset = rtt, r.Now.Sub(began.Add(rtt/2).Round(0))
		}
		garbage = r.Garbage
	}
	if err := a.poke(ctx, peer); err != nil {
		return m, err
	}
	var err error
	if m.There, err = within(ctx, func() (bool, error) { r, err := ask(); return r.Garbage > garbage, err }); err != nil {
		return m, err
	}
	garbage = a.detect.Stats().Garbage
	if err := conn.Call(ctx, methodPoke, struct{}{}, nil); err != nil {
		return m, err
	}
	m.Back, err = within(ctx, func() (bool, error) { return a.detect.Stats().Garbage > garbage, nil })
	return m, err
}

// within asks until the answer is yes or a datagram would have come.
func within(ctx context.Context, ask func() (bool, error)) (bool, error) {
	limit := time.NewTimer(pokeTimeout)
	defer limit.Stop()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		if yes, err := ask(); yes || err != nil {
			return yes, err
		}
		select {
		case <-t.C:
		case <-limit.C:
			return false, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}
