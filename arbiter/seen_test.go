// SPDX-License-Identifier: Apache-2.0

package arbiter_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
)

// seenKind makes an arbiter of a kind, and can put another in its place.
type seenKind struct {
	connect func(seen *arbiter.Seen) arbiter.Arbiter
	// save and restore copy what the storage holds, as a backup of it does.
	save func() (restore func())
	// replace puts an empty arbiter there.
	replace func()
}

func copyTree(t *testing.T, from string) (restore func()) {
	t.Helper()
	saved := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(saved, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return func() {
		entries, err := os.ReadDir(from)
		for _, e := range entries {
			err = errors.Join(err, os.RemoveAll(filepath.Join(from, e.Name())))
		}
		if err = errors.Join(err, os.CopyFS(from, os.DirFS(saved))); err != nil {
			t.Fatal(err)
		}
	}
}

var seenKinds = map[string]func(*testing.T) seenKind{
	"directory": func(t *testing.T) seenKind {
		path := t.TempDir()
		init := func() {
			if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: path}); err != nil {
				t.Fatal(err)
			}
		}
		init()
		return seenKind{
			connect: func(seen *arbiter.Seen) arbiter.Arbiter {
				a, err := arbiter.NewDir(arbiter.DirConfig{Path: path, Seen: seen})
				if err != nil {
					t.Fatal(err)
				}
				return a
			},
			save: func() func() { return copyTree(t, path) },
			replace: func() {
				entries, err := os.ReadDir(path)
				for _, e := range entries {
					err = errors.Join(err, os.RemoveAll(filepath.Join(path, e.Name())))
				}
				if err != nil {
					t.Fatal(err)
				}
				init()
			},
		}
	},
	"lun": func(t *testing.T) seenKind {
		path := initLUN(t, simState{})
		return seenKind{
			connect: func(seen *arbiter.Seen) arbiter.Arbiter {
				cfg := lunConfig(path)
				cfg.Seen = seen
				return newLUN(t, cfg)
			},
			save: func() func() {
				raw, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				return func() {
					if err := os.WriteFile(path, raw, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			},
			replace: func() {
				if err := errors.Join(os.Truncate(path, 0), os.Truncate(path, simBlocks*simBlock)); err != nil {
					t.Fatal(err)
				}
				if _, err := arbiter.InitLUN(t.Context(), lunConfig(path)); err != nil {
					t.Fatal(err)
				}
			},
		}
	},
	"majority": func(t *testing.T) seenKind {
		target := quorumBackend.New(t)
		var addresses []arbiter.WitnessAddress
		for _, v := range panelOf(t, target) {
			addresses = append(addresses, v.address)
		}
		connect := func(seen *arbiter.Seen) arbiter.Arbiter {
			a, err := arbiter.NewQuorum(arbiter.QuorumConfig{Witnesses: addresses, Key: testKey, Seen: seen})
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		return seenKind{connect: connect,
			save: func() func() {
				var all []func()
				for _, v := range panelOf(t, target) {
					all = append(all, copyTree(t, v.path))
				}
				return func() {
					for _, restore := range all {
						restore()
					}
				}
			},
			replace: func() {
				addresses = nil
				for _, v := range panelOf(t, quorumBackend.New(t)) {
					addresses = append(addresses, v.address)
				}
			},
		}
	},
}

// host is one start of an agent, or run of a hook, of a host.
func (k seenKind) host(dir string) (arbiter.Arbiter, *arbiter.Seen) {
	seen := arbiter.NewSeen(dir, nil)
	return k.connect(seen), seen
}

// What a host has seen of its arbiter outlives its processes: an arbiter that is
// another, or that is behind, is not believed until a person says so.
func TestSeen(t *testing.T) {
	for name, start := range seenKinds {
		t.Run(name, func(t *testing.T) {
			k, dir := start(t), t.TempDir()
			ask := func() (arbiter.Record, error) {
				a, seen := k.host(dir)
				defer seen.Flush(t.Context())
				return a.Lookup(t.Context(), testDomain)
			}
			refused := func(what string, says ...string) {
				t.Helper()
				a, _ := k.host(dir)
				_, err := a.Lookup(t.Context(), testDomain)
				_, open := a.Open(t.Context(), testDomain, "a", "b")
				for op, err := range map[string]error{
					"Lookup": err, "Open": open, "Acquire": a.Acquire(t.Context(), testDomain, 1, "a"),
					"Close": a.Close(t.Context(), testDomain, 1, "a"), "Probe": a.Probe(t.Context(), testDomain),
				} {
					if !errors.Is(err, arbiter.ErrOutdated) || !errors.Is(err, arbiter.ErrUnavailable) || errors.Is(err, arbiter.ErrNoRecord) || errors.Is(err, arbiter.ErrLost) {
						t.Fatalf("%s: %s: %v", what, op, err)
					}
					for _, words := range append(says, "ftvirt arbiter accept") {
						if !strings.Contains(err.Error(), words) {
							t.Errorf("%s: %s: %q does not say %q", what, op, err, words)
						}
					}
				}
			}
			if _, err := ask(); !errors.Is(err, arbiter.ErrNoRecord) {
				t.Fatal(err)
			}
			empty := k.save()
			a, seen := k.host(dir)
			epoch, err := a.Open(t.Context(), testDomain, "a", "b")
			if err != nil {
				t.Fatal(err)
			}
			seen.Flush(t.Context())
			undecided := k.save()
			// The other host decides, and this one hears of it.
			if err := k.connect(nil).Acquire(t.Context(), testDomain, epoch, "b"); err != nil {
				t.Fatal(err)
			}
			if rec, err := ask(); err != nil || rec.Owner != "b" {
				t.Fatalf("%+v, %v", rec, err)
			}
			now := k.save()
			undecided()
			refused("a copy in which it is undecided", "epoch 1", "host b")
			empty()
			refused("a copy without the domain", "epoch 1")
			now()
			if rec, err := ask(); err != nil || rec.Owner != "b" {
				t.Fatalf("the right one again: %+v, %v", rec, err)
			}
			// Forgetting is no step back.
			if err := k.connect(nil).Forget(t.Context(), testDomain); err != nil {
				t.Fatal(err)
			}
			if _, err := ask(); !errors.Is(err, arbiter.ErrNoRecord) {
				t.Fatalf("forgotten: %v", err)
			}
			now()
			refused("a copy in which it is not forgotten", "forgotten")
			undecided()

			// A process that lives on notices it, too, and what a person accepts.
			k.replace()
			refused("another arbiter", "identity")
			a, _ = k.host(dir)
			fresh := k.connect(nil).(interface {
				ID(ctx context.Context) (string, error)
			})
			id, err := fresh.ID(t.Context())
			if err != nil || id == "" {
				t.Fatalf("identity %q, %v", id, err)
			}
			before, err := arbiter.NewSeen(dir, nil).Accept(id)
			if err != nil || before == "" || before == id {
				t.Fatalf("Accept: %q, %v", before, err)
			}
			if _, err := a.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrNoRecord) {
				t.Errorf("accepted: %v", err)
			}
			if epoch, err := a.Open(t.Context(), testDomain, "a", "b"); err != nil || epoch != 1 {
				t.Errorf("accepted: epoch %d, %v", epoch, err)
			}
		})
	}
}

// Agent and hooks write at once, and lose nothing of each other.
func TestSeenTogether(t *testing.T) {
	k, dir := seenKinds["directory"](t), t.TempDir()
	restore := k.save()
	var writers sync.WaitGroup
	for i := range byte(8) {
		writers.Go(func() {
			for j := range byte(5) {
				a, seen := k.host(dir)
				domain := plugin.UUID{9, i, j}
				if _, err := a.Open(t.Context(), domain, "a", "b"); err != nil {
					t.Error(err)
				}
				seen.Flush(t.Context())
			}
		})
	}
	writers.Wait()
	domains, err := arbiter.NewSeen(dir, nil).Domains()
	if err != nil || len(domains) != 40 {
		t.Errorf("%d of 40 domains are remembered (%v)", len(domains), err)
	}
	restore()
	a, _ := k.host(dir)
	for _, domain := range domains {
		if _, err := a.Lookup(t.Context(), domain); !errors.Is(err, arbiter.ErrOutdated) {
			t.Errorf("domain %s: %v", domain, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

// What cannot be kept stops no decision, and is told; this process knows all the
// same. What cannot be trusted is not taken for nothing.
func TestSeenNotKept(t *testing.T) {
	k := seenKinds["directory"](t)
	restore := k.save()
	dir := filepath.Join(t.TempDir(), "file") // no directory can be made there
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	told := make(chan error, 10)
	seen := arbiter.NewSeen(filepath.Join(dir, "state"), func(err error) { told <- err })
	a := k.connect(seen)
	// ENOTDIR on reading is no missing file: nothing is known then.
	if _, err := a.Open(t.Context(), testDomain, "a", "b"); !errors.Is(err, arbiter.ErrOutdated) {
		t.Fatalf("a state directory that is a file: %v", err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	// There nothing can be made, as on a full disk.
	seen = arbiter.NewSeen("/proc/self/task", func(err error) { told <- err })
	a = k.connect(seen)
	epoch, err := a.Open(t.Context(), testDomain, "a", "b")
	if err == nil {
		err = a.Acquire(t.Context(), testDomain, epoch, "a")
	}
	if err != nil {
		t.Fatalf("with a full state directory: %v", err)
	}
	seen.Flush(t.Context())
	select {
	case err := <-told:
		if !strings.Contains(fmt.Sprint(err), "not kept") {
			t.Errorf("told: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("nobody is told")
	}
	restore()
	if _, err := a.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrOutdated) {
		t.Errorf("an old copy, in the process that knows better: %v", err)
	}

	dir = t.TempDir()
	a, seen = k.host(dir)
	if _, err := a.Open(t.Context(), testDomain, "a", "b"); err != nil {
		t.Fatal(err)
	}
	seen.Flush(t.Context())
	file := filepath.Join(dir, "arbiter.json")
	text, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, []byte(strings.Replace(string(text), `"epoch":1`, `"epoch":0`, 1)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	b, _ := k.host(dir)
	if _, err := b.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrOutdated) || !strings.Contains(err.Error(), file) {
		t.Errorf("a damaged file: %v", err)
	}
	if _, err := a.Lookup(t.Context(), testDomain); err != nil {
		t.Errorf("a damaged file, and a process that knows: %v", err)
	}
	if _, err := arbiter.NewSeen(dir, nil).Accept("x"); err != nil {
		t.Errorf("Accept over a damaged file: %v", err)
	}
}
