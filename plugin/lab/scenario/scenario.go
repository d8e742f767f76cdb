// SPDX-License-Identifier: Apache-2.0

// Package scenario holds the steps of the demo, of the soak runs and of the
// end-to-end tests: protect a guest of the lab, load it, kill something, and
// judge what clients, disks and consoles saw of it. Each step has a deadline,
// and its error says what was waited for and what the agents said instead.
package scenario

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
)

// Deadlines of the steps, for two cores that run two emulated guests at once.
const (
	agentTimeout   = 10 * time.Second
	bootTimeout    = 90 * time.Second
	protectTimeout = 60 * time.Second
	liveTimeout    = 15 * time.Second
	removeTimeout  = 15 * time.Second
	commandTimeout = 10 * time.Second
	verifyTimeout  = 60 * time.Second
)

const pollInterval = 10 * time.Millisecond

// States, modes and reasons of agents that the steps wait for.
const (
	stateUnprotected = "unprotected"
	stateCloning     = "cloning"
	stateProtected   = "protected"
	stateGoingLive   = "going-live"
	stateLive        = "live"
	modeNone         = "none"
	reasonDivergence = "divergence"
)

// ErrState is wrapped when a domain ended in another state than it should.
var ErrState = errors.New("unexpected state")

// Bed is a running lab whose agents answer and whose arbiter is ready.
type Bed struct {
	*lab.Lab
	agents map[string]*client.Client
}

// Up brings up a lab and makes its shared directory the arbiter's. On any error
// nothing of the lab stays.
func Up(ctx context.Context, o lab.Options) (*Bed, error) {
	l, err := lab.Up(ctx, o)
	if err != nil {
		return nil, err
	}
	b := &Bed{Lab: l, agents: map[string]*client.Client{}}
	if err := b.ready(ctx, !o.NoAgent); err != nil {
		return nil, errors.Join(err, l.Down(context.WithoutCancel(ctx)))
	}
	return b, nil
}

func (b *Bed) ready(ctx context.Context, agents bool) error {
	hosts := b.Hosts()
	if _, err := arbiter.InitDir(ctx, arbiter.DirConfig{Path: hosts[0].Path(lab.ArbiterDir)}); err != nil {
		return err
	}
	for _, h := range hosts {
		b.agents[h.Name] = client.New(h.Path(config.Default().Agent.AdminSocket))
		if !agents {
			continue
		}
		if err := b.WaitAgent(ctx, h); err != nil {
			return err
		}
	}
	return nil
}

// Pair returns the first two hosts.
func (b *Bed) Pair() (hosta, hostb *lab.Host) {
	hosts := b.Hosts()
	return hosts[0], hosts[1]
}

// Agent gives a client of a host's agent.
func (b *Bed) Agent(h *lab.Host) *client.Client { return b.agents[h.Name] }

// WaitAgent returns when the host's agent answers.
func (b *Bed) WaitAgent(ctx context.Context, h *lab.Host) error {
	var last error
	err := poll(ctx, agentTimeout, func(ctx context.Context) (bool, error) {
		_, last = b.Agent(h).Status(ctx)
		return last == nil, nil
	})
	if err == nil {
		return nil
	}
	text, _ := h.AgentLog()
	return fmt.Errorf("agent of %s: %w: %w; its log ends:\n%s", h.Name, err, last, tail(text, 10))
}

// RestartAgent starts a host's agent afresh, with a changed configuration if
// change is not nil.
func (b *Bed) RestartAgent(ctx context.Context, h *lab.Host, change func(*config.Config)) error {
	if err := h.WriteConfig(change); err != nil {
		return err
	}
	if err := h.StopAgent(ctx); err != nil {
		return err
	}
	return b.StartAgent(ctx, h)
}

// StartAgent starts a host's agent and waits until it answers.
func (b *Bed) StartAgent(ctx context.Context, h *lab.Host) error {
	if err := h.StartAgent(ctx); err != nil {
		return err
	}
	return b.WaitAgent(ctx, h)
}

// Wait asks a host's agent about a domain until done is satisfied or fails. An
// agent that does not answer is asked again.
func (b *Bed) Wait(ctx context.Context, h *lab.Host, domain, what string, limit time.Duration,
	done func(client.Status) (bool, error),
) (client.Status, error) {
	var last client.Status
	var lastErr error
	err := poll(ctx, limit, func(ctx context.Context) (bool, error) {
		s, err := b.Agent(h).StatusOf(ctx, domain)
		if err != nil {
			if ctx.Err() == nil {
				lastErr = err
			}
			return false, nil
		}
		last, lastErr = s, nil
		return done(s)
	})
	switch {
	case err == nil:
		return last, nil
	case lastErr != nil:
		return last, fmt.Errorf("waiting for %s: %w: %w", what, err, lastErr)
	default:
		return last, fmt.Errorf("waiting for %s: %w; %s", what, err, last)
	}
}

// WaitState waits until a domain is in the state on the host.
func (b *Bed) WaitState(ctx context.Context, h *lab.Host, domain, state string, limit time.Duration) (client.Status, error) {
	return b.Wait(ctx, h, domain, fmt.Sprintf("%s to be %s on %s", domain, state, h.Name), limit,
		func(s client.Status) (bool, error) { return s.State == state, nil })
}

// Running tells whether the host's libvirt runs the domain.
func (b *Bed) Running(ctx context.Context, h *lab.Host, domain string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	out, err := h.Virsh(ctx, "list", "--name")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(out) {
		if strings.TrimSpace(line) == domain {
			return true, nil
		}
	}
	return false, nil
}

// WaitGone waits until the host's libvirt does not run the domain any more.
func (b *Bed) WaitGone(ctx context.Context, h *lab.Host, domain string) error {
	err := poll(ctx, removeTimeout, func(ctx context.Context) (bool, error) {
		running, err := b.Running(ctx, h, domain)
		return !running, err
	})
	if err != nil {
		return fmt.Errorf("waiting for the end of %s on %s: %w", domain, h.Name, err)
	}
	return nil
}

// poll calls done until it returns true or an error, or the limit is over.
func poll(ctx context.Context, limit time.Duration, done func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		ok, err := done(ctx)
		if err != nil && ctx.Err() == nil {
			return err
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// Pause lets the scenario run for a while.
func Pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// tail gives the last lines of a text.
func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
