// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"

	"libvirt.org/go/libvirtxml"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/virt"
)

// What operators write into the metadata of domains is looked at when the agent
// starts, when libvirtd is back, and when libvirt tells of a change, also of
// domains that never had to do with ftvirt: an annotation that is wrong must not
// go unnoticed, and one that is right is all that an operator has to write.

// notice has the domain's annotation looked at and followed. It does not block.
func (a *Agent) notice(id plugin.UUID) {
	a.kickID(id)
	a.lookSoon(id)
}

func (a *Agent) lookSoon(id plugin.UUID) {
	select {
	case a.changed <- id:
	default:
		a.noticeAll()
	}
}

// noticeAll has all domains looked at.
func (a *Agent) noticeAll() {
	select {
	case a.changedAll <- struct{}{}:
	default: // they will be
	}
}

// watchWishes looks at annotations as long as the agent runs.
func (a *Agent) watchWishes(ctx context.Context) {
	a.noticeAll()
	for {
		select {
		case id := <-a.changed:
			a.look(ctx, id)
		case <-a.changedAll:
			list, err := a.virt.List(ctx)
			if err != nil {
				a.log.Warn("annotations are not looked at", "error", err)
				continue // when libvirtd is back
			}
			for _, i := range list {
				a.look(ctx, i.UUID)
				a.kickID(i.UUID)
			}
		case <-ctx.Done():
			return
		}
	}
}

// look reads one domain's annotation, reports it if it is wrong, and makes the
// definition of a domain ready that is off and is to be protected.
func (a *Agent) look(ctx context.Context, id plugin.UUID) {
	info, wish, err := a.wishOf(ctx, id)
	switch {
	case errors.Is(err, virt.ErrNoDomain):
		err = nil // and what was wrong with it is gone, too
	case err != nil && !errors.Is(err, hooks.ErrAnnotation) && !errors.Is(err, hooks.ErrMetadata):
		a.log.Warn("annotation", "domain", id, "error", err)
		return
	}
	a.setWrong(info, id, err)
	if err == nil && info.Persistent && wish.Mode != "" {
		// A host to which the domain does not belong must not start it.
		if on, err := a.virt.Autostart(ctx, id); err != nil || on {
			a.domain(id).lookAtDefinition()
		}
	}
	if err != nil || !a.cfg.Protect.Auto || info.Active || !info.Persistent || wish.Mode != hooks.ModeProtected || wish.Backup() {
		return
	}
	changed, err := a.redefine(ctx, info, func(text string) (string, error) {
		return edit(text, func(dom *libvirtxml.Domain) (*libvirtxml.Domain, error) {
			return hooks.Transform(dom, a.transformOptions())
		})
	})
	if ctx.Err() != nil {
		return
	}
	a.mu.Lock()
	d := a.domains[id]
	a.mu.Unlock()
	if d == nil && err != nil {
		d = a.domain(id)
	}
	if d != nil {
		d.setFailure(err)
	}
	switch {
	case err != nil:
		a.log.Warn("the domain cannot be protected when it starts", "domain", info.Name, "error", err)
	case changed:
		a.log.Info("the definition is made ready for protection", "domain", info.Name)
	}
}

// wishOf reads the annotations of the definition and of the running domain; the
// first that is wrong is the error.
func (a *Agent) wishOf(ctx context.Context, id plugin.UUID) (virt.Info, hooks.Annotation, error) {
	var wish hooks.Annotation
	info, err := a.virt.Lookup(ctx, id)
	if err != nil {
		return info, wish, err
	}
	for _, inactive := range []bool{false, true} {
		if inactive && !info.Persistent || !inactive && !info.Active {
			continue
		}
		text, err := a.virt.PublicXML(ctx, id, inactive)
		if err != nil {
			return info, wish, err
		}
		dom, err := hooks.Parse([]byte(text))
		if err != nil {
			return info, wish, err
		}
		if wish, _, err = hooks.ReadAnnotation(dom); err != nil {
			return info, wish, err
		}
	}
	return info, wish, nil
}

// setWrong notes what is wrong with a domain's annotation, for its status, and
// logs it once.
func (a *Agent) setWrong(info virt.Info, id plugin.UUID, wrong error) {
	a.mu.Lock()
	d := a.domains[id]
	a.mu.Unlock()
	if d == nil && wrong == nil {
		return
	}
	if d == nil {
		d = a.domain(id)
	}
	text := ""
	if wrong != nil {
		text = wrong.Error()
	}
	d.mu.Lock()
	before := d.wrong
	d.wrong = text
	if info.Name != "" {
		d.name = info.Name
	}
	d.mu.Unlock()
	if text != "" && text != before {
		a.log.Error("the annotation is not understood", "domain", info.Name, "error", text)
	}
}
