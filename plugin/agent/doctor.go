// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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
	// methodSees asks which of this host's directories the peer has as well.
	methodSees = "doctor.sees"
	// methodPoke asks for datagrams that are no heartbeats.
	methodPoke = "doctor.poke"
	// methodBulk carries a long message there, or back.
	methodBulk = "doctor.bulk"
)

type pokeRequest struct {
	// Large asks for datagrams as large as the interface takes.
	Large bool `json:"large,omitempty"`
}

type bulk struct {
	Filling string `json:"filling,omitempty"`
	Back    bool   `json:"back,omitempty"`
}

// seesRequest names a file in each of a host's directories, by the key of ftvirt.toml,
// and seesReply the keys of those that the peer finds in its own.
type seesRequest struct {
	Files map[string]string `json:"files"`
}

type seesReply struct {
	Keys []string `json:"keys"`
}

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
	// bulkTimeout is how long the channel may take for a long message.
	bulkTimeout = 3 * time.Second
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
	findings = slices.Concat(findings, link.Judge(), doctor.Compare(ours.Facts, theirs.Facts))
	shared, err := a.sharedDirectories(ctx, conn)
	if err != nil {
		return append(findings, doctor.Unreachable(a.cfg.Host, peer, err)), nil
	}
	return append(findings, doctor.Directories(a.cfg.Host, peer, a.ownDirectories(), shared)...), nil
}

// ownDirectories are those that this host writes to, by their keys.
func (a *Agent) ownDirectories() map[string]string {
	return map[string]string{
		doctor.DiskDir: a.cfg.Clone.DiskDir, "agent.run_dir": a.cfg.Agent.RunDir, "agent.state_dir": a.cfg.Agent.StateDir,
	}
}

// tokenPrefix begins the names of files that show whether a directory is shared.
const tokenPrefix = ".ftvirt-doctor-"

// sharedDirectories puts a file into each directory and asks the peer which it sees.
func (a *Agent) sharedDirectories(ctx context.Context, conn *channel.Conn) ([]string, error) {
	req := seesRequest{Files: map[string]string{}}
	for key, dir := range a.ownDirectories() {
		f, err := os.CreateTemp(dir, tokenPrefix+"*")
		if err != nil {
			continue // a finding about this host
		}
		_ = f.Close()
		defer func() { _ = os.Remove(f.Name()) }()
		req.Files[key] = filepath.Base(f.Name())
	}
	var reply seesReply
	err := conn.Call(ctx, methodSees, req, &reply)
	return reply.Keys, err
}

// sees answers a peer's sharedDirectories.
func (a *Agent) sees(r seesRequest) seesReply {
	var reply seesReply
	for key, dir := range a.ownDirectories() {
		name := r.Files[key]
		// The peer's word becomes part of a path.
		if !strings.HasPrefix(name, tokenPrefix) || name != filepath.Base(name) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			reply.Keys = append(reply.Keys, key)
		}
	}
	return reply
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
	if err == nil {
		err = a.checkSeen(asked)
	}
	cancel()
	r.Findings = append(r.Findings, doctor.Storage(a.cfg.Host, a.cfg.Arbiter.Kind+" arbiter", took, err, a.cfg.Heartbeat.Timeout))
	strangers, err := a.replicas.Strangers(ctx)
	r.Findings = append(r.Findings, doctor.Strangers(a.cfg.Host, a.cfg.Clone.DiskDir, strangers.Hosts, strangers.Unproven, err)...)
	return r
}

// checkSeen holds the arbiter against what this host saw of each domain there.
func (a *Agent) checkSeen(ctx context.Context) error {
	domains, err := a.seen.Domains()
	if err != nil {
		return err
	}
	for _, id := range domains {
		if _, err := a.arbiter.Lookup(ctx, id); errors.Is(err, arbiter.ErrOutdated) {
			return err
		}
	}
	return nil
}

// doctorHandlers serve a peer's doctor.
func (a *Agent) doctorHandlers(from string) channel.Handlers {
	return channel.Handlers{
		methodDoctor: handler(func(ctx context.Context, _ struct{}) (any, error) { return a.examine(ctx), nil }),
		methodClock: handler(func(context.Context, struct{}) (any, error) {
			return clockReply{Now: time.Now(), Garbage: a.detect.Stats().Garbage}, nil
		}),
		methodSees: handler(func(_ context.Context, r seesRequest) (any, error) { return a.sees(r), nil }),
		methodPoke: handler(func(ctx context.Context, r pokeRequest) (any, error) {
			_, err := a.poke(ctx, from, r.Large)
			return struct{}{}, err
		}),
		methodBulk: handler(func(_ context.Context, r bulk) (any, error) {
			if r.Back {
				return bulk{Filling: filling()}, nil
			}
			return bulk{}, nil
		}),
	}
}

// poke sends datagrams to a peer's heartbeat address that it counts, and takes
// for nothing; large, as large as the interface takes, and not to be cut. It tells
// the size of their packets.
func (a *Agent) poke(ctx context.Context, peer string, large bool) (int, error) {
	conf, err := a.cfg.Peer(peer)
	if err != nil {
		return 0, err
	}
	addr, err := resolve(ctx, conf.Heartbeat)
	if err != nil {
		return 0, fmt.Errorf("heartbeat address of %s: %w", peer, err)
	}
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return 0, fmt.Errorf("heartbeat address of %s: %w", peer, err)
	}
	defer func() { _ = conn.Close() }()
	text, size := []byte("doctor"), 0
	if large {
		var headers int
		if size, headers, err = whole(conn, addr.Addr().Is4()); err != nil {
			return 0, fmt.Errorf("MTU on the way to %s: %w", peer, err)
		}
		text = make([]byte, size-headers)
	}
	for range pokes {
		// A port that nobody listens on answers the second with an error; that
		// nothing came through tells it as well.
		_, _ = conn.Write(text)
	}
	return size, nil
}

// whole makes a socket send what nobody on the way may cut, whatever is believed of
// the path, and gives the most that the interface takes, and how much of that are
// headers.
func whole(conn *net.UDPConn, v4 bool) (size, headers int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	level, discover, probe, mtu := unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE, unix.IPV6_MTU
	headers = 40 + 8
	if v4 {
		level, discover, probe, mtu = unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, unix.IP_MTU
		headers = 20 + 8
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		if failed = unix.SetsockoptInt(int(fd), level, discover, probe); failed == nil {
			size, failed = unix.GetsockoptInt(int(fd), level, mtu)
		}
	})
	// The loopback's is more than a datagram holds.
	return min(size, 1<<16-1), headers, errors.Join(err, failed)
}

// carries tells whether the channel carries a long message, over a connection of
// its own: one that does not is of no use afterwards.
func (a *Agent) carries(ctx context.Context, peer string, m bulk) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, bulkTimeout)
	defer cancel()
	conn, _, err := a.dial(ctx, peer, plugin.UUID{}, 0, "")
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close() }()
	go func() { _, _ = conn.Receive(ctx) }()
	err = conn.Call(ctx, methodBulk, m, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		return false, nil
	}
	return err == nil, err
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
	// Small datagrams, then large ones.
	for _, large := range []bool{false, true} {
		size, err := a.poke(ctx, peer, large)
		if err != nil {
			return m, err
		}
		there, err := within(ctx, func() (bool, error) { r, err := ask(); return r.Garbage > garbage, err })
		if err != nil {
			return m, err
		}
		ours := a.detect.Stats().Garbage
		if err := conn.Call(ctx, methodPoke, pokeRequest{Large: large}, nil); err != nil {
			return m, err
		}
		back, err := within(ctx, func() (bool, error) { return a.detect.Stats().Garbage > ours, nil })
		if err != nil {
			return m, err
		}
		if large {
			m.Largest, m.LargeThere, m.LargeBack = size, there, back
			continue
		}
		m.There, m.Back = there, back
		// All of the small ones are to be counted before a large one is looked for.
		if garbage, err = a.counted(ctx, ask); err != nil {
			return m, err
		}
	}
	var err error
	if m.BulkThere, err = a.carries(ctx, peer, bulk{Filling: filling()}); err != nil {
		return m, err
	}
	m.BulkBack, err = a.carries(ctx, peer, bulk{Back: true})
	return m, err
}

// counted waits until no datagram of before comes any more, to either side, and
// gives how many came to the peer.
func (a *Agent) counted(ctx context.Context, ask func() (clockReply, error)) (uint64, error) {
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	var theirs, ours uint64
	for still := 0; still < 5; still++ {
		r, err := ask()
		if err != nil {
			return 0, err
		}
		if now := a.detect.Stats().Garbage; r.Garbage != theirs || now != ours {
			theirs, ours, still = r.Garbage, now, 0
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return theirs, nil
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
