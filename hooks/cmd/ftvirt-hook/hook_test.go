// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
)

const id = "3e0a1c52-8d0f-4b8e-9a55-0d8c44a1d1b0"

func domain(metadata string) string {
	return fmt.Sprintf("<domain type='qemu'><name>web</name><uuid>%s</uuid><metadata>%s</metadata></domain>", id, metadata)
}

var (
	unprotected = domain(`<o:x xmlns:o="urn:o"/>`)
	protected   = domain(`<ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="protected" peer="hostb"/>`)
	backup      = domain(`<ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="protected" peer="hostb" role="backup" epoch="7"/>`)
)

// fake is an arbiter of functions; one that is nil must not be called.
type fake struct {
	lookup  func(context.Context) (arbiter.Record, error)
	acquire func(context.Context, plugin.Epoch, string) error
}

func (f fake) Lookup(ctx context.Context, _ plugin.UUID) (arbiter.Record, error) {
	return f.lookup(ctx)
}

func (f fake) Acquire(ctx context.Context, _ plugin.UUID, e plugin.Epoch, host string) error {
	return f.acquire(ctx, e, host)
}

func record(r arbiter.Record) func(context.Context) (arbiter.Record, error) {
	return func(context.Context) (arbiter.Record, error) { return r, nil }
}

func newHook(t *testing.T, arb decider) hook {
	t.Helper()
	return hook{
		load: func() (config.Config, error) {
			c := config.Default()
			c.Host, c.Agent.RunDir = "hosta", "/nonexistent"
			return c, nil
		},
		arbiter: func(config.Arbiter) (decider, error) { return arb, nil },
	}
}

func begin(op, subop string) []string { return []string{"web", op, subop, "-"} }

func TestStart(t *testing.T) {
	t.Parallel()
	undecided := arbiter.Record{Epoch: 7, Primary: "hosta", Backup: "hostb"}
	asBackup := arbiter.Record{Epoch: 7, Primary: "hostb", Backup: "hosta"}
	owned := func(by string) arbiter.Record {
		r := undecided
		r.Owner = by
		return r
	}
	acquires := func(err error) func(context.Context, plugin.Epoch, string) error {
		return func(_ context.Context, e plugin.Epoch, host string) error {
			if e != 7 || host != "hosta" {
				return fmt.Errorf("epoch %d, host %s", e, host)
			}
			return err
		}
	}
	for name, tc := range map[string]struct {
		xml  string
		arb  fake
		says string // empty: the start is allowed
	}{
		"unprotected":          {unprotected, fake{}, ""},
		"unprotected, odd":     {"<domain><broken", fake{}, ""},
		"no record":            {protected, fake{lookup: func(context.Context) (arbiter.Record, error) { return arbiter.Record{}, arbiter.ErrNoRecord }}, ""},
		"owned here":           {protected, fake{lookup: record(owned("hosta"))}, ""},
		"stale copy":           {protected, fake{lookup: record(owned("hostb"))}, "hostb owns the domain"},
		"undecided, won":       {protected, fake{record(undecided), acquires(nil)}, ""},
		"undecided, lost":      {protected, fake{record(undecided), acquires(&arbiter.LostError{Epoch: 7, Winner: "hostb"})}, "stale"},
		"undecided, no answer": {protected, fake{record(undecided), acquires(arbiter.ErrUnavailable)}, "try again"},
		"storage away":         {protected, fake{lookup: func(context.Context) (arbiter.Record, error) { return arbiter.Record{}, arbiter.ErrUnavailable }}, "try again"},
		"not a member":         {protected, fake{lookup: record(arbiter.Record{Epoch: 7, Primary: "hostc", Backup: "hostb"})}, "neither"},
		"backup":               {backup, fake{lookup: record(asBackup)}, ""},
		"backup, old epoch":    {backup, fake{lookup: record(arbiter.Record{Epoch: 8, Primary: "hostb", Backup: "hosta"})}, "epoch 8"},
		"backup, no record":    {backup, fake{lookup: record(arbiter.Record{})}, "epoch 0"},
		"wrong annotation":     {domain(`<ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="protectd"/>`), fake{}, "protectd"},
		"not XML":              {"<domain urn:ftvirt:domain:1", fake{}, "parse"},
		"too large":            {strings.Repeat(" ", maxXML+1), fake{}, "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			got := newHook(t, tc.arb).run(t.Context(), begin("prepare", "begin"), strings.NewReader(tc.xml), &stderr)
			if tc.says == "" {
				if got != 0 || stderr.Len() > 0 {
					t.Fatalf("refused: %s", &stderr)
				}
				return
			}
			if got != 1 || !strings.Contains(stderr.String(), tc.says) || !strings.HasPrefix(stderr.String(), "ftvirt: domain web is not started: ") || strings.Count(stderr.String(), "\n") != 1 {
				t.Fatalf("exit %d: %q, want %q", got, &stderr, tc.says)
			}
		})
	}
}

func TestBrokenConfiguration(t *testing.T) {
	t.Parallel()
	h := hook{
		load: func() (config.Config, error) { return config.Config{}, errors.New("line 3: unknown key x") },
		arbiter: func(config.Arbiter) (decider, error) {
			t.Error("asked an arbiter of an unusable configuration")
			return nil, errors.New("none")
		},
	}
	var stderr bytes.Buffer
	if h.run(t.Context(), begin("prepare", "begin"), strings.NewReader(protected), &stderr) != 1 || !strings.Contains(stderr.String(), "line 3") {
		t.Errorf("got %s", &stderr)
	}
	stderr.Reset()
	if h.run(t.Context(), begin("prepare", "begin"), strings.NewReader(unprotected), &stderr) != 0 {
		t.Errorf("an unprotected domain is refused: %s", &stderr)
	}
}

// Nothing but the start of a protected domain may be stopped by us, and a
// failing reconnect would kill a running QEMU.
func TestOtherOperationsPass(t *testing.T) {
	t.Parallel()
	h := newHook(t, fake{})
	for _, c := range [][]string{
		begin("start", "begin"), begin("started", "begin"), begin("stopped", "end"), begin("release", "end"),
		begin("migrate", "begin"), begin("restore", "begin"), begin("reconnect", "begin"), begin("attach", "begin"),
		begin("prepare", "end"), begin("unheard-of", "begin"), {"web", "reconnect"},
	} {
		for _, xml := range []string{protected, backup, "", "<broken"} {
			var stderr bytes.Buffer
			if got := h.run(t.Context(), c, strings.NewReader(xml), &stderr); got != 0 {
				t.Errorf("%v: exit %d: %s", c, got, &stderr)
			}
		}
	}
	if h.run(t.Context(), nil, strings.NewReader(""), io.Discard) == 0 {
		t.Error("no arguments were taken")
	}
}

func TestNeverHangs(t *testing.T) {
	t.Parallel()
	hangs := func(ctx context.Context) (arbiter.Record, error) {
		<-ctx.Done()
		return arbiter.Record{}, fmt.Errorf("%w: %w", arbiter.ErrUnavailable, ctx.Err())
	}
	synctest.Test(t, func(t *testing.T) {
		for name, tc := range map[string]struct {
			args []string
			want int
		}{
			"prepare": {begin("prepare", "begin"), 1}, "reconnect": {begin("reconnect", "begin"), 0}, "stopped": {begin("stopped", "end"), 0},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			silent, end := io.Pipe()
			start := time.Now()
			if got := newHook(t, fake{}).run(ctx, tc.args, silent, io.Discard); got != tc.want || time.Since(start) > deadline {
				t.Errorf("%s without XML: exit %d after %s", name, got, time.Since(start))
			}
			cancel()
			_ = end.Close()
		}
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		start := time.Now()
		var stderr bytes.Buffer
		if newHook(t, fake{lookup: hangs}).run(ctx, begin("prepare", "begin"), strings.NewReader(protected), &stderr) != 1 || time.Since(start) >= deadline {
			t.Errorf("hanging storage: after %s: %s", time.Since(start), &stderr)
		}
	})
}

func TestNotifiesTheAgent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := newHook(t, fake{})
	h.load = func() (config.Config, error) {
		c := config.Default()
		c.Agent.RunDir = dir
		return c, nil
	}
	l, err := net.Listen("unix", filepath.Join(dir, "hook.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	got := make(chan hooks.Event, 1)
	go func() {
		defer close(got)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		line, err := bufio.NewReader(conn).ReadBytes('\n')
		var e hooks.Event
		if err == nil && json.Unmarshal(line, &e) == nil {
			got <- e
		}
	}()
	if h.run(t.Context(), begin("stopped", "end"), strings.NewReader(unprotected), io.Discard) != 0 {
		t.Fatal("refused")
	}
	if e, want := <-got, (hooks.Event{Op: "stopped", SubOp: "end", UUID: id, Name: "web"}); e != want {
		t.Errorf("got %+v, want %+v", e, want)
	}

	// An agent that accepts nothing costs no more than the limit.
	start := time.Now()
	for range 3 {
		h.run(t.Context(), begin("stopped", "end"), strings.NewReader(unprotected), io.Discard)
	}
	if d := time.Since(start); d > 3*(notifyLimit+time.Second) {
		t.Errorf("took %s", d)
	}
}

// The binary as libvirt runs it: static, against a real arbiter directory.
func TestBinary(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	bin := filepath.Join(dir, "ftvirt-hook")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	shared := filepath.Join(dir, "shared")
	if err := os.Mkdir(shared, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg := filepath.Join(dir, "ftvirt.toml")
	if err := os.WriteFile(cfg, []byte("host = \"hosta\"\n[agent]\nrun_dir = \""+dir+"\"\n[arbiter]\npath = \""+shared+"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(xml string, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), bin, args...)
		cmd.Env = append(os.Environ(), config.PathEnv+"="+cfg)
		cmd.Stdin = strings.NewReader(xml)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	prepare := begin("prepare", "begin")
	if out, err := run(unprotected, prepare...); err != nil || out != "" {
		t.Errorf("unprotected: %v: %s", err, out)
	}
	if out, err := run(protected, prepare...); err == nil || !strings.Contains(out, "try again") {
		t.Errorf("a directory that is no arbiter's: %v: %s", err, out)
	}
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: shared}); err != nil {
		t.Fatal(err)
	}
	if out, err := run(protected, prepare...); err != nil {
		t.Errorf("never protected: %v: %s", err, out)
	}
	arb, err := arbiter.NewDir(arbiter.DirConfig{Path: shared})
	if err != nil {
		t.Fatal(err)
	}
	uuid, err := plugin.ParseUUID(id)
	if err != nil {
		t.Fatal(err)
	}
	epoch, err := arb.Open(t.Context(), uuid, "hosta", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	if err := arb.Acquire(t.Context(), uuid, epoch, "hostb"); err != nil {
		t.Fatal(err)
	}
	if out, err := run(protected, prepare...); err == nil || !strings.Contains(out, "hostb owns the domain") {
		t.Errorf("stale copy: %v: %s", err, out)
	}
	if out, err := run(protected, begin("reconnect", "begin")...); err != nil || out != "" {
		t.Errorf("reconnect: %v: %s", err, out)
	}
}
