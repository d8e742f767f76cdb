// SPDX-License-Identifier: Apache-2.0

package arbitertest

import (
	"context"
	"fmt"
	"sync"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
)

// Memory is an arbiter for tests of its users: two agents in one process. It
// passes the suite, as far as that does not need processes or files.
type Memory struct {
	mu      sync.Mutex
	err     error // why the storage cannot be reached, nil if it can
	domains map[plugin.UUID]*memoryDomain
}

type memoryDomain struct {
	rec   arbiter.Record
	floor plugin.Epoch
}

var _ arbiter.Arbiter = (*Memory)(nil)

// NewMemory gives an arbiter that knows no domain.
func NewMemory() *Memory { return &Memory{domains: make(map[plugin.UUID]*memoryDomain)} }

// SetUnavailable makes every call fail with arbiter.ErrUnavailable and cause,
// until it is called with nil.
func (m *Memory) SetUnavailable(cause error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = cause
}

// enter locks m; the caller unlocks unless there is an error.
func (m *Memory) enter(ctx context.Context, domain plugin.UUID) (*memoryDomain, error) {
	m.mu.Lock()
	err := m.err
	if err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		m.mu.Unlock()
		return nil, fmt.Errorf("%w: %w", arbiter.ErrUnavailable, err)
	}
	d := m.domains[domain]
	if d == nil {
		d = &memoryDomain{}
		m.domains[domain] = d
	}
	return d, nil
}

// Open implements arbiter.Arbiter.
func (m *Memory) Open(ctx context.Context, domain plugin.UUID, primary, backup string) (plugin.Epoch, error) {
	if primary == "" || backup == "" || primary == backup {
		return 0, fmt.Errorf("%w: hosts %q and %q", arbiter.ErrInvalid, primary, backup)
	}
	d, err := m.enter(ctx, domain)
	if err != nil {
		return 0, err
	}
	defer m.mu.Unlock()
	if d.rec.Undecided() {
		return 0, &arbiter.RefusedError{Record: d.rec, Err: arbiter.ErrUndecided}
	}
	if d.rec.Owner != "" && !d.rec.Closed && d.rec.Owner != primary {
		return 0, &arbiter.RefusedError{Record: d.rec, Err: arbiter.ErrOwned}
	}
	d.rec = arbiter.Record{
		Domain: domain, Epoch: max(d.rec.Epoch, d.floor) + 1, Primary: primary, Backup: backup,
	}
	return d.rec.Epoch, nil
}

// Acquire implements arbiter.Arbiter.
func (m *Memory) Acquire(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error {
	d, err := m.enter(ctx, domain)
	if err != nil {
		return err
	}
	defer m.mu.Unlock()
	return d.acquire(domain, epoch, host)
}

func (d *memoryDomain) acquire(domain plugin.UUID, epoch plugin.Epoch, host string) error {
	switch newest := max(d.rec.Epoch, d.floor); {
	case host == "":
		return fmt.Errorf("%w: empty host name", arbiter.ErrInvalid)
	case epoch <= d.floor || epoch < newest:
		return &arbiter.StaleError{Domain: domain, Epoch: epoch, Newest: newest}
	case epoch > newest:
		return fmt.Errorf("%w: epoch %d", arbiter.ErrNoRecord, epoch)
	case !d.rec.Member(host):
		return fmt.Errorf("%w: %s", arbiter.ErrNotMember, host)
	case d.rec.Owner == "":
		d.rec.Owner = host
		return nil
	case d.rec.Owner != host || d.rec.Closed:
		return &arbiter.LostError{Domain: domain, Epoch: epoch, Winner: d.rec.Owner, Closed: d.rec.Closed}
	default:
		return nil
	}
}

// Lookup implements arbiter.Arbiter.
func (m *Memory) Lookup(ctx context.Context, domain plugin.UUID) (arbiter.Record, error) {
	d, err := m.enter(ctx, domain)
	if err != nil {
		return arbiter.Record{}, err
	}
	defer m.mu.Unlock()
	if d.rec.Epoch == 0 {
		return arbiter.Record{}, fmt.Errorf("%w: domain %s", arbiter.ErrNoRecord, domain)
	}
	return d.rec, nil
}

// Close implements arbiter.Arbiter.
func (m *Memory) Close(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error {
	d, err := m.enter(ctx, domain)
	if err != nil {
		return err
	}
	defer m.mu.Unlock()
	if d.rec.Closed && d.rec.Epoch == epoch && d.rec.Member(host) {
		return nil
	}
	if err := d.acquire(domain, epoch, host); err != nil {
		return err
	}
	d.rec.Closed = true
	return nil
}

// Probe implements arbiter.Arbiter.
func (m *Memory) Probe(ctx context.Context, domain plugin.UUID) error {
	if _, err := m.enter(ctx, domain); err != nil {
		return err
	}
	m.mu.Unlock()
	return nil
}

// Forget implements arbiter.Arbiter.
func (m *Memory) Forget(ctx context.Context, domain plugin.UUID) error {
	d, err := m.enter(ctx, domain)
	if err != nil {
		return err
	}
	defer m.mu.Unlock()
	d.floor, d.rec = max(d.floor, d.rec.Epoch), arbiter.Record{}
	return nil
}
