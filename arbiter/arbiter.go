// SPDX-License-Identifier: Apache-2.0

// Package arbiter decides which of a pair's two hosts goes on with the domain
// when they can no longer agree with each other. It is the atomic
// test-and-set on shared storage of the paper, section 2.3.
//
// For each domain the arbiter keeps a growing series of epochs. An epoch names
// the two hosts of one protection and is born undecided; the first host that
// acquires it owns the domain from then on, and nothing takes that away again.
// A later epoch can be opened only by the owner, or by anybody after the owner
// closed the epoch on purpose.
//
// Guarantees, for every backend:
//
//   - At most one host ever acquires an epoch.
//   - A decision that was reported is durable.
//   - What cannot be read is never taken for "free".
//   - Epoch numbers of a domain only grow, also after Forget.
//   - No call outlives its context, whatever the storage does.
package arbiter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// Arbiter is the test-and-set that both hosts of a pair trust. Backends pass
// the suite in package arbitertest. All methods may be called concurrently.
//
// Every method may return an error that wraps ErrUnavailable. Then the outcome
// is not known: the caller changes nothing and asks again. Asking again is
// always safe, since every operation is idempotent for the host that did it.
type Arbiter interface {
	// Open starts a new, undecided epoch of domain for its two hosts. It
	// wraps ErrUndecided or ErrOwned in a *RefusedError unless the newest
	// epoch is absent, closed, or owned by primary.
	Open(ctx context.Context, domain plugin.UUID, primary, backup string) (plugin.Epoch, error)

	// Acquire is the test-and-set: the first of the epoch's hosts to call it
	// owns the domain from then on. The winner gets nil, however often it
	// asks. The other host gets a *LostError (ErrLost), anybody gets ErrStale
	// when a newer epoch exists, ErrNoRecord when the epoch does not, and
	// ErrNotMember if host is not one of the epoch's two hosts. In a closed
	// epoch nobody may go live: all get a *LostError that is also ErrClosed.
	Acquire(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error

	// Lookup gives the record of the newest epoch, or ErrNoRecord.
	Lookup(ctx context.Context, domain plugin.UUID) (Record, error)

	// Close marks the deliberate end of an epoch, the power-off of the pair:
	// either host may start the domain afterwards. Closing an undecided epoch
	// acquires it first, so that it cannot cross a failover; if the other
	// host owns the epoch, the answer is a *LostError and nothing is closed.
	Close(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error

	// Probe tells whether a decision about domain could be made now: it reads
	// what is known of it, and writes to the storage what decides nothing.
	Probe(ctx context.Context, domain plugin.UUID) error

	// Forget removes what is known of a domain. Its past epochs stay fenced.
	Forget(ctx context.Context, domain plugin.UUID) error
}

// Record is what the arbiter knows of one epoch. The zero Record stands for a
// domain that has none.
type Record struct {
	Domain  plugin.UUID  `json:"domain"`
	Epoch   plugin.Epoch `json:"epoch"`
	Primary string       `json:"primary"`
	Backup  string       `json:"backup"`
	// Owner is the host that acquired the epoch, empty while undecided.
	Owner string `json:"owner,omitempty"`
	// Closed tells that the owner ended the epoch on purpose.
	Closed bool `json:"closed,omitempty"`

	// The times are those of the hosts' own clocks. They inform people;
	// no decision rests on them.
	OpenedAt  time.Time `json:"opened_at"`
	DecidedAt time.Time `json:"decided_at,omitzero"`
	ClosedAt  time.Time `json:"closed_at,omitzero"`
}

// Undecided tells whether either host can still win the epoch.
func (r Record) Undecided() bool { return r.Epoch != 0 && r.Owner == "" && !r.Closed }

// Member tells whether host is one of the epoch's two hosts.
func (r Record) Member(host string) bool {
	return host != "" && (host == r.Primary || host == r.Backup)
}

var (
	// ErrLost: the other host owns the epoch. The caller's copy must not
	// live on. See LostError for who won.
	ErrLost = errors.New("epoch is owned by the other host")
	// ErrClosed: the epoch ended on purpose; nobody goes live in it.
	ErrClosed = errors.New("epoch is closed")
	// ErrStale: a newer epoch exists, or the epoch was forgotten.
	ErrStale = errors.New("epoch is not the newest of the domain")
	// ErrNoRecord: the arbiter knows no such domain or epoch.
	ErrNoRecord = errors.New("no arbiter record")
	// ErrNotMember: the host is neither primary nor backup of the epoch.
	ErrNotMember = errors.New("host is not part of the epoch")
	// ErrUndecided: Open was refused because either host of the newest epoch
	// may still go live in it.
	ErrUndecided = errors.New("newest epoch is undecided")
	// ErrOwned: Open was refused because another host owns the domain.
	ErrOwned = errors.New("domain is owned by another host")
	// ErrUnavailable: the storage did not answer, or not sensibly. Nothing is
	// decided as far as the caller knows; wait and ask again.
	ErrUnavailable = errors.New("arbiter storage not available")
	// ErrNotInitialised: the directory lacks the arbiter's marker, most often
	// because the shared storage is not mounted. It comes with ErrUnavailable.
	ErrNotInitialised = errors.New("not an arbiter directory; is the shared storage mounted there?")
	// ErrCorrupt: a record exists but cannot be trusted. See CorruptError.
	ErrCorrupt = errors.New("arbiter record is corrupt")
	// ErrInvalid: an argument makes no sense.
	ErrInvalid = errors.New("invalid argument")
)

// LostError tells who owns the epoch that the caller did not get. It is
// ErrLost, and ErrClosed as well if the owner closed the epoch.
type LostError struct {
	Domain plugin.UUID
	Epoch  plugin.Epoch
	Winner string
	Closed bool
}

func (e *LostError) Error() string {
	if e.Closed {
		return fmt.Sprintf("epoch %d of domain %s was ended on purpose by host %s", e.Epoch, e.Domain, e.Winner)
	}
	return fmt.Sprintf("epoch %d of domain %s is owned by host %s", e.Epoch, e.Domain, e.Winner)
}

// Is makes errors.Is find ErrLost, and ErrClosed where it applies.
func (e *LostError) Is(target error) bool {
	return target == ErrLost || e.Closed && target == ErrClosed
}

// StaleError tells which epoch overtook the caller's. It is ErrStale.
type StaleError struct {
	Domain plugin.UUID
	Epoch  plugin.Epoch
	// Newest is the domain's newest epoch, open or forgotten.
	Newest plugin.Epoch
}

func (e *StaleError) Error() string {
	if e.Newest == e.Epoch {
		return fmt.Sprintf("epoch %d of domain %s was forgotten", e.Epoch, e.Domain)
	}
	return fmt.Sprintf("epoch %d of domain %s is over; the newest is %d", e.Epoch, e.Domain, e.Newest)
}

// Is makes errors.Is find ErrStale.
func (e *StaleError) Is(target error) bool { return target == ErrStale }

// RefusedError tells which record kept Open from opening a new epoch. It wraps
// ErrUndecided or ErrOwned.
type RefusedError struct {
	Record Record
	Err    error
}

func (e *RefusedError) Error() string {
	r := e.Record
	if errors.Is(e.Err, ErrOwned) {
		return fmt.Sprintf("domain %s is owned by host %s since epoch %d; start or protect it there", r.Domain, r.Owner, r.Epoch)
	}
	return fmt.Sprintf("epoch %d of domain %s (primary %s, backup %s) is undecided; acquire or close it first",
		r.Epoch, r.Domain, r.Primary, r.Backup)
}

// Unwrap gives ErrUndecided or ErrOwned.
func (e *RefusedError) Unwrap() error { return e.Err }

// CorruptError tells which record cannot be trusted, and why. It is ErrCorrupt.
type CorruptError struct {
	// Path is where the backend keeps the record.
	Path   string
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("arbiter record %s is corrupt: %s", e.Path, e.Reason)
}

// Is makes errors.Is find ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// maxHost bounds host names, so that a record always fits its file.
const maxHost = 255

func checkHost(host string) error {
	switch {
	case host == "":
		return fmt.Errorf("%w: empty host name", ErrInvalid)
	case len(host) > maxHost:
		return fmt.Errorf("%w: host name of %d bytes, at most %d are allowed", ErrInvalid, len(host), maxHost)
	case strings.ToValidUTF8(host, "") != host:
		return fmt.Errorf("%w: host name %q is not UTF-8", ErrInvalid, host)
	}
	return nil
}

func checkHosts(primary, backup string) error {
	if err := checkHost(primary); err != nil {
		return fmt.Errorf("primary: %w", err)
	}
	if err := checkHost(backup); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	if primary == backup {
		return fmt.Errorf("%w: primary and backup are both host %q", ErrInvalid, primary)
	}
	return nil
}
