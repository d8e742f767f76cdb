// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/doctor"
)

var update = flag.Bool("update", false, "write the golden files")

// one run at a time: urfave/cli has one help flag for all apps, and writes to it.
var one sync.Mutex

// result is what a run of the program left.
type result struct {
	code        int
	out, errors string
}

func run(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	app := App()
	app.Reader, app.Writer, app.ErrWriter = strings.NewReader(stdin), &out, &errs
	one.Lock()
	defer one.Unlock()
	code := Run(t.Context(), app, append([]string{"ftvirt"}, args...))
	return result{code, out.String(), errs.String()}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", name, got, want)
	}
}

// fakeAgent answers on a socket as an agent does, and notes what it is asked.
type fakeAgent struct {
	socket string
	mu     sync.Mutex
	asked  []string
}

func (f *fakeAgent) requests() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

// serve starts an agent with an answer for each "METHOD path"; an answer that
// is a string is sent as it is.
func serve(t *testing.T, answers map[string]any) *fakeAgent {
	t.Helper()
	f := &fakeAgent{socket: socketPath(t)}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := r.Method + " " + r.URL.String()
		noted := key
		if r.Method == http.MethodPost {
			var req agent.EnableRequest
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
				t.Errorf("%s: %v", key, err)
			}
			noted += " " + req.Domain + " " + req.Peer
		}
		f.mu.Lock()
		f.asked = append(f.asked, strings.TrimSpace(noted))
		f.mu.Unlock()
		answer, ok := answers[key]
		if !ok {
			answer = refused{http.StatusNotFound, agent.ErrorReply{Error: "domain " + filepath.Base(r.URL.Path) + ": no such domain"}}
		}
		if e, ok := answer.(refused); ok {
			w.WriteHeader(e.code)
			answer = e.reply
		}
		if text, ok := answer.(string); ok {
			_, _ = w.Write([]byte(text))
			return
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	_ = server.Listener.Close()
	server.Listener = l
	server.Start()
	t.Cleanup(server.Close)
	return f
}

type refused struct {
	code  int
	reply any
}

// socketPath is short: Unix allows 107 bytes, and t.TempDir has the test's name.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ftvirt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "a.sock")
}

var webID = plugin.UUID{0x6d, 0x1f, 0x0a, 0x0e, 0x2a, 0x6c, 0x4b, 0x0e, 0x8f, 0x55, 0x1f, 0x6a, 0xd1, 0xa3, 0xc0, 0x01}

func protected() client.Status {
	return client.Status{
		Domain: "web", UUID: webID, Host: "hosta", Role: plugin.RolePrimary, State: "protected", Reason: "none", Epoch: 3, Peer: "hostb",
		Mode: "record", Channel: "tls", Position: 1048576, Acked: 1048000, Lag: 12.4, LogRate: 8300, OutputDelay: 4.25, OutputDelayMax: 17.9,
		OutputQueue: 2, Instructions: 98765432101, Compared: 1234, ClonePause: 87.125,
	}
}

func live() client.Status {
	return client.Status{
		Domain: "database", Host: "hosta", Role: plugin.RolePrimary, State: "live", Reason: "backup-lost", Epoch: 12, Peer: "hostc",
		Mode: "idle", Channel: "tls", Failure: "migrate: connection\nlost",
	}
}

func cloning() client.Status {
	return client.Status{
		Domain: "mail", Host: "hosta", Role: plugin.RoleBackup, State: "cloning", Reason: "initialising", Epoch: 1, Peer: "hostb",
		Mode: "replay", Channel: "tls", ClonePhase: "memory", CloneTransferred: 300, CloneRemaining: 100, LogRate: 3 << 20,
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	f := serve(t, map[string]any{
		"GET /v1/status":          []client.Status{cloning(), live(), protected()},
		"GET /v1/status/web":      protected(),
		"GET /v1/status/mail":     cloning(),
		"GET /v1/status/a%20%2Fb": live(),
		"GET /v1/domains": []agent.DomainInfo{
			{Domain: "idle", Host: "hosta", Role: plugin.RoleNone, State: "unprotected", Reason: "not-enabled", Wanted: "hostb"},
			{Domain: "plain", Host: "hosta", Running: true, Role: plugin.RoleNone, State: "unprotected", Reason: "not-enabled"},
			{Domain: "web", UUID: webID, Host: "hosta", Running: true, Role: plugin.RolePrimary, State: "protected", Peer: "hostb", Wanted: "hostb"},
		},
	})
	for _, tc := range []struct{ golden, args string }{
		{"status.table", "status"},
		{"status.json", "status -o json"},
		{"status.yaml", "status --output=yaml"},
		{"status-web.table", "status web"},
		{"status-web.json", "status web -o json"},
		{"status-web.yaml", "status -o yaml web"},
		{"status-mail.table", "status mail"},
		{"list.table", "list"},
		{"list.json", "list -o json"},
	} {
		r := run(t, "", append(strings.Fields(tc.args), "--socket", f.socket)...)
		if r.code != exitOK || r.errors != "" {
			t.Errorf("%s: exit %d, %s", tc.args, r.code, r.errors)
		}
		golden(t, tc.golden, r.out)
	}
	if r := run(t, "", "status", "--socket", f.socket, "a /b"); r.code != exitOK || !strings.Contains(r.out, "database") {
		t.Errorf("a name to be escaped: %+v", r)
	}
}

func TestStatusWarnsOfPlaintext(t *testing.T) {
	t.Parallel()
	s := protected()
	s.Channel = "plaintext"
	f := serve(t, map[string]any{"GET /v1/status": []client.Status{live(), s}, "GET /v1/status/web": s})
	for _, args := range [][]string{{"status"}, {"status", "web"}, {"status", "-o", "json"}} {
		r := run(t, "", append(args, "--socket", f.socket)...)
		if r.code != exitOK || !strings.HasPrefix(r.errors, "warning: ") || strings.Contains(r.out, "warning") {
			t.Errorf("%s: %+v", args, r)
		}
	}
}

func TestStatusOfNothing(t *testing.T) {
	t.Parallel()
	f := serve(t, map[string]any{"GET /v1/status": []client.Status{}})
	if r := run(t, "", "status", "--socket", f.socket); r.code != exitOK || strings.Count(r.out, "\n") != 1 {
		t.Errorf("table: %+v", r)
	}
	if r := run(t, "", "status", "-o", "json", "--socket", f.socket); r.out != "[]\n" {
		t.Errorf("json: %+v", r)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	definition := func(devices string) agent.DomainXML {
		return agent.DomainXML{XML: `<domain type="qemu"><clock offset="utc"><timer name="hpet" present="no"/></clock><devices>` + devices + `<memballoon model="none"/></devices></domain>`}
	}
	f := serve(t, map[string]any{
		"GET /v1/xml/web": definition(""), "GET /v1/xml/new": definition(""),
		"GET /v1/xml/two":   definition(`<video><model type="qxl"/></video><rng model="virtio"><backend model="random">/dev/urandom</backend></rng>`),
		"GET /v1/check/web": "null\n",
		"GET /v1/check/new": []hooks.Problem{{Code: "missing-peer", Reason: "no host is named", Remedy: "name one"}},
		"GET /v1/check/two?peer=host+b": []hooks.Problem{
			{Code: "vcpus", Reason: "it has 2 vCPUs", Remedy: "set <vcpu>1</vcpu>"},
			{Code: "disk-bus", Path: "disk sda", Reason: "bus sata", Remedy: "use virtio"},
		},
	})
	r := run(t, "", "check", "web", "--socket", f.socket)
	if r.code != exitOK || r.out != "domain web can be protected\n" || r.errors != "" {
		t.Errorf("ready: %+v", r)
	}
	if r := run(t, "", "check", "new", "--socket", f.socket); r.code != exitOK || r.out != "domain new can be protected\n" {
		t.Errorf("without a peer: %+v", r)
	}
	if r := run(t, "", "check", "web", "-o", "json", "--socket", f.socket); r.code != exitOK || r.out != "[]\n" {
		t.Errorf("ready, json: %+v", r)
	}
	r = run(t, "", "check", "two", "--peer", "host b", "--socket", f.socket)
	if r.code != exitProblems || r.errors != "" {
		t.Errorf("problems: %+v", r)
	}
	golden(t, "check.text", r.out)
}

func TestEvents(t *testing.T) {
	t.Parallel()
	const log = `{"time":"2026-03-01T12:00:00.25Z","host":"hosta","domain":"web","uuid":"6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001","epoch":3,"state":"cloning","reason":"initialising"}
{"time":"2026-03-01T12:00:03Z","host":"hosta","domain":"web","uuid":"6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001","epoch":3,"state":"protected","reason":"none"}
`
	f := serve(t, map[string]any{"GET /v1/events": log, "GET /v1/events?follow=1": log})
	r := run(t, "", "events", "--socket", f.socket)
	if r.code != exitOK {
		t.Errorf("%+v", r)
	}
	golden(t, "events.text", r.out)
	if r := run(t, "", "events", "-o", "json", "--socket", f.socket); r.code != exitOK || strings.Count(r.out, "\n") != 2 {
		t.Errorf("json: %+v", r)
	}
	// An agent that ends while it is followed must not look like the end of
	// the events.
	r = run(t, "", "events", "-f", "--socket", f.socket)
	if r.code != exitAgent || strings.Count(r.out, "\n") != 2 || !strings.Contains(r.errors, f.socket) {
		t.Errorf("follow: %+v", r)
	}
}

func TestFollowEndsWithItsContext(t *testing.T) {
	t.Parallel()
	socket := socketPath(t)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"host":"hosta","domain":"web"}` + "\n"))
		_ = http.NewResponseController(w).Flush()
		cancel()
		<-r.Context().Done()
	})}
	go func() { _ = server.Serve(l) }()
	defer func() { _ = server.Close() }()
	var out, errs bytes.Buffer
	app := App()
	app.Writer, app.ErrWriter = &out, &errs
	one.Lock()
	defer one.Unlock()
	if code := Run(ctx, app, []string{"ftvirt", "events", "--follow", "--socket", socket}); code != exitOK || errs.Len() > 0 {
		t.Errorf("exit %d, %s", code, errs.String())
	}
}

// Each kind of mistake names what to do, with its exit code.
func TestErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	typo := write("typo.toml", "host = \"hosta\"\n[heartbeat]\ntimout = \"1s\"\n")
	noArbiter := write("no-arbiter.toml", "host = \"hosta\"\n")
	kvm := write("kvm.xml", strings.Replace(plainXML, "'qemu'", "'kvm'", 1))
	garbage := write("garbage.log", "\xff\xff\xff\xff")
	dead := socketPath(t)
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	f := serve(t, map[string]any{
		"GET /v1/domains/web":    agent.DomainInfo{Domain: "web", UUID: webID, Running: true},
		"GET /v1/domains/off":    agent.DomainInfo{Domain: "off", UUID: webID},
		"GET /v1/domains/broken": "{",
		"GET /v1/domains/odd":    refused{http.StatusBadGateway, "<html>"},
		statusPath:               protected(),
		"POST /v1/enable":        refused{http.StatusConflict, agent.ErrorReply{Error: `unknown peer "hostx": configured are hostb`}},
		"POST /v1/prepare": refused{http.StatusConflict, agent.ErrorReply{
			Error: "domain off cannot be protected: it has 2 vCPUs (set 1); disk sda: bus sata (use virtio)",
			Problems: []hooks.Problem{
				{Reason: "it has 2 vCPUs", Remedy: "set 1"}, {Path: "disk sda", Reason: "bus sata", Remedy: "use virtio"},
			},
		}},
	})
	for _, tc := range []struct {
		args string
		code int
		says []string
	}{
		{"status --socket /nonexistent/a.sock", exitAgent, []string{"/nonexistent/a.sock", "ftvirt agent"}},
		{"status --socket " + dead, exitAgent, []string{"nobody listens", dead, "ftvirt agent"}},
		{"status nosuch --socket " + f.socket, exitFailure, []string{"nosuch: no such domain", "virsh list --all"}},
		{"enable nosuch --peer hostb --socket " + f.socket, exitFailure, []string{"no such domain"}},
		{"enable web --peer hostx --socket " + f.socket, exitFailure, []string{`unknown peer "hostx"`}},
		{"enable off --peer hostb --socket " + f.socket, exitFailure, []string{
			"domain off cannot be protected:\n", "\n       it has 2 vCPUs (set 1)\n       disk sda: bus sata (use virtio)\n"}},
		{"enable off --peer hostb --wait --socket " + f.socket, exitFailure, []string{"not running", "--wait"}},
		{"enable broken --peer hostb --socket " + f.socket, exitAgent, []string{"answer"}},
		{"enable odd --peer hostb --socket " + f.socket, exitAgent, []string{"502"}},
		{"status --config " + typo, exitFailure, []string{typo + ":3: unknown key heartbeat.timout", "heartbeat.timeout"}},
		{"agent --config " + noArbiter, exitFailure, []string{"arbiter.path", "not set"}},
		{"agent --config " + dir + "/none.toml", exitFailure, []string{"none.toml", "ftvirt.toml.example"}},
		{"config check " + typo, exitFailure, []string{"typo.toml:3"}},
		{"xml " + kvm, exitFailure, []string{"kvm.xml", "kvm"}},
		{"xml " + garbage, exitFailure, []string{"garbage.log", "XML"}},
		{"log stat " + garbage, exitFailure, []string{"garbage.log", "position 0", "QEMU 10.0"}},
		{"log stat " + dir + "/none.log", exitFailure, []string{"none.log"}},
		{"log stat --qemu 7.2 " + garbage, exitFailure, []string{"7.2", "9.1"}},
		{"arbiter init " + dir + "/none", exitFailure, []string{"none", "make the directory"}},
		{"arbiter show --path " + dir + " 6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001", exitFailure, []string{"mounted"}},

		{"bogus", exitUsage, []string{`"bogus"`, "--help"}},
		{"stauts", exitUsage, []string{`did you mean "status"`}},
		{"log dmup", exitUsage, []string{`did you mean "dump"`, "ftvirt log --help"}},
		{"enable", exitUsage, []string{"ftvirt enable DOMAIN --peer HOST"}},
		{"enable web", exitUsage, []string{"no host", "--peer HOST"}},
		{"enable web --peer hostb --timeout 5", exitUsage, []string{"timeout"}},
		{"enable web --peer hostb --timeout -5s", exitUsage, []string{"timeout"}},
		{"enable web mail --peer hostb", exitUsage, []string{`"mail"`}},
		{"enable web --per hostb", exitUsage, []string{"-per", "--help"}},
		{"status web -o xml", exitUsage, []string{`"xml"`, "table, json, yaml, csv"}},
		{"log stat --qemu ten " + garbage, exitUsage, []string{`"ten"`}},
		{"log stat --qemu 10.0x " + garbage, exitUsage, []string{`"10.0x"`}},
		{"arbiter show web", exitUsage, []string{"domuuid"}},
		{"lab exec", exitUsage, []string{"HOST COMMAND"}},
	} {
		r := run(t, "", strings.Fields(tc.args)...)
		if r.code != tc.code || r.out != "" || !strings.HasPrefix(r.errors, "error: ") {
			t.Errorf("%s: exit %d instead of %d\nstdout: %s\nstderr: %s", tc.args, r.code, tc.code, r.out, r.errors)
		}
		for _, s := range tc.says {
			if !strings.Contains(r.errors, s) {
				t.Errorf("%s: %s\ndoes not say %q", tc.args, r.errors, s)
			}
		}
	}
}

func TestWithoutRoot(t *testing.T) {
	t.Parallel()
	err := &client.NoAnswerError{Socket: "/run/ftvirt/agent.sock", Err: &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", os.ErrPermission)}}
	if exitCode(err) != exitAgent || !strings.Contains(err.Error(), "run this as root") || !strings.Contains(err.Error(), "/run/ftvirt/agent.sock") {
		t.Error(err)
	}
}

// What the agent sends must not be lost on the way to -o json.
func TestStatusHasAllThatTheAgentSends(t *testing.T) {
	t.Parallel()
	keys := func(v any) []string {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		dec := json.NewDecoder(bytes.NewReader(text))
		var m map[string]any
		if err := dec.Decode(&m); err != nil {
			t.Fatal(err)
		}
		var all []string
		for k := range m {
			all = append(all, k)
		}
		slices.Sort(all)
		return all
	}
	theirs := keys(agent.Status{Peer: "x", ClonePhase: "x", CloneTransferred: 1, CloneRemaining: 1, Failure: "x"})
	ours := keys(client.Status{Peer: "x", ClonePhase: "x", CloneTransferred: 1, CloneRemaining: 1, Failure: "x"})
	if !slices.Equal(theirs, ours) {
		t.Errorf("the agent sends %v, shown are %v", theirs, ours)
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	var visit func(prefix []string, commands []*cli.Command)
	visit = func(prefix []string, commands []*cli.Command) {
		for _, c := range commands {
			name := append(slices.Clone(prefix), c.Name)
			if c.Usage == "" {
				t.Errorf("%v says nothing of itself", name)
			}
			r := run(t, "", append(name, "--help")...)
			if r.code != exitOK || !strings.Contains(r.out, c.Usage) || r.errors != "" {
				t.Errorf("%v --help: %+v", name, r)
			}
			visit(name, c.Subcommands)
		}
	}
	visit(nil, App().Commands)
	r := run(t, "")
	if r.code != exitOK || !strings.Contains(r.out, "Exit codes:") {
		t.Errorf("without arguments: %+v", r)
	}
}

func TestArrange(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"enable web --peer hostb --wait":       "enable --peer hostb --wait -- web",
		"enable --wait web --peer=hostb":       "enable --wait --peer=hostb -- web",
		"status -o json":                       "status -o json",
		"status web -o json":                   "status -o json -- web",
		"status -- -o":                         "status -- -o",
		"xml - --diff":                         "xml --diff -- -",
		"log dump f --from 3 --limit 2":        "log dump --from 3 --limit 2 -- f",
		"enable web --peer":                    "enable --peer -- web",
		"lab exec --name x hosta ls -l --name": "lab exec --name x hosta ls -l --name",
		"lab guest hosta web --number 2":       "lab guest --number 2 -- hosta web",
		"nosuch --x y":                         "nosuch --x y",
		"--help":                               "--help",
		"log --help":                           "log --help",
		"":                                     "",
	} {
		got := arrange(App(), append([]string{"ftvirt"}, strings.Fields(in)...))
		if s := strings.Join(got[1:], " "); s != want {
			t.Errorf("%q: %q, want %q", in, s, want)
		}
	}
}

func TestADomainCalledHelp(t *testing.T) {
	t.Parallel()
	f := serve(t, map[string]any{"GET /v1/status/help": protected()})
	if r := run(t, "", "status", "help", "--socket", f.socket); r.code != exitOK || len(f.requests()) != 1 {
		t.Errorf("%+v", r)
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	well := doctor.Finding{Host: "hosta", Check: "hook", Level: doctor.OK, Text: "it is installed"}
	warning := doctor.Finding{Host: "hosta", Check: "encryption", Level: doctor.Warning, Text: "plaintext", Remedy: "use TLS"}
	problem := doctor.Finding{Host: "hosta and hostb", Check: "qemu", Level: doctor.Problem, Text: "QEMU differs", Remedy: "install the same"}
	f := serve(t, map[string]any{
		"GET /v1/doctor":            []doctor.Finding{well, warning},
		"GET /v1/doctor?peer=hostb": []doctor.Finding{well, warning, problem},
	})
	if r := run(t, "", "doctor", "--socket", f.socket); r.code != exitOK || !strings.Contains(r.out, "remedy: use TLS") || r.errors != "" {
		t.Errorf("a warning: %+v", r)
	}
	r := run(t, "", "doctor", "--peer", "hostb", "--socket", f.socket)
	if r.code != exitProblems || r.errors != "" {
		t.Errorf("a problem: %+v", r)
	}
	golden(t, "doctor.table", r.out)
	r = run(t, "", "doctor", "--peer", "hostb", "-o", "json", "--socket", f.socket)
	var got []doctor.Finding
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || r.code != exitProblems || len(got) != 3 || got[2] != problem {
		t.Errorf("json: %+v, %v", r, err)
	}
}

// Without an agent, what can be seen is told, and first that there is none.
func TestDoctorWithoutAgent(t *testing.T) {
	t.Parallel()
	config := filepath.Join(t.TempDir(), "ftvirt.toml")
	text := "host = \"hosta\"\n[arbiter]\npath = \"/mnt/a\"\n[agent]\nplugin_file = \"/nonexistent/ftvirt.so\"\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r := run(t, "", "doctor", "--config", config, "--socket", "/nonexistent/a.sock", "-o", "json")
	var got []doctor.Finding
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || r.code != exitProblems {
		t.Fatalf("%+v, %v", r, err)
	}
	if got[0].Check != "agent" || !strings.Contains(got[0].Remedy, "ftvirt-agent") || got[1].Check != "plugin" || got[1].Level != doctor.Problem {
		t.Errorf("%+v", got)
	}
	if r := run(t, "", "doctor", "--config", "/nonexistent/ftvirt.toml"); r.code != exitProblems || !strings.Contains(r.out, "configuration") {
		t.Errorf("a configuration that is not there: %+v", r)
	}
}
