// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"sort"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// DomainInfo is what a host knows of any of libvirt's domains, protected or not.
type DomainInfo struct {
	Domain string      `json:"domain"`
	UUID   plugin.UUID `json:"uuid"`
	Host   string      `json:"host"`
	// Running tells whether it has a QEMU here, be its vCPU paused or not.
	Running bool        `json:"running"`
	Role    plugin.Role `json:"role"`
	State   string      `json:"state"`
	Reason  string      `json:"reason"`
	// Peer is the host of the other copy, while there is one.
	Peer string `json:"peer,omitempty"`
	// Wanted is the peer that the domain's annotation asks for.
	Wanted string `json:"wanted,omitempty"`
}

// Domains lists all domains that libvirt has here, by name.
func (a *Agent) Domains(ctx context.Context) ([]DomainInfo, error) {
	all, err := a.virt.List(ctx)
	if err != nil {
		return nil, err
	}
	known := map[plugin.UUID]Status{}
	for _, s := range a.Status() {
		known[s.UUID] = s
	}
	list := []DomainInfo{}
	for _, i := range all {
		d, err := a.describe(ctx, i, known)
		if errors.Is(err, virt.ErrNoDomain) {
			continue // it ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Domain < list[j].Domain })
	return list, nil
}

// Domain tells about one domain, by name or by UUID.
func (a *Agent) Domain(ctx context.Context, name string) (DomainInfo, error) {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return DomainInfo{}, err
	}
	known := map[plugin.UUID]Status{}
	for _, s := range a.Status() {
		known[s.UUID] = s
	}
	return a.describe(ctx, info, known)
}

func (a *Agent) describe(ctx context.Context, i virt.Info, known map[plugin.UUID]Status) (DomainInfo, error) {
	d := DomainInfo{
		Domain: i.Name, UUID: i.UUID, Host: a.cfg.Host, Running: i.Active,
		Role: plugin.RoleNone, State: pair.Unprotected.String(), Reason: pair.NotEnabled.String(),
	}
	if s, ok := known[i.UUID]; ok {
		d.Role, d.State, d.Reason = s.Role, s.State.String(), s.Reason.String()
		switch s.State {
		case pair.Cloning, pair.Protected, pair.GoingLive:
			d.Peer = s.Peer // it stays known when the pair is over
		}
	}
	text, err := a.virt.XML(ctx, i.UUID, !i.Active)
	if err != nil {
		return d, err
	}
	dom, err := hooks.Parse([]byte(text))
	if err != nil {
		return d, err
	}
	// An annotation that is not understood is for Check to report; here it
	// must not hide the other domains.
	if wish, _, err := hooks.ReadAnnotation(dom); err == nil && !wish.Backup() {
		d.Wanted = wish.Peer
	}
	return d, nil
}
