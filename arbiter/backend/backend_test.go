// SPDX-License-Identifier: Apache-2.0

package backend_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/backend"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
)

const timeout = 10 * time.Second

var domain = plugin.UUID{0xf7, 1}

// decides demands that the configured arbiter decides, once.
func decides(t *testing.T, cfg config.Arbiter) {
	t.Helper()
	for _, host := range []string{"hosta", "hostb"} {
		a, err := backend.New(cfg, timeout)
		if err != nil {
			t.Fatal(err)
		}
		if host == "hosta" {
			if _, err := a.Open(t.Context(), domain, "hosta", "hostb"); err != nil {
				t.Fatal(err)
			}
		}
		err = a.Acquire(t.Context(), domain, 1, host)
		if won := err == nil; won != (host == "hosta") || err != nil && !errors.Is(err, arbiter.ErrLost) {
			t.Errorf("%s acquires: %v", host, err)
		}
	}
}

func TestDirectory(t *testing.T) {
	t.Parallel()
	cfg, err := backend.At(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	info, err := backend.Init(t.Context(), cfg, false, timeout)
	if err != nil || info.ID == "" || info.LUN != nil || info.Witnesses != nil {
		t.Fatalf("%+v, %v", info, err)
	}
	cfg.ID = info.ID
	decides(t, cfg)
	cfg.ID = "another"
	a, err := backend.New(cfg, timeout)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Lookup(t.Context(), domain); !errors.Is(err, arbiter.ErrUnavailable) || errors.Is(err, arbiter.ErrNoRecord) {
		t.Errorf("a directory of another identity: %v", err)
	}
}

// witnesses starts n witnesses, each on a loopback address of its own, and
// gives the configuration of a host.
func witnesses(t *testing.T, n int) (config.Arbiter, []context.CancelFunc) {
	t.Helper()
	cfg := config.Default().Arbiter
	cfg.Kind, cfg.KeyFile = config.ArbiterMajority, filepath.Join(t.TempDir(), "key")
	if err := arbiter.MakeKey(cfg.KeyFile); err != nil {
		t.Fatal(err)
	}
	key, err := arbiter.ReadKey(cfg.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	var stops []context.CancelFunc
	for i := range n {
		dir := t.TempDir()
		if _, err := arbiter.InitWitness(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		w, err := arbiter.OpenWitness(t.Context(), arbiter.WitnessConfig{Path: dir, Key: key, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.%d:0", i+1))
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- errors.Join(w.Serve(ctx, ln), w.Close()) }()
		end := sync.OnceFunc(func() {
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(end)
		stops = append(stops, end)
		cfg.Witnesses = append(cfg.Witnesses, w.ID()+"@"+ln.Addr().String())
	}
	c := config.Default()
	c.Host, c.Arbiter = "hosta", cfg
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	return cfg, stops
}

func TestMajority(t *testing.T) {
	t.Parallel()
	cfg, stops := witnesses(t, 3)
	info, err := backend.Init(t.Context(), cfg, false, timeout)
	if err != nil || len(info.Witnesses) != 3 {
		t.Fatalf("%+v, %v", info, err)
	}
	stops[1]()
	info, err = backend.Init(t.Context(), cfg, false, timeout)
	if !errors.Is(err, backend.ErrWitnesses) || !strings.Contains(err.Error(), "127.0.0.2") || strings.Contains(err.Error(), "127.0.0.1:") {
		t.Errorf("one witness away: %v", err)
	}
	for i, w := range info.Witnesses {
		if (w.Err != nil) != (i == 1) {
			t.Errorf("witness %s: %v", w.Address, w.Err)
		}
	}
	decides(t, cfg)
}

// Wrong keys and addresses are told before anything depends on them.
func TestMistakes(t *testing.T) {
	t.Parallel()
	cfg, _ := witnesses(t, 3)
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	digits := strings.Repeat("f7", 32)
	for name, tc := range map[string]struct {
		change func(*config.Arbiter)
		want   error
		says   string
	}{
		"kind":       {func(c *config.Arbiter) { c.Kind = "etcd" }, arbiter.ErrInvalid, `"etcd"`},
		"no key":     {func(c *config.Arbiter) { c.KeyFile += ".none" }, fs.ErrNotExist, "ftvirt witness key"},
		"open key":   {func(c *config.Arbiter) { c.KeyFile = write("key", digits, 0o640) }, arbiter.ErrInvalid, "chmod 600"},
		"short key":  {func(c *config.Arbiter) { c.KeyFile = write("key", digits[2:], 0o600) }, arbiter.ErrInvalid, "64"},
		"no digits":  {func(c *config.Arbiter) { c.KeyFile = write("key", digits+"x", 0o600) }, arbiter.ErrInvalid, "hexadecimal"},
		"address":    {func(c *config.Arbiter) { c.Witnesses = []string{"a", "b", "c"} }, arbiter.ErrInvalid, "ID@HOST:PORT"},
		"two":        {func(c *config.Arbiter) { c.Witnesses = c.Witnesses[:2] }, arbiter.ErrInvalid, "3 or 5"},
		"no path":    {func(c *config.Arbiter) { c.Kind = config.ArbiterDirectory }, arbiter.ErrInvalid, "absolute path"},
		"no device":  {func(c *config.Arbiter) { c.Kind = config.ArbiterLUN }, arbiter.ErrInvalid, "device"},
		"other key":  {func(c *config.Arbiter) { c.KeyFile = write("key", digits, 0o600) }, nil, "another key"},
		"other name": {func(c *config.Arbiter) { c.Witnesses = append([]string{"X" + c.Witnesses[0]}, c.Witnesses[1:]...) }, nil, "not witness X"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := cfg
			tc.change(&c)
			_, err := backend.New(c, timeout)
			if tc.want == nil {
				// Only the witnesses can tell.
				if err != nil {
					t.Fatal(err)
				}
				if _, err = backend.Init(t.Context(), c, false, timeout); !errors.Is(err, backend.ErrWitnesses) {
					t.Fatalf("Init: %v", err)
				}
			} else if !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			if !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%q does not say %q", err, tc.says)
			}
		})
	}
}

func TestKeyFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "key")
	if err := arbiter.MakeKey(path); err != nil {
		t.Fatal(err)
	}
	first, err := arbiter.ReadKey(path)
	if err != nil || len(first) != 32 {
		t.Fatalf("%d bytes, %v", len(first), err)
	}
	if err := arbiter.MakeKey(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("overwriting: %v", err)
	}
	if again, err := arbiter.ReadKey(path); err != nil || string(again) != string(first) {
		t.Errorf("the key has changed (%v)", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestAt(t *testing.T) {
	t.Parallel()
	if _, err := backend.At("/dev/null"); !errors.Is(err, arbiter.ErrInvalid) {
		t.Errorf("a character device: %v", err)
	}
	if _, err := backend.At("/ftvirt-none"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "make the directory") {
		t.Errorf("nothing: %v", err)
	}
	if _, err := backend.Init(t.Context(), config.Arbiter{Kind: config.ArbiterDirectory, Path: t.TempDir()}, true, timeout); !errors.Is(err, arbiter.ErrInvalid) {
		t.Errorf("reservations of a directory: %v", err)
	}
}
