// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	suspended   = domain(`<ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="suspended" peer="hostb"/>`)
	broken      = domain(`<ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="protectd"/>`)
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
		ask: func(ctx context.Context, cfg config.Config, id plugin.UUID, a hooks.Annotation) error {
			return decide(ctx, arb, id, cfg.Host, a, 0)
		},
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
			got := newHook(t, tc.arb).run(t.Context(), begin("prepare", "begin"), strings.NewReader(tc.xml), io.Discard, &stderr)
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
		ask: func(context.Context, config.Config, plugin.UUID, hooks.Annotation) error {
			t.Error("asked an arbiter of an unusable configuration")
			return errors.New("none")
		},
	}
	var stderr bytes.Buffer
	if h.run(t.Context(), begin("prepare", "begin"), strings.NewReader(protected), io.Discard, &stderr) != 1 || !strings.Contains(stderr.String(), "line 3") {
		t.Errorf("got %s", &stderr)
	}
	stderr.Reset()
	if h.run(t.Context(), begin("prepare", "begin"), strings.NewReader(unprotected), io.Discard, &stderr) != 0 {
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
		begin("restore", "begin"), begin("reconnect", "begin"), begin("attach", "begin"),
		begin("prepare", "end"), begin("unheard-of", "begin"), {"web", "reconnect"},
	} {
		for _, xml := range []string{protected, backup, "", "<broken"} {
			var stderr bytes.Buffer
			if got := h.run(t.Context(), c, strings.NewReader(xml), io.Discard, &stderr); got != 0 {
				t.Errorf("%v: exit %d: %s", c, got, &stderr)
			}
		}
	}
	if h.run(t.Context(), nil, strings.NewReader(""), io.Discard, io.Discard) == 0 {
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
			if got := newHook(t, fake{}).run(ctx, tc.args, silent, io.Discard, io.Discard); got != tc.want || time.Since(start) > deadline {
				t.Errorf("%s without XML: exit %d after %s", name, got, time.Since(start))
			}
			cancel()
			_ = end.Close()
		}
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		start := time.Now()
		var stderr bytes.Buffer
		if newHook(t, fake{lookup: hangs}).run(ctx, begin("prepare", "begin"), strings.NewReader(protected), io.Discard, &stderr) != 1 || time.Since(start) >= deadline {
			t.Errorf("hanging storage: after %s: %s", time.Since(start), &stderr)
		}
	})
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
	if err := os.WriteFile(cfg, []byte("host = \"hosta\"\n[agent]\nrun_dir = \""+dir+"\"\nstate_dir = \""+dir+"/state\"\n[arbiter]\npath = \""+shared+"\"\n"), 0o600); err != nil {
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
	// Every operation of libvirt, on a host that has a stale copy and no agent.
	for _, tc := range []struct {
		op, subop, xml string
		says           string // empty: libvirt may go on
	}{
		{"prepare", "begin", unprotected, ""},
		{"prepare", "begin", protected, "web is not started: host hostb owns the domain"},
		{"prepare", "begin", backup, "web is not started: it is the backup of epoch 7"},
		{"prepare", "begin", broken, "web is not started: invalid ftvirt annotation"},
		{"migrate", "begin", unprotected, ""},
		{"migrate", "begin", suspended, ""},
		{"migrate", "begin", protected, "web is not migrated to this host: it is protected"},
		{"migrate", "begin", backup, "web is not migrated to this host: it is protected"},
		{"migrate", "begin", broken, "web is not migrated to this host: invalid ftvirt annotation"},
		{"restore", "begin", unprotected, ""}, {"restore", "begin", protected, ""}, {"restore", "begin", suspended, ""},
		{"start", "begin", protected, ""}, {"started", "begin", protected, ""}, {"stopped", "end", protected, ""},
		{"release", "end", protected, ""}, {"reconnect", "begin", protected, ""}, {"reconnect", "begin", broken, ""},
		{"attach", "begin", protected, ""}, {"prepare", "end", protected, ""}, {"start", "begin", "", ""}, {"unheard-of", "begin", protected, ""},
	} {
		out, err := run(tc.xml, begin(tc.op, tc.subop)...)
		if (err != nil) != (tc.says != "") || !strings.Contains(out, tc.says) || tc.says == "" && out != "" {
			t.Errorf("%s %s: %v: %q, want %q", tc.op, tc.subop, err, out, tc.says)
		}
	}
	// A domain that came to this host from another, of which libvirt has an old
	// definition as long as the agent has not made the new one.
	if epoch, err = arb.Open(t.Context(), uuid, "hostb", "hosta"); err == nil {
		err = arb.Acquire(t.Context(), uuid, epoch, "hosta")
	}
	kept := config.Agent{StateDir: filepath.Join(dir, "state")}.KeptDefinition(uuid.String())
	if err = errors.Join(err, os.MkdirAll(filepath.Dir(kept), 0o700)); err != nil {
		t.Fatal(err)
	}
	for text, says := range map[string]string{
		fmt.Sprintf(`{"epoch":%d}`, epoch):   "older disks",
		fmt.Sprintf(`{"epoch":%d}`, epoch-1): "",
		"{":                                  "damaged",
	} {
		if err := os.WriteFile(kept, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := run(protected, prepare...); (err != nil) != (says != "") || !strings.Contains(out, says) {
			t.Errorf("with %s kept: %v: %q, want %q", text, err, out, says)
		}
	}
	// What was saved with the plugin elsewhere finds it where it is now.
	ready, err := os.ReadFile("../../testdata/q35-plain.ft.xml")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := run(string(ready), begin("restore", "begin")...); err != nil || !strings.Contains(out, filepath.Join(dir, "plugin.sock")) || !strings.HasPrefix(out, "<domain") {
		t.Errorf("restore: %v: %s", err, out)
	}
}
