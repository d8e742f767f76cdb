// SPDX-License-Identifier: Apache-2.0

// Package backend gives the arbiter that a configuration names. Agent, hook and
// command line have it from here, so that all of a host ask the same one.
package backend

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin/config"
)

// Open gives the configured arbiter of a host, held against what the host has seen
// of it, for agent and hook; see New. failed is told if that cannot be kept.
func Open(cfg config.Config, timeout time.Duration, failed func(error)) (arbiter.Arbiter, *arbiter.Seen, error) {
	seen := arbiter.NewSeen(cfg.Agent.StateDir, failed)
	a, err := open(cfg.Arbiter, timeout, seen)
	return a, seen, err
}

// New gives the configured arbiter for a person, who sees what there is, whatever
// the host saw before. It reads the key file of a majority, and
// touches neither storage nor network: those may be away when an agent starts.
// timeout bounds each operation whose context sets no earlier deadline; 0 is the
// backend's default.
func New(cfg config.Arbiter, timeout time.Duration) (arbiter.Arbiter, error) {
	return open(cfg, timeout, nil)
}

func open(cfg config.Arbiter, timeout time.Duration, seen *arbiter.Seen) (arbiter.Arbiter, error) {
	switch cfg.Kind {
	case config.ArbiterDirectory:
		return arbiter.NewDir(arbiter.DirConfig{Path: cfg.Path, ID: cfg.ID, Timeout: timeout, Seen: seen})
	case config.ArbiterLUN:
		return arbiter.NewLUN(arbiter.LUNConfig{Device: cfg.Device, ID: cfg.ID, Timeout: timeout, Seen: seen})
	case config.ArbiterMajority:
		q, err := quorum(cfg, timeout)
		if err != nil {
			return nil, err
		}
		q.Seen = seen
		return arbiter.NewQuorum(q)
	default:
		return nil, fmt.Errorf("%w: unknown arbiter kind %q", arbiter.ErrInvalid, cfg.Kind)
	}
}

func quorum(cfg config.Arbiter, timeout time.Duration) (arbiter.QuorumConfig, error) {
	q := arbiter.QuorumConfig{Timeout: timeout}
	for _, text := range cfg.Witnesses {
		w, err := arbiter.ParseWitnessAddress(text)
		if err != nil {
			return q, err
		}
		q.Witnesses = append(q.Witnesses, w)
	}
	var err error
	q.Key, err = arbiter.ReadKey(cfg.KeyFile)
	return q, err
}

// At gives the configuration for the storage at a path: a block device is a
// LUN, a directory a directory.
func At(path string) (config.Arbiter, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return config.Arbiter{}, fmt.Errorf("%w; make the directory on the shared storage first, and mount it here, or log in to the LUN", err)
	case err != nil:
		return config.Arbiter{}, err
	case info.IsDir():
		return config.Arbiter{Kind: config.ArbiterDirectory, Path: path}, nil
	case info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0:
		return config.Arbiter{Kind: config.ArbiterLUN, Device: path}, nil
	}
	return config.Arbiter{}, fmt.Errorf("%w: %s is neither a directory nor a block device", arbiter.ErrInvalid, path)
}

// Accept makes a host believe the configured arbiter as it is now, whatever the host
// saw before. It gives the arbiter's identity, and the one of before.
func Accept(ctx context.Context, cfg config.Config, timeout time.Duration) (now, before string, err error) {
	a, err := New(cfg.Arbiter, timeout)
	if err != nil {
		return "", "", err
	}
	who, ok := a.(interface {
		ID(ctx context.Context) (string, error)
	})
	if !ok {
		return "", "", fmt.Errorf("%w: arbiter without an identity", arbiter.ErrInvalid)
	}
	if now, err = who.ID(ctx); err != nil {
		return "", "", err
	}
	before, err = arbiter.NewSeen(cfg.Agent.StateDir, nil).Accept(now)
	return now, before, err
}

// Info is what Init made or found.
type Info struct {
	// ID is the identity of a directory or a LUN.
	ID string
	// LUN is what more there is to say of a LUN.
	LUN *arbiter.LUNInfo
	// Witnesses are those of a majority.
	Witnesses []Witness
}

// Witness is one of a majority, and what keeps it from voting, if anything does.
type Witness struct {
	Address arbiter.WitnessAddress
	Err     error
}

// ErrWitnesses: not all witnesses answer.
var ErrWitnesses = errors.New("not all witnesses answer")

// Init makes a directory or a LUN the arbiter's, once for all hosts; repeating it
// changes nothing. Of a majority it asks each witness, since nothing is left to
// make, and wraps ErrWitnesses if one cannot vote. With reservation, a LUN that
// is not an arbiter's yet decides under reservations, whatever it is able to.
func Init(ctx context.Context, cfg config.Arbiter, reservation bool, timeout time.Duration) (Info, error) {
	if reservation && cfg.Kind != config.ArbiterLUN {
		return Info{}, fmt.Errorf("%w: only a LUN has reservations", arbiter.ErrInvalid)
	}
	switch cfg.Kind {
	case config.ArbiterDirectory:
		id, err := arbiter.InitDir(ctx, arbiter.DirConfig{Path: cfg.Path, ID: cfg.ID, Timeout: timeout})
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w; make the directory on the shared storage first, and mount it here", err)
		}
		return Info{ID: id}, err
	case config.ArbiterLUN:
		info, err := arbiter.InitLUN(ctx, arbiter.LUNConfig{
			Device: cfg.Device, ID: cfg.ID, Timeout: timeout, Reservation: reservation,
		})
		return Info{ID: info.ID, LUN: &info}, err
	case config.ArbiterMajority:
		q, err := quorum(cfg, timeout)
		if err != nil {
			return Info{}, err
		}
		errs, err := arbiter.AskWitnesses(ctx, q)
		if err != nil {
			return Info{}, err
		}
		var info Info
		for i, w := range q.Witnesses {
			info.Witnesses = append(info.Witnesses, Witness{Address: w, Err: errs[i]})
		}
		if err := errors.Join(errs...); err != nil {
			return info, fmt.Errorf("%w: %w", ErrWitnesses, err)
		}
		return info, nil
	default:
		return Info{}, fmt.Errorf("%w: unknown arbiter kind %q", arbiter.ErrInvalid, cfg.Kind)
	}
}
