// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/detect"
	"ftvirt.org/ftvirt/plugin/pair"
)

// sysNet is where the kernel tells of its network interfaces.
const sysNet = "/sys/class/net"

// links tells whether the links of this host's service networks are up: those by
// which clients reach the guests.
type links struct {
	dir string // sysNet

	mu sync.Mutex
	// uplinks has, by bridge, the ports that led out of the host when there were
	// any: one that was pulled out of the machine is down.
	uplinks map[string][]string
}

func newLinks(dir string) *links { return &links{dir: dir, uplinks: map[string][]string{}} }

// lost tells whether one of the networks is cut off from the world, of each a
// bridge or the card itself: if it is known by which links it is connected, and
// none of them is up.
func (l *links) lost(networks []string) bool {
	return slices.ContainsFunc(networks, func(network string) bool {
		ups := l.of(network)
		return len(ups) > 0 && !slices.ContainsFunc(ups, l.up)
	})
}

// of lists by which links a network is connected: of a bridge, the ports that are
// no virtual machine's.
func (l *links) of(network string) []string {
	ports, err := os.ReadDir(filepath.Join(l.dir, network, "brif"))
	if err != nil {
		if _, err := os.Stat(filepath.Join(l.dir, network, "bridge")); err == nil || !l.exists(network) {
			return l.known(network)
		}
		return []string{network}
	}
	var ups []string
	for _, p := range ports {
		if _, err := os.Stat(filepath.Join(l.dir, p.Name(), "tun_flags")); err != nil {
			ups = append(ups, p.Name())
		}
	}
	if len(ups) == 0 {
		return l.known(network)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.uplinks[network] = ups
	return ups
}

func (l *links) known(network string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.uplinks[network]
}

func (l *links) exists(name string) bool {
	_, err := os.Stat(filepath.Join(l.dir, name))
	return err == nil
}

// up tells what the kernel says of a link. "unknown" is what drivers say that do
// not watch theirs.
func (l *links) up(name string) bool {
	text, err := os.ReadFile(filepath.Join(l.dir, name, "operstate"))
	if err != nil {
		return false // it is gone
	}
	switch strings.TrimSpace(string(text)) {
	case "down", "lowerlayerdown", "notpresent":
		return false
	}
	return true
}

// serviceLost tells whether clients cannot reach this host's copy, as far as its
// own links show. It asks the kernel alone.
func (d *domain) serviceLost() bool {
	networks := d.a.cfg.Service.Links
	if len(networks) == 0 {
		d.mu.Lock()
		networks = d.networks
		d.mu.Unlock()
	}
	return d.a.links.lost(networks)
}

// servicePeriod is between two looks at the links.
const servicePeriod = 200 * time.Millisecond

// watchService notes for the heartbeats of a copy whether its service links are
// up, as long as it is here.
func (d *domain) watchService(ctx context.Context, v *vm) {
	d.learnNetworks(ctx, v)
	t := time.NewTicker(servicePeriod)
	defer t.Stop()
	for {
		if lost := d.serviceLost(); d.cutOff.Swap(lost) != lost {
			d.a.log.Warn("links of the service network", "domain", d.label(), "up", !lost)
		}
		select {
		case <-t.C:
		case <-v.done:
			return
		case <-ctx.Done():
			return
		}
	}
}

// learnNetworks asks libvirt, until it answers, what the domain's network cards
// are connected to here.
func (d *domain) learnNetworks(ctx context.Context, v *vm) {
	t := time.NewTicker(keepPeriod)
	defer t.Stop()
	for {
		networks, err := d.askNetworks(ctx)
		if err == nil {
			d.mu.Lock()
			d.networks = networks
			d.mu.Unlock()
			return
		}
		select {
		case <-t.C:
		case <-v.done:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (d *domain) askNetworks(ctx context.Context) ([]string, error) {
	text, err := d.a.virt.PublicXML(ctx, d.id, false)
	if err != nil {
		return nil, err
	}
	dom, err := hooks.Parse([]byte(text))
	if err != nil || dom.Devices == nil {
		return nil, err
	}
	var list []string
	for _, i := range dom.Devices.Interfaces {
		name := ""
		switch s := i.Source; {
		case s == nil:
		case s.Bridge != nil:
			name = s.Bridge.Bridge
		case s.Network != nil: // libvirt names its bridge while the domain runs
			name = s.Network.Bridge
		case s.Direct != nil:
			name = s.Direct.Dev
		}
		if name != "" && name == filepath.Base(name) && !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	return list, nil
}

// unfitYield is how long a copy that is unfit lets the other one ask first.
const unfitYield = time.Second

// yields tells how long this side lets the other one ask the arbiter first, if
// that lives: its own copy cannot be reached by clients, and the other's could
// when it was last heard of; or its own does not run. It never keeps this side
// from asking, since the other one may be dead.
func (d *domain) yields() time.Duration {
	_, v, p, b := d.snapshot()
	var h beats
	switch {
	case p != nil:
		p.mu.Lock()
		h = p.beats
		p.mu.Unlock()
	case b != nil:
		b.mu.Lock()
		h = b.beats
		b.mu.Unlock()
		if v != nil && (v.reports().pause != "" || v.silent.Load()) {
			return unfitYield
		}
	}
	theirs := h.peer != nil && h.peer.State().Flags&detect.ServiceLost != 0
	if theirs || !d.serviceLost() {
		return 0
	}
	return d.a.cfg.Service.Yield
}

// letOther waits, once for an epoch, for as long as this side yields. It returns
// false if the question is not to be asked any more.
func (d *domain) letOther(ctx context.Context, epoch plugin.Epoch) bool {
	d.mu.Lock()
	contested := d.status.State == pair.GoingLive && d.yielded != epoch
	d.yielded = epoch
	d.mu.Unlock()
	wait := time.Duration(0)
	if contested {
		wait = d.yields()
	}
	if wait == 0 {
		return true
	}
	d.a.log.Warn("the other host may ask the arbiter first: this one's copy cannot be reached, or does not run",
		"domain", d.label(), "epoch", epoch, "for", wait)
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return false
	}
	// The copy may have died meanwhile, and must not win then.
	s, _, _, _ := d.snapshot()
	return s.Epoch == epoch && s.Asking
}
