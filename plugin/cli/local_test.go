// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin/agent"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

const plainXML = `<domain type='qemu'>
  <name>web</name>
  <uuid>6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001</uuid>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-q35-9.1'>hvm</type></os>
  <devices><graphics type='vnc' port='-1' passwd='secret'/></devices>
</domain>
`

const testConfig = "host = \"hosta\"\n[agent]\nplugin_file = \"/opt/ft.so\"\n[arbiter]\npath = \"/mnt/a\"\n"

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestXML(t *testing.T) {
	t.Parallel()
	cfg := file(t, "ftvirt.toml", testConfig)
	in := file(t, "web.xml", plainXML)
	r := run(t, "", "xml", in, "--config", cfg)
	if r.code != exitOK || !strings.Contains(r.out, "file=/opt/ft.so,socket=/run/ftvirt/plugin.sock") {
		t.Fatalf("%+v", r)
	}
	if _, err := hooks.Parse([]byte(r.out)); err != nil {
		t.Error(err)
	}
	if strings.Contains(r.out, "secret") {
		t.Error("the password is shown unasked")
	}
	if s := run(t, "", "xml", in, "--config", cfg, "--security-info"); !strings.Contains(s.out, "secret") {
		t.Errorf("the password was asked for: %+v", s)
	}
	if s := run(t, plainXML, "xml", "-", "--config", cfg); s != r {
		t.Errorf("from standard input: %+v", s)
	}
	// What is ready already stays.
	if s := run(t, r.out, "xml", "-", "--diff", "--config", cfg); s.code != exitOK || s.out != "" {
		t.Errorf("transformed twice: %+v", s)
	}
	f := serve(t, map[string]any{"GET /v1/xml/web": agent.DomainXML{
		Domain: "web", XML: plainXML, PluginFile: "/opt/ft.so", PluginSocket: "/run/ftvirt/plugin.sock", ICountShift: 3,
	}})
	if s := run(t, "", "xml", "web", "--socket", f.socket); s != r {
		t.Errorf("from the agent: %+v\nwant %+v", s, r)
	}
	d := run(t, "", "xml", "web", "--diff", "--socket", f.socket)
	for _, line := range []string{"--- web\n+++ web (ready)\n@@ ", "\n+    <arg value=\"-icount\"></arg>\n", "\n   <name>web</name>\n"} {
		if d.code != exitOK || !strings.Contains(d.out, line) {
			t.Errorf("diff lacks %q: %+v", line, d)
		}
	}
	for _, line := range strings.Split(d.out, "\n") {
		if strings.HasPrefix(line, "-") && !strings.HasPrefix(line, "---") {
			t.Errorf("formatting shows as a change: %s", line)
		}
	}
}

// logText is a small log: three instructions, a clock, two instructions.
func logText() string {
	layout, err := rrlog.LayoutFor(10, 0)
	if err != nil {
		panic(err)
	}
	code := func(k rrlog.Kind) byte {
		c, _ := layout.Code(k)
		return c
	}
	b := []byte{code(rrlog.KindInstruction)}
	b = binary.BigEndian.AppendUint32(b, 3)
	b = append(b, code(rrlog.KindClockHost))
	b = binary.BigEndian.AppendUint64(b, 7)
	b = append(b, code(rrlog.KindInstruction))
	return string(binary.BigEndian.AppendUint32(b, 2))
}

func TestLog(t *testing.T) {
	t.Parallel()
	path := file(t, "web.log", logText())
	r := run(t, "", "log", "dump", path)
	if r.code != exitOK {
		t.Fatalf("%+v", r)
	}
	golden(t, "log-dump.table", r.out)
	r = run(t, "", "log", "dump", path, "--from", "5", "--limit", "1", "-o", "json")
	if r.code != exitOK || strings.Count(r.out, "\n") != 1 || !strings.Contains(r.out, `"position":5`) {
		t.Errorf("json: %+v", r)
	}
	if r := run(t, "", "log", "dump", path, "--to", "5"); strings.Count(r.out, "\n") != 2 {
		t.Errorf("to: %+v", r)
	}
	r = run(t, "", "log", "stat", path, "--qemu", "10.0.2+ds")
	if r.code != exitOK {
		t.Fatalf("%+v", r)
	}
	golden(t, "log-stat.table", r.out)
	r = run(t, logText(), "log", "stat", "-", "-o", "json")
	var stat rrlog.Stat
	if err := json.Unmarshal([]byte(r.out), &stat); err != nil || stat.Events != 3 || stat.Instructions != 5 {
		t.Errorf("%v: %+v", err, r)
	}
	// Of a damaged log, what precedes the damage is shown, and it is an error.
	r = run(t, logText()+"\xff", "log", "stat", "-")
	if r.code != exitFailure || !strings.Contains(r.out, "total") || !strings.Contains(r.errors, "position 19") {
		t.Errorf("damaged: %+v", r)
	}
}

func TestArbiter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := file(t, "ftvirt.toml", "host = \"hosta\"\n[arbiter]\npath = \""+dir+"\"\n")
	first := run(t, "", "arbiter", "init", "--config", cfg)
	if first.code != exitOK || len(strings.TrimSpace(first.out)) < 8 {
		t.Fatalf("%+v", first)
	}
	if again := run(t, "", "arbiter", "init", dir); again != first {
		t.Errorf("again: %+v, want %+v", again, first)
	}
	if r := run(t, "", "arbiter", "show", webText, "--path", dir); r.code != exitFailure || !strings.Contains(r.errors, "never protected") {
		t.Errorf("no record: %+v", r)
	}
	a, err := arbiter.NewDir(arbiter.DirConfig{Path: dir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Open(t.Context(), webID, "hosta", "hostb"); err != nil {
		t.Fatal(err)
	}
	if r := run(t, "", "arbiter", "show", webText, "--config", cfg); r.code != exitOK || !strings.Contains(r.out, "undecided") {
		t.Errorf("undecided: %+v", r)
	}
	if err := a.Acquire(t.Context(), webID, 1, "hostb"); err != nil {
		t.Fatal(err)
	}
	r := run(t, "", "arbiter", "show", webText, "-o", "yaml", "--path", dir)
	if r.code != exitOK || !strings.Contains(r.out, "owner: hostb\n") {
		t.Errorf("owned: %+v", r)
	}
}

// A majority is set up by the commands alone: key, witnesses, and the question
// whether they vote.
func TestWitness(t *testing.T) {
	t.Parallel()
	key := filepath.Join(t.TempDir(), "key")
	if r := run(t, "", "witness", "key", key); r.code != exitOK || r.out != "" {
		t.Fatalf("%+v", r)
	}
	if r := run(t, "", "witness", "key", key); r.code != exitFailure || !strings.Contains(r.errors, "exists") {
		t.Errorf("a second key: %+v", r)
	}
	if r := run(t, "", "witness", "init", key+".none"); r.code != exitFailure || !strings.Contains(r.errors, "make the directory") {
		t.Errorf("no directory: %+v", r)
	}
	bare := t.TempDir()
	if r := run(t, "", "witness", "serve", "--path", bare, "--key-file", key); r.code != exitFailure || !strings.Contains(r.errors, "witness init "+bare) {
		t.Errorf("not initialised: %+v", r)
	}
	var list []string
	for i := range 3 {
		dir := t.TempDir()
		first := run(t, "", "witness", "init", dir)
		if first.code != exitOK || len(strings.TrimSpace(first.out)) < 8 {
			t.Fatalf("%+v", first)
		}
		if again := run(t, "", "witness", "init", dir); again != first {
			t.Errorf("again: %+v, want %+v", again, first)
		}
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.%d:0", i+1))
		if err != nil {
			t.Fatal(err)
		}
		address := ln.Addr().String()
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("%q", strings.TrimSpace(first.out)+"@"+address))
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- serveWitness(ctx, dir, address, key) }()
		t.Cleanup(func() {
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	cfg := file(t, "ftvirt.toml", "host = \"hosta\"\n[arbiter]\nkind = \"majority\"\nkey_file = \""+key+"\"\nwitnesses = ["+strings.Join(list, ", ")+"]\n")
	var r result
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if r = run(t, "", "arbiter", "init", "--config", cfg); r.code == exitOK {
			break
		}
	}
	if r.code != exitOK || strings.Count(r.out, "votes\n") != 3 {
		t.Fatalf("%+v", r)
	}
	if r := run(t, "", "arbiter", "show", webText, "--config", cfg); r.code != exitFailure || !strings.Contains(r.errors, "never protected") {
		t.Errorf("no record: %+v", r)
	}
	if r := run(t, "", "arbiter", "forget", webText, "--config", cfg); r.code != exitOK {
		t.Errorf("forgetting nothing: %+v", r)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	r := run(t, "", "config", "default")
	if r.code != exitOK || r.out != config.Example || !strings.Contains(r.out, "[heartbeat]") {
		t.Errorf("%+v", r)
	}
	path := file(t, "ftvirt.toml", r.out)
	if r := run(t, "", "config", "check", path); r.code != exitOK || r.out != path+" is valid\n" {
		t.Errorf("%+v", r)
	}
}

func TestNotifyReady(t *testing.T) {
	t.Parallel()
	if err := notifyReady(""); err != nil {
		t.Error(err)
	}
	path := socketPath(t)
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if err := notifyReady(path); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if err := l.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := l.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if err := notifyReady(path + ".none"); err == nil {
		t.Error("nobody listens there")
	}
}
