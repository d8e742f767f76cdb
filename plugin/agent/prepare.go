// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"

	"libvirt.org/go/libvirtxml"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin/virt"
)

var (
	// ErrRunning is returned for what can be done to a definition only while no
	// QEMU runs from it.
	ErrRunning = errors.New("the domain is running")
	// ErrTransient is returned for a domain that has no definition to start from again.
	ErrTransient = errors.New("the domain is transient")
)

// Prepare rewrites the definition of a domain that is not running, so that it
// starts ready to be protected by peer. It does not start it, nor is the
// domain protected by that.
func (a *Agent) Prepare(ctx context.Context, name, peer string) error {
	return a.prepare(ctx, name, peer, false)
}

// PrepareNext does the same for a domain that may be running: what runs is left
// as it is, and its next start is ready.
func (a *Agent) PrepareNext(ctx context.Context, name, peer string) error {
	return a.prepare(ctx, name, peer, true)
}

func (a *Agent) prepare(ctx context.Context, name, peer string, running bool) error {
	if _, err := a.cfg.Peer(peer); err != nil {
		return err
	}
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return err
	}
	switch {
	case info.Active && !running:
		return fmt.Errorf("%w: use 'ftvirt enable %s --peer %s'", ErrRunning, info.Name, peer)
	case !info.Persistent:
		// To define it would make it persistent, which nobody asked for.
		return fmt.Errorf("%w: it has no definition to be made ready; define it with 'virsh define'", ErrTransient)
	}
	info.Active = false // it is the definition that counts, not what runs
	problems, err := a.checkDomain(ctx, info, peer)
	if err != nil {
		return err
	}
	if len(problems) > 0 {
		return &hooks.NotReadyError{Domain: info.Name, Problems: problems}
	}
	_, err = a.redefine(ctx, info, func(text string) (string, error) { return readyXML(text, peer, a.transformOptions()) })
	return err
}

// Restore gives a domain that is not running the definition back that it had
// before Prepare, with what was edited since.
func (a *Agent) Restore(ctx context.Context, name string) error {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return err
	}
	if info.Active {
		return fmt.Errorf("%w: use 'ftvirt disable %s'", ErrRunning, info.Name)
	}
	_, err = a.redefine(ctx, info, plainXML)
	return err
}

// redefine changes the definition of a domain, and tells whether there was
// anything to change.
func (a *Agent) redefine(ctx context.Context, info virt.Info, change func(string) (string, error)) (bool, error) {
	text, err := a.virt.XML(ctx, info.UUID, true)
	if err != nil {
		return false, err
	}
	// As libvirt and as we write the same may differ.
	before, err := edit(text, func(dom *libvirtxml.Domain) (*libvirtxml.Domain, error) { return dom, nil })
	if err != nil {
		return false, fmt.Errorf("definition of %s: %w", info.Name, err)
	}
	after, err := change(text)
	if err != nil {
		return false, fmt.Errorf("definition of %s: %w", info.Name, err)
	}
	if before == after {
		return false, nil
	}
	_, err = a.virt.Define(ctx, after)
	return err == nil, err
}

// readyXML transforms a definition and notes the operator's wish in it.
func readyXML(text, peer string, o hooks.Options) (string, error) {
	return edit(text, func(dom *libvirtxml.Domain) (*libvirtxml.Domain, error) {
		if err := hooks.WriteAnnotation(dom, hooks.Annotation{Mode: hooks.ModeProtected, Peer: peer}); err != nil {
			return nil, err
		}
		return hooks.Transform(dom, o)
	})
}

// plainXML takes out of a definition all that readyXML put in.
func plainXML(text string) (string, error) {
	return edit(text, func(dom *libvirtxml.Domain) (*libvirtxml.Domain, error) {
		out, err := hooks.Plain(dom)
		if err != nil {
			return nil, err
		}
		return out, hooks.RemoveAnnotation(out)
	})
}

func edit(text string, change func(*libvirtxml.Domain) (*libvirtxml.Domain, error)) (string, error) {
	dom, err := hooks.Parse([]byte(text))
	if err != nil {
		return "", err
	}
	if dom, err = change(dom); err != nil {
		return "", err
	}
	return dom.Marshal()
}

func (a *Agent) transformOptions() hooks.Options {
	return hooks.Options{
		PluginFile: a.cfg.Agent.PluginFile, PluginSocket: a.cfg.Agent.PluginSocket, ICountShift: a.cfg.Replay.ICountShift,
	}
}
