// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"encoding/json"
	"fmt"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// state is all that a backend knows of one domain. It only ever moves on: the
// floor and the epoch grow, an owner is never taken back, a closed epoch stays
// closed. So no state comes twice, and comparing states is enough to tell that
// nobody was in between.
type state struct {
	// rec is the newest epoch that is not void; its Epoch is 0 if none.
	rec Record
	// floor is the newest epoch that Forget voided.
	floor plugin.Epoch
	// token is that of the call of Open which made rec. It tells a host whose
	// answer was lost that the epoch is its own.
	token string
	// from is the identity of the arbiter that it was read from. It is not stored.
	from string
}

// refuseOpen says why no epoch may follow s with the given primary.
func (s state) refuseOpen(primary string) error {
	switch {
	case s.rec.Epoch == 0, s.rec.Closed, s.rec.Owner == primary:
		return nil
	case s.rec.Owner != "":
		return &RefusedError{Record: s.rec, Err: ErrOwned}
	default:
		return &RefusedError{Record: s.rec, Err: ErrUndecided}
	}
}

// newest is the last epoch number that was given out.
func (s state) newest() plugin.Epoch { return max(s.rec.Epoch, s.floor) }

// member gives the record of epoch if that is the newest, and host part of it.
func (s state) member(domain plugin.UUID, epoch plugin.Epoch, host string) (Record, error) {
	switch newest := s.newest(); {
	case epoch <= s.floor || epoch < newest:
		return Record{}, &StaleError{Domain: domain, Epoch: epoch, Newest: newest}
	case epoch > newest:
		return Record{}, fmt.Errorf("%w: domain %s has no epoch %d", ErrNoRecord, domain, epoch)
	case !s.rec.Member(host):
		return Record{}, fmt.Errorf("%w: epoch %d of domain %s is between hosts %s and %s, not %s",
			ErrNotMember, epoch, domain, s.rec.Primary, s.rec.Backup, host)
	}
	return s.rec, nil
}

// The transitions below give the state that follows. Each is idempotent for the
// call that it belongs to: given the state that it led to, however late, it
// changes nothing and gives the same answer. A backend may therefore repeat it
// when it does not know whether an earlier try came through. With an error,
// the state stays as it is.

// open starts the epoch after the newest; token is random for each call.
func (s state) open(domain plugin.UUID, primary, backup, token string, now time.Time) (state, error) {
	if s.rec.Epoch != 0 && s.token == token {
		return s, nil
	}
	if err := s.refuseOpen(primary); err != nil {
		return s, err
	}
	s.rec = Record{Domain: domain, Epoch: s.newest() + 1, Primary: primary, Backup: backup, OpenedAt: now}
	s.token = token
	return s, nil
}

// acquire is the test-and-set.
func (s state) acquire(domain plugin.UUID, epoch plugin.Epoch, host string, now time.Time) (state, error) {
	rec, err := s.member(domain, epoch, host)
	switch {
	case err != nil:
		return s, err
	case rec.Owner == "":
		s.rec.Owner, s.rec.DecidedAt = host, now
		return s, nil
	case rec.Owner != host || rec.Closed:
		return s, &LostError{Domain: domain, Epoch: epoch, Winner: rec.Owner, Closed: rec.Closed}
	}
	return s, nil
}

// close acquires the epoch if it is undecided, and ends it.
func (s state) close(domain plugin.UUID, epoch plugin.Epoch, host string, now time.Time) (state, error) {
	if rec, err := s.member(domain, epoch, host); err == nil && rec.Closed {
		return s, nil
	}
	next, err := s.acquire(domain, epoch, host, now)
	if err != nil {
		return s, err
	}
	next.rec.Closed, next.rec.ClosedAt = true, now
	return next, nil
}

// forget leaves nothing but the fence.
func (s state) forget() state { return state{floor: s.newest(), from: s.from} }

// storedState is a state as witnesses keep it.
type storedState struct {
	Version int          `json:"version"`
	Floor   plugin.Epoch `json:"floor,omitempty"`
	Token   string       `json:"token,omitempty"`
	Record  *Record      `json:"record,omitempty"`
}

// stateVersion is the version of storedState. Another one is refused.
const stateVersion = 1

func (s state) encode() ([]byte, error) {
	stored := storedState{Version: stateVersion, Floor: s.floor, Token: s.token}
	if s.rec.Epoch != 0 {
		stored.Record = &s.rec
	}
	text, err := json.Marshal(stored)
	if err != nil {
		return nil, fmt.Errorf("encoding the state of domain %s: %w", s.rec.Domain, err)
	}
	return text, nil
}

// decodeState is the inverse of encode; nil is the zero state. The error is a
// *CorruptError that names path.
func decodeState(text []byte, path string, domain plugin.UUID) (state, error) {
	if text == nil {
		return state{}, nil
	}
	var stored storedState
	if err := json.Unmarshal(text, &stored); err != nil {
		return state{}, &CorruptError{Path: path, Reason: err.Error()}
	}
	if stored.Version != stateVersion {
		return state{}, &CorruptError{Path: path, Reason: fmt.Sprintf(
			"format version %d, this ftvirt knows %d", stored.Version, stateVersion)}
	}
	s := state{floor: stored.Floor, token: stored.Token}
	if stored.Record != nil {
		s.rec = *stored.Record
		if reason := s.flaw(domain); reason != "" {
			return state{}, &CorruptError{Path: path, Reason: reason}
		}
	}
	return s, nil
}

// flaw tells what is impossible about a record that was read, or nothing.
func (s state) flaw(domain plugin.UUID) string {
	switch rec := s.rec; {
	case rec.Domain != domain:
		return fmt.Sprintf("it belongs to domain %s", rec.Domain)
	case rec.Epoch <= s.floor:
		return fmt.Sprintf("epoch %d is not above the void up to %d", rec.Epoch, s.floor)
	case checkHosts(rec.Primary, rec.Backup) != nil:
		return "no two hosts"
	case rec.Owner != "" && !rec.Member(rec.Owner):
		return fmt.Sprintf("owner %q is not one of the epoch's hosts", rec.Owner)
	case rec.Closed && rec.Owner == "":
		return "closed by nobody"
	}
	return ""
}
