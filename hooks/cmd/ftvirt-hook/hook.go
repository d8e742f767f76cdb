// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
)

const (
	// maxXML is libvirt's own limit for a domain's XML.
	maxXML = 16 << 20
	// notifyLimit bounds what telling the agent may cost.
	notifyLimit = 200 * time.Millisecond
	// reserve is kept back from the deadline to say why a start is refused.
	reserve = 500 * time.Millisecond
)

// decider is what of an arbiter a hook needs.
type decider interface {
	Lookup(ctx context.Context, domain plugin.UUID) (arbiter.Record, error)
	Acquire(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error
}

type hook struct {
	load    func() (config.Config, error)
	arbiter func(config.Arbiter) (decider, error)
}

// call is one run, as libvirt passes it: OBJECT OPERATION SUBOPERATION EXTRA.
type call struct{ name, op, subop string }

// guarded tells the operation before a start, the only one that we may refuse.
func (c call) guarded() bool { return c.op == "prepare" && c.subop == "begin" }

func parseCall(args []string) (call, error) {
	if len(args) != 4 {
		return call{}, fmt.Errorf("got %d arguments, want 4: DOMAIN OPERATION SUBOPERATION EXTRA; libvirt is to run this, from /etc/libvirt/hooks/qemu.d", len(args))
	}
	return call{name: args[0], op: args[1], subop: args[2]}, nil
}

// run gives the exit status. It writes nothing to standard output: for
// "migrate" and "restore" that means that libvirt takes the XML as it is.
func (h hook) run(ctx context.Context, args []string, stdin io.Reader, stderr io.Writer) int {
	c, err := parseCall(args)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "ftvirt-hook:", err)
		return exitStatus(len(args) < 2 || args[1] != "reconnect")
	}
	guard := c.guarded()
	text, err := readAll(ctx, stdin)
	if err == nil && guard {
		err = h.mayStart(ctx, text)
	} else if !guard {
		err = nil // nothing but a start is ours to refuse
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "ftvirt: domain %s is not started: %v\n", c.name, err)
		return 1
	}
	h.notify(ctx, c, text)
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

// mayStart refuses a copy of a protected domain that must not run. A domain
// without our annotation is let through before anything that could fail.
func (h hook) mayStart(ctx context.Context, text []byte) error {
	if !bytes.Contains(text, []byte(hooks.Namespace)) {
		return nil
	}
	dom, err := hooks.Parse(text)
	if err != nil {
		return err
	}
	a, protected, err := hooks.ReadAnnotation(dom)
	if err != nil {
		return fmt.Errorf("%w; correct it with virsh edit", err)
	}
	if !protected {
		return nil
	}
	id, err := plugin.ParseUUID(dom.UUID)
	if err != nil {
		return err
	}
	cfg, err := h.load()
	if err != nil {
		return fmt.Errorf("it is protected, and the configuration that names the arbiter cannot be used: %w", err)
	}
	arb, err := h.arbiter(cfg.Arbiter)
	if err != nil {
		return fmt.Errorf("it is protected, and the arbiter cannot be asked: %w", err)
	}
	if d, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, d.Add(-reserve))
		defer cancel()
	}
	return decide(ctx, arb, id, cfg.Host, a)
}

// decide asks the arbiter, and takes an undecided epoch before the copy here
// may run.
func decide(ctx context.Context, arb decider, id plugin.UUID, host string, a hooks.Annotation) error {
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

// notify tells the agent what libvirt does, if the agent listens.
func (h hook) notify(ctx context.Context, c call, text []byte) {
	cfg, err := h.load()
	if err != nil {
		cfg = config.Default()
	}
	var dom struct {
		UUID string `xml:"uuid"`
	}
	_ = xml.Unmarshal(text, &dom) // libvirt gives some operations no XML
	line, err := json.Marshal(hooks.Event{Op: c.op, SubOp: c.subop, UUID: dom.UUID, Name: c.name})
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, notifyLimit)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", cfg.Agent.HookSocket())
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	if d, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(d) // a socket that cannot is as good as closed
	}
	_, _ = conn.Write(append(line, '\n'))
}
