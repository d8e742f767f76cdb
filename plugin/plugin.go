// SPDX-License-Identifier: Apache-2.0

// Package plugin holds the domain types that every part of ftvirt shares: who
// plays which role, which epoch a pair is in, and how far a log has come.
// It imports nothing of ftvirt and does no I/O.
//
// Terms follow the paper: Scales, Nelson, Venkitachalam, "The Design of a
// Practical System for Fault-Tolerant Virtual Machines", 2010.
package plugin

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// Epoch numbers one continuous protection of a domain by one primary and one
// backup. The arbiter hands epochs out; each is larger than all before it for
// the same domain. Zero means that the domain has never been protected.
type Epoch uint64

// Position is an offset in bytes in the event log of one epoch. Position 0 is
// the first byte that the primary logged after the backup was cloned.
type Position uint64

// Role is the part a host plays for a domain.
type Role string

// The roles of the paper, section 2.
const (
	// RoleNone: the domain is not known to ftvirt on this host.
	RoleNone Role = "none"
	// RolePrimary: the domain executes here and its outputs are seen.
	RolePrimary Role = "primary"
	// RoleBackup: the domain replays here and its outputs are dropped.
	RoleBackup Role = "backup"
)

// UUID identifies a domain as libvirt does; both copies of a pair share it.
type UUID [16]byte

// ErrInvalidUUID is returned for text that is not a UUID.
var ErrInvalidUUID = errors.New("invalid domain UUID")

// ParseUUID reads a UUID in libvirt's 8-4-4-4-12 form, in either case.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, fmt.Errorf("%w: %q", ErrInvalidUUID, s)
	}
	digits := strings.ReplaceAll(s, "-", "")
	if n, err := hex.Decode(u[:], []byte(digits)); err != nil || n != len(u) {
		return UUID{}, fmt.Errorf("%w: %q", ErrInvalidUUID, s)
	}
	return u, nil
}

// String gives the 8-4-4-4-12 form in lower case.
func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// MarshalText implements encoding.TextMarshaler.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (u *UUID) UnmarshalText(text []byte) error {
	v, err := ParseUUID(string(text))
	if err != nil {
		return err
	}
	*u = v
	return nil
}
