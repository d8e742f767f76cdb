// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
	"libvirt.org/go/libvirtxml"
)

const (
	// maxXML is libvirt's own limit for a domain's XML.
	maxXML = 16 << 20
	// reserve is kept back from the deadline to say why a start is refused.
	reserve = 500 * time.Millisecond
)

// decider is what of an arbiter a hook needs.
type decider interface {
	Lookup(ctx context.Context, domain plugin.UUID) (arbiter.Record, error)
	Acquire(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error
}

type hook struct {
	load func() (config.Config, error)
	// ask has the arbiter decide whether this host may start the domain.
	ask func(context.Context, config.Config, plugin.UUID, hooks.Annotation) error
}

// call is one run, as libvirt passes it: OBJECT OPERATION SUBOPERATION EXTRA.
type call struct{ name, op, subop string }

// rule is what is done at an operation of libvirt. All others, which are start,
// started, stopped, release, reconnect, attach, the end of prepare and those of
// a later libvirt, are left alone: the agent learns of them from libvirt itself,
// and nothing but a start is ours to refuse.
type rule struct {
	// refused completes "domain web is not ..." where the rule can refuse.
	refused string
	// decide gives the XML that libvirt is to take instead, or nil.
	decide func(hook, context.Context, []byte) ([]byte, error)
}

var rules = map[[2]string]rule{
	{"prepare", "begin"}: {"started", hook.mayStart},
	{"migrate", "begin"}: {"migrated to this host", hook.mayArrive},
	{"restore", "begin"}: {"", hook.restored},
}

func (c call) rule() (rule, bool) {
	r, ok := rules[[2]string{c.op, c.subop}]
	return r, ok
}

// guarded tells an operation that we may refuse.
func (c call) guarded() bool {
	r, _ := c.rule()
	return r.refused != ""
}

func parseCall(args []string) (call, error) {
	if len(args) != 4 {
		return call{}, fmt.Errorf("got %d arguments, want 4: DOMAIN OPERATION SUBOPERATION EXTRA; libvirt is to run this, from /etc/libvirt/hooks/qemu.d", len(args))
	}
	return call{name: args[0], op: args[1], subop: args[2]}, nil
}

// run gives the exit status. Nothing on standard output means, for "migrate" and
// "restore", that libvirt takes the XML as it is.
func (h hook) run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c, err := parseCall(args)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "ftvirt-hook:", err)
		return exitStatus(len(args) < 2 || args[1] != "reconnect")
	}
	r, ok := c.rule()
	if !ok {
		return 0
	}
	text, err := readAll(ctx, stdin)
	if err == nil {
		text, err = r.decide(h, ctx, text)
	}
	if err != nil {
		if !c.guarded() {
			_, _ = fmt.Fprintf(stderr, "ftvirt: domain %s: %v\n", c.name, err)
			return 0
		}
		_, _ = fmt.Fprintf(stderr, "ftvirt: domain %s is not %s: %v\n", c.name, r.refused, err)
		return 1
	}
	if _, err := stdout.Write(text); err != nil {
		_, _ = fmt.Fprintf(stderr, "ftvirt: domain %s: %v\n", c.name, err)
		return exitStatus(c.guarded())
	}
	return 0
}

func exitStatus(failed bool) int {
	if failed {
		return 1
	}
	return 0
}

// readAll reads the XML that libvirt writes. A read that hangs is left behind:
// the process ends soon.
func readAll(ctx context.Context, r io.Reader) ([]byte, error) {
	type result struct {
		text []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		text, err := io.ReadAll(io.LimitReader(r, maxXML+1))
		if err == nil && len(text) > maxXML {
			err = fmt.Errorf("its XML is larger than %d MiB", maxXML>>20)
		}
		done <- result{text, err}
	}()
	select {
	case got := <-done:
		return got.text, got.err
	case <-ctx.Done():
		return nil, fmt.Errorf("libvirt did not pass the XML of the domain: %w", ctx.Err())
	}
}

// annotated reads the annotation of a domain's XML. A domain without one is
// told apart before anything that could fail.
func annotated(text []byte) (*libvirtxml.Domain, hooks.Annotation, bool, error) {
	if !bytes.Contains(text, []byte(hooks.Namespace)) {
		return nil, hooks.Annotation{}, false, nil
	}
	dom, err := hooks.Parse(text)
	if err != nil {
		return nil, hooks.Annotation{}, false, err
	}
	a, ok, err := hooks.ReadAnnotation(dom)
	if err != nil {
		return nil, a, false, fmt.Errorf("%w; correct it with virsh edit", err)
	}
	return dom, a, ok, nil
}

// mayStart refuses a copy of a protected domain that must not run.
func (h hook) mayStart(ctx context.Context, text []byte) ([]byte, error) {
	dom, a, ok, err := annotated(text)
	if err != nil || !ok {
		return nil, err
	}
	id, err := plugin.ParseUUID(dom.UUID)
	if err != nil {
		return nil, err
	}
	cfg, err := h.load()
	if err != nil {
		return nil, fmt.Errorf("it is protected, and the configuration that names the arbiter cannot be used: %w", err)
	}
	if d, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, d.Add(-reserve))
		defer cancel()
	}
	return nil, h.ask(ctx, cfg, id, a)
}

// mayArrive is asked on the host that libvirt migrates a domain to. The arbiter
// would not know that a protected one is there, and its backup would follow a
// copy that has left.
func (h hook) mayArrive(_ context.Context, text []byte) ([]byte, error) {
	_, a, ok, err := annotated(text)
	if err != nil || !ok {
		return nil, err
	}
	if a.Mode == hooks.ModeProtected || a.Backup() {
		return nil, errors.New("it is protected by ftvirt, whose pairs move otherwise: to bring it to its backup's host use " +
			"'ftvirt failover', to bring its backup elsewhere 'ftvirt migrate-backup'; or take the protection away with 'ftvirt disable'")
	}
	return h.filter(text, hooks.MigrateFilter), nil
}

// restored brings the paths of a saved domain up to date. What cannot be
// changed is restored as it was saved, unprotected.
func (h hook) restored(_ context.Context, text []byte) ([]byte, error) {
	if _, _, ok, err := annotated(text); err != nil || !ok {
		return nil, err
	}
	return h.filter(text, hooks.RestoreFilter), nil
}

func (h hook) filter(text []byte, filter func([]byte, hooks.Options) ([]byte, error)) []byte {
	cfg, err := h.load()
	if err != nil {
		return nil
	}
	out, err := filter(text, hooks.Options{
		PluginFile: cfg.Agent.PluginFile, PluginSocket: cfg.Agent.PluginSocket, ICountShift: cfg.Replay.ICountShift,
	})
	if err != nil {
		return nil
	}
	return out
}

// decide asks the arbiter, and takes an undecided epoch before the copy here
// may run.
//
// kept is the epoch of the definition that the agent keeps, 0 if none: one that
// libvirt does not have yet, of a domain whose newest disks came with that epoch.
func decide(ctx context.Context, arb decider, id plugin.UUID, host string, a hooks.Annotation, kept plugin.Epoch) error {
	rec, err := arb.Lookup(ctx, id)
	switch {
	case errors.Is(err, arbiter.ErrNoRecord):
		rec = arbiter.Record{}
	case err != nil:
		return unanswered(err)
	}
	if a.Backup() && rec.Epoch != a.Epoch {
		return fmt.Errorf("it is the backup of epoch %d, and the domain is in epoch %d; run ftvirt status", a.Epoch, rec.Epoch)
	}
	v := arbiter.MayStart(rec, host, a.Backup())
	switch v.Decision {
	case arbiter.StartAllowed:
		if kept != 0 && kept == rec.Epoch && !a.Backup() {
			return fmt.Errorf("its definition here may name older disks than those of epoch %d, which this host owns: "+
				"ftvirt's agent is about to replace it; try again, and see 'ftvirt status' if that lasts", kept)
		}
		return nil
	case arbiter.StartAfterAcquire:
		// The backup may be going live at this moment.
		err := arb.Acquire(ctx, id, rec.Epoch, host)
		if errors.Is(err, arbiter.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
			return unanswered(err)
		}
		if err != nil {
			return fmt.Errorf("the copy here is stale: %w", err)
		}
		return nil
	default:
		return errors.New(v.Reason)
	}
}

func unanswered(err error) error {
	return fmt.Errorf("it is protected, and the arbiter does not say which host may run it: %w; "+
		"try again when the arbiter's storage answers", err)
}
