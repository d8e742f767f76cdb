// SPDX-License-Identifier: Apache-2.0

package backend_test

import (
	"errors"
	"testing"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/backend"
	"ftvirt.org/ftvirt/plugin/config"
)

// A host whose configuration names another arbiter than before, of whatever kind,
// does not believe it until a person says so.
func TestAccept(t *testing.T) {
	t.Parallel()
	cfg := config.Default()
	cfg.Host, cfg.Agent.StateDir = "hosta", t.TempDir()
	ask := func() error {
		a, seen, err := backend.Open(cfg, timeout, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer seen.Flush(t.Context())
		_, err = a.Open(t.Context(), domain, "hosta", "hostb")
		return err
	}
	cfg.Arbiter.Path = t.TempDir()
	info, err := backend.Init(t.Context(), cfg.Arbiter, false, timeout)
	if err != nil {
		t.Fatal(err)
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	cfg.Arbiter, _ = witnesses(t, 3)
	if err := ask(); !errors.Is(err, arbiter.ErrOutdated) {
		t.Fatalf("another arbiter: %v", err)
	}
	now, before, err := backend.Accept(t.Context(), cfg, timeout)
	if err != nil || before != info.ID || now == before {
		t.Fatalf("Accept gives %q instead of %q, %v", now, before, err)
	}
	if err := ask(); err != nil {
		t.Errorf("accepted: %v", err)
	}
	// One that does not answer cannot be accepted.
	cfg.Arbiter = config.Arbiter{Kind: config.ArbiterDirectory, Path: t.TempDir()}
	if _, _, err := backend.Accept(t.Context(), cfg, timeout); !errors.Is(err, arbiter.ErrNotInitialised) {
		t.Errorf("accepting an empty directory: %v", err)
	}
}
