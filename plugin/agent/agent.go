// SPDX-License-Identifier: Apache-2.0

// Package agent is the process that serves one host: it keeps the state
// machine of each protected domain, carries logs between the plugins inside
// QEMU and the agents of other hosts, clones, detects failures and asks the
// arbiter. It decides nothing that package pair does not tell it.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/backend"
	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/detect"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
	"ftvirt.org/ftvirt/plugin/web"
)

// Agent serves one host.
type Agent struct {
	cfg       config.Config
	log       *slog.Logger
	virt      *virt.Conn
	owners    func(pid int) (plugin.UUID, error) // nil where libvirt's notes cannot be read
	arbiter   arbiter.Arbiter
	seen      *arbiter.Seen // what this host knows of it
	transport channel.Transport
	channel   channel.Config
	detect    *detect.Service
	links     *links
	events    *journal
	past      timelines // of what the page shows
	replicas  *migrate.Replicas

	examining sync.Mutex // held while the doctor looks at this host

	leaving atomic.Bool // the host was handed over: no new pairs

	mu      sync.Mutex
	domains map[plugin.UUID]*domain
	// Domains whose annotations are to be looked at.
	changed    chan plugin.UUID
	changedAll chan struct{}
	ctx        context.Context // of Run; domains live in it
	started    time.Time
	wg         sync.WaitGroup
}

// New makes the agent of a host; Run starts it. Build is the version to show.
func New(cfg config.Config, log *slog.Logger) (*Agent, error) {
	a := &Agent{
		cfg: cfg, log: log, domains: map[plugin.UUID]*domain{}, events: newJournal(), links: newLinks(sysNet),
		channel: channel.DefaultConfig(), changed: make(chan plugin.UUID, 64), changedAll: make(chan struct{}, 1),
	}
	a.channel.Logger = log
	a.replicas = a.newReplicas()
	a.channel.QueueBytes = max(int(cfg.Channel.SendBuffer), a.channel.QueueBytes)
	var err error
	// A full disk would be told of at each decision.
	var kept channel.Complaints
	a.arbiter, a.seen, err = backend.Open(cfg, 0, func(err error) { kept.Warn(log, netip.Addr{}, "the arbiter's past", "error", err) })
	if err != nil {
		return nil, fmt.Errorf("arbiter: %w", err)
	}
	a.transport, err = newTransport(cfg, log)
	return a, err
}

// Run serves until ctx ends. Domains are left as they are: a protected one
// fails over if the agent does not come back. ready is called once the agent
// serves.
func (a *Agent) Run(ctx context.Context, ready func()) error {
	release, err := a.directories()
	if err != nil {
		return err
	}
	defer release()
	// A libvirtd that is down or hangs must not keep pairs without their agent.
	a.virt, err = virt.Open(a.cfg.LibvirtURI, virt.Events{
		Started: func(i virt.Info) { a.notice(i.UUID) }, Stopped: a.stopped, DiskFailed: a.diskFailed,
		MetadataChanged: a.notice, DefinitionChanged: a.notice, Reconnected: a.noticeAll,
	})
	if err != nil {
		return err
	}
	defer a.virt.Close()
	a.detect, err = a.newDetector()
	if err != nil {
		return err
	}
	plugins, err := control.Listen(a.cfg.Agent.PluginSocket)
	if err != nil {
		return err
	}
	a.owners = owners(a.cfg.LibvirtURI)
	if plugins.Owner = a.owners; plugins.Owner == nil {
		a.log.Warn("any local user can pretend to be a domain: its process is checked for qemu:///system only", "libvirt_uri", a.cfg.LibvirtURI)
	}
	peers, err := a.transport.Listen(ctx, a.cfg.Channel.Listen)
	if err != nil {
		_ = plugins.Close()
		return err
	}
	admin, err := a.listenAdmin()
	if err != nil {
		_ = plugins.Close()
		_ = peers.Close()
		return err
	}
	scrapes, err := listenHTTP(ctx, "metrics.listen", a.cfg.Metrics.Listen)
	var visitors net.Listener
	if err == nil {
		visitors, err = listenHTTP(ctx, "web.listen", a.cfg.Web.Listen)
	}
	if err != nil {
		_ = plugins.Close()
		_ = peers.Close()
		_ = admin.Close()
		if scrapes != nil {
			_ = scrapes.Close()
		}
		return err
	}
	// What serves outlives the wish to stop, so that peers can be told of it.
	outer := ctx
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	a.ctx, a.started = ctx, time.Now()
	group.Go(func() error {
		select {
		case <-outer.Done():
			a.announceStop()
			cancel()
		case <-ctx.Done():
		}
		return nil
	})
	a.wg.Go(func() { a.virt.Keep(ctx, func(err error) { a.libvirtIs(ctx, err) }) })
	a.takeUpDefinitions()
	a.wg.Go(func() { a.age(ctx) })
	group.Go(func() error { return a.detect.Run(ctx) })
	group.Go(func() error { return channel.Serve(ctx, a.transport, peers, a.channel, a.servePeer) })
	group.Go(func() error { return a.serveAdmin(ctx, admin) })
	group.Go(func() error { return serveHTTP(ctx, scrapes, a.metrics()) })
	if visitors != nil {
		group.Go(func() error { return a.keepTimelines(ctx) })
		group.Go(func() error { return serveHTTP(ctx, visitors, web.Handler(a.page)) })
	}
	group.Go(func() error {
		var refused channel.Complaints
		return plugins.Serve(func(s *control.Session) { a.servePlugin(ctx, s) },
			func(err error) { refused.Warn(a.log, netip.Addr{}, "a plugin was refused", "error", err) })
	})
	group.Go(func() error {
		<-ctx.Done()
		return plugins.Close()
	})
	a.greet(ctx)
	a.wg.Go(func() { a.watchWishes(ctx) })
	a.log.Info("agent started", "host", a.cfg.Host, "channel", a.cfg.Channel.Listen)
	if ready != nil {
		ready()
	}
	err = group.Wait()
	a.wg.Wait()
	if errors.Is(err, context.Canceled) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// libvirtIs tells of libvirt as it comes and goes.
func (a *Agent) libvirtIs(ctx context.Context, err error) {
	if err != nil {
		a.log.Warn("libvirt cannot be asked: what is protected stays so, but no domain is cloned, defined or removed; is libvirtd running?",
			"uri", a.cfg.LibvirtURI, "error", err)
		return
	}
	a.log.Info("libvirt answers", "uri", a.cfg.LibvirtURI)
	// The first question makes libvirt probe QEMU, for seconds: not when
	// somebody waits.
	a.wg.Go(func() { _, _ = a.virt.Hypervisor(ctx) })
}

// cloneDir is where the sockets of a domain's clone lie.
func (a *Agent) cloneDir(id plugin.UUID) string {
	return filepath.Join(a.cfg.Agent.RunDir, "clone-"+id.String())
}

// domain gives the record of a domain, made at the first mention.
func (a *Agent) domain(id plugin.UUID) *domain {
	a.mu.Lock()
	defer a.mu.Unlock()
	d := a.domains[id]
	if d == nil {
		d = newDomain(a, id)
		a.domains[id] = d
		a.wg.Go(func() { d.loop(a.ctx) })
		a.wg.Go(func() { d.keep(a.ctx) })
	}
	return d
}

// announceStop tells the peers of all pairs that this agent stops: it may be
// restarting, and its domains run on.
func (a *Agent) announceStop() {
	ctx, cancel := context.WithTimeout(a.ctx, stopTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, d := range a.known() {
		s, _, p, b := d.snapshot()
		if !d.paired() {
			continue
		}
		c := entry{Kind: pair.NotifyStopping.String(), Epoch: s.Epoch}
		wg.Go(func() {
			var conn *channel.Conn
			switch {
			case p != nil:
				conn = p.session()
			case b != nil:
				conn = b.session()
			}
			if conn != nil {
				send(ctx, conn, c)
				_ = conn.Flush(ctx)
			}
		})
	}
	wg.Wait()
}

// stopTimeout bounds telling the peers that this agent stops.
const stopTimeout = 500 * time.Millisecond

// stopped notes how a domain ended, as libvirt tells it.
func (a *Agent) stopped(s virt.Stopped) {
	a.lookSoon(s.UUID) // its definition can be made ready now
	a.mu.Lock()
	d := a.domains[s.UUID]
	a.mu.Unlock()
	if d == nil {
		return
	}
	select {
	case d.stops <- s:
	default: // nobody waits for so many
	}
}

func (a *Agent) known() []*domain {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]*domain, 0, len(a.domains))
	for _, d := range a.domains {
		list = append(list, d)
	}
	return list
}

// servePlugin owns one connection of a plugin.
func (a *Agent) servePlugin(ctx context.Context, s *control.Session) {
	h := s.Hello()
	a.log.Debug("plugin connected", "domain", h.Domain, "mode", h.Mode, "backup", h.Backup, "epoch", h.Epoch, "qemu", h.QEMU)
	d := a.domain(h.Domain)
	v := newVM(s)
	d.attach(ctx, v)
	a.wg.Go(func() { d.watchSilence(ctx, v) })
	a.wg.Go(func() { d.watchPause(ctx, v) })
	a.wg.Go(func() { d.watchService(ctx, v) })
	err := v.run(ctx)
	d.detach(ctx, v, err)
}

// servePeer owns one connection from another agent.
func (a *Agent) servePeer(ctx context.Context, in *channel.Incoming) {
	h := in.Hello
	if h.To != a.cfg.Host {
		_ = in.Refuse(ctx, channel.RefuseHost, fmt.Sprintf("this is host %q, not %q", a.cfg.Host, h.To))
		return
	}
	if _, err := a.cfg.Peer(h.From); err != nil {
		_ = in.Refuse(ctx, channel.RefuseHost, fmt.Sprintf("host %q is not among the peers of %q", h.From, a.cfg.Host))
		return
	}
	if h.Purpose == channel.PurposeSession && h.Epoch == 0 {
		a.serveProbe(ctx, in)
		return
	}
	a.domain(h.Domain).serve(ctx, in)
}

// Time limits of the agent's own waits.
const (
	arbiterTimeout = 2 * time.Second
	attachTimeout  = 15 * time.Second
	removeTimeout  = 30 * time.Second
	controlTimeout = 2 * time.Second
)
