// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/detect"
	"ftvirt.org/ftvirt/plugin/pair"
)

// Methods of agents besides those of a clone (package migrate).
const (
	// methodHost asks what the peer runs, before anything is begun.
	methodHost = "host.info"
	// methodHeartbeat agrees on the key of the heartbeats of this epoch.
	methodHeartbeat = "heartbeat.begin"
	// methodForget says that a domain is not to be backed up any more: what is
	// kept for its next backup can go.
	methodForget = "replicas.forget"
	// methodDefinition keeps the backup's host up to date about the definition.
	methodDefinition = "definition.keep"
)

// hostInfo tells whether a host can take a backup.
type hostInfo struct {
	Host   string `json:"host"`
	Plugin string `json:"plugin"` // path of ftvirt.so, empty if it is not there
	QEMU   string `json:"qemu"`
}

// Request and answer of methodHeartbeat are filled up to a size that no packet
// has: a path that loses large ones, since its MTU is smaller than believed,
// does not look like one that carries a log.
type heartbeatRequest struct {
	Key     []byte `json:"key"`
	Filling string `json:"filling,omitempty"`
}

type heartbeatReply struct {
	Filling string `json:"filling,omitempty"`
}

func filling() string { return strings.Repeat("-", fillingSize) }

const fillingSize = 16 << 10

// Kinds of control entries besides the notifies of package pair.
const (
	kindLag      = "lag"
	kindProgress = "clone-progress"
	kindDigest   = "digest"
	// kindFull says that the backup has no room for more of the log.
	kindFull = "full"
	// kindResumed is the first that is said over a session that came back.
	kindResumed = "resumed"
)

// entry is a control entry between the agents of a pair.
type entry struct {
	Kind   string       `json:"kind"`
	Epoch  plugin.Epoch `json:"epoch"`
	Reason string       `json:"reason,omitempty"`
	// kindLag: execution lag of the backup in microseconds, and how far it is.
	LagMicros int64           `json:"lag_us,omitempty"`
	Consumed  plugin.Position `json:"consumed,omitempty"`
	// Compared is how often its registers were found equal to the primary's.
	Compared uint64 `json:"compared,omitempty"`
	// kindDigest: registers of the primary at a position of the log to come.
	Digest *control.Digest `json:"digest,omitempty"`
}

// notifyEvent translates the peer's notify into the event to step.
func notifyEvent(c entry) (pair.Event, bool) {
	if c.Kind == kindProgress {
		return pair.Event{Kind: pair.EventCloneProgress, Epoch: c.Epoch}, true
	}
	for n := pair.NotifyNone + 1; ; n++ {
		kind, ok := n.Event()
		if !ok {
			return pair.Event{}, false
		}
		if n.String() != c.Kind {
			continue
		}
		ev := pair.Event{Kind: kind, Epoch: c.Epoch}
		if kind == pair.EventPeerUnfit || kind == pair.EventDiscard {
			ev.Reason, _ = pair.ParseReason(c.Reason) // one of a later version is none
		}
		return ev, true
	}
}

func decodeControl(m channel.Message) (entry, error) {
	var c entry
	if err := json.Unmarshal(m.Data, &c); err != nil {
		return c, fmt.Errorf("control entry %q: %w", m.Kind, err)
	}
	return c, nil
}

// handler adapts a typed function to the channel's requests.
func handler[In any](f func(context.Context, In) (any, error)) channel.Handler {
	return func(ctx context.Context, params json.RawMessage) (any, error) {
		var in In
		if err := json.Unmarshal(params, &in); err != nil {
			return nil, err
		}
		return f(ctx, in)
	}
}

func newKey() []byte {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // it never fails, see crypto/rand
	return key
}

func (a *Agent) newDetector() (*detect.Service, error) {
	cfg := detect.DefaultConfig()
	cfg.Interval, cfg.Timeout = a.cfg.Heartbeat.Interval, a.cfg.Heartbeat.Timeout
	cfg.Suspect = max(2*cfg.Interval, cfg.Timeout/2)
	s, err := detect.Listen(a.cfg.Heartbeat.Listen, cfg)
	if err != nil {
		return nil, err
	}
	var refused channel.Complaints
	s.Refused = func(from netip.Addr, err error) {
		refused.Warn(a.log, from, "a heartbeat was refused", "from", from, "error", err)
	}
	return s, nil
}

// probe asks a peer what it runs, without naming a domain.
func (a *Agent) probe(ctx context.Context, peer string) (hostInfo, error) {
	var info hostInfo
	err := a.ask(ctx, peer, methodHost, struct{}{}, &info)
	return info, err
}

// ask calls a method of a peer's agent outside of any pair.
func (a *Agent) ask(ctx context.Context, peer, method string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	conn, _, err := a.dial(ctx, peer, plugin.UUID{}, 0, "")
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	go func() { _, _ = conn.Receive(ctx) }()
	return conn.Call(ctx, method, in, out)
}

// probeTimeout allows for a libvirt that has to learn first what its QEMU is.
const probeTimeout = 20 * time.Second

// serveProbe answers it.
func (a *Agent) serveProbe(ctx context.Context, in *channel.Incoming) {
	nc, err := in.Welcome(ctx, 0)
	if err != nil {
		return
	}
	handlers := a.doctorHandlers(in.Hello.From)
	handlers[methodHost] = handler(func(ctx context.Context, _ struct{}) (any, error) {
		a.peerUp()
		return a.hostInfo(ctx)
	})
	handlers[methodForget] = handler(func(ctx context.Context, r forgetRequest) (any, error) {
		return struct{}{}, a.forget(ctx, r.Domain)
	})
	conn, err := channel.NewConn(nc, a.channel, handlers)
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	_, _ = conn.Receive(ctx) // until the peer hangs up
}

func (a *Agent) hostInfo(ctx context.Context) (hostInfo, error) {
	info := hostInfo{Host: a.cfg.Host}
	if _, err := os.Stat(a.cfg.Agent.PluginFile); err == nil {
		info.Plugin = a.cfg.Agent.PluginFile
	}
	v, err := a.virt.Hypervisor(ctx)
	info.QEMU = v
	return info, err
}

// Targets of a session that is not new.
const (
	// targetResume asks for one that broke: the log goes on where it was cut.
	targetResume = "resume"
	// targetAdopt asks for that of an earlier agent: the log goes on behind the
	// last whole event, since nothing is known of what was cut.
	targetAdopt = "adopt"
)

// dial opens a session with a peer's agent: a new one, or with a target, the one
// that was before. It returns where the peer wants the log then.
func (a *Agent) dial(ctx context.Context, peer string, id plugin.UUID, epoch plugin.Epoch, target string) (*channel.Conn, plugin.Position, error) {
	p, err := a.cfg.Peer(peer)
	if err != nil {
		return nil, 0, err
	}
	nc, pos, err := channel.Dial(ctx, a.transport, p.Channel, channel.Hello{
		Purpose: channel.PurposeSession, From: a.cfg.Host, To: peer, Domain: id, Epoch: epoch, Target: target,
	}, a.channel)
	if err != nil {
		return nil, 0, err
	}
	conn, err := channel.NewConn(nc, a.channel, nil)
	return conn, pos, err
}
