// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
)

const example = "ftvirt.toml.example"

// valid is the smallest file that Load accepts.
const valid = "host = \"hosta\"\n[arbiter]\npath = \"/mnt/a\"\n"

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ftvirt.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The example is what people copy: it must load, show the true defaults, and
// leave nothing out.
func TestExample(t *testing.T) {
	t.Parallel()
	got, err := Load(example)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Arbiter.Path = "/mnt/ftvirt-arbiter"
	want.Peers = map[string]Peer{"hostb": {Channel: "192.0.2.2:7700", Heartbeat: "192.0.2.2:7701", CertificateName: "hostb"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the example differs from the defaults:\n got %+v\nwant %+v", got, want)
	}
	text, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	// The only key that is shown commented out depends on the machine.
	shown := strings.Replace(string(text), "# host = ", "host = ", 1)
	var discard map[string]any
	md, err := toml.Decode(shown, &discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range knownKeys(reflect.TypeFor[Config](), nil) {
		for i := range key {
			if key[i] == "NAME" {
				key[i] = "hostb"
			}
		}
		if !md.IsDefined(key...) {
			t.Errorf("the example does not show %s", key)
		}
	}
}

func TestExampleExplainsEachKey(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	for n, line := range lines {
		if !strings.Contains(line, " = ") || strings.HasPrefix(line, "#") || strings.HasPrefix(line, "heartbeat = ") {
			continue
		}
		if !strings.HasPrefix(lines[n-1], "#") {
			t.Errorf("line %d: %s has no comment above it", n+1, line)
		}
	}
}

func TestDefaultIsValidButForTheArbiter(t *testing.T) {
	t.Parallel()
	c := Default()
	c.Host = "hosta"
	err := c.Validate()
	fe, ok := errors.AsType[*FieldError](err)
	if !ok || fe.Field != "arbiter.path" || strings.Contains(err.Error(), "\n") {
		t.Fatalf("got %v, want arbiter.path alone", err)
	}
	c.Arbiter.Path = "/mnt/a"
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
}

func TestLoadCompletes(t *testing.T) {
	t.Parallel()
	c, err := Load(write(t, valid+"[agent]\nrun_dir = \"/run/x\"\nplugin_socket = \"/run/y/p.sock\"\nlog_level = \"debug\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.AdminSocket != "/run/x/agent.sock" || c.Agent.PluginSocket != "/run/y/p.sock" {
		t.Errorf("sockets: %+v", c.Agent)
	}
	if c.Agent.LogLevel != slog.LevelDebug || c.Heartbeat.Timeout != 500*time.Millisecond {
		t.Errorf("values: %+v", c)
	}
}

func TestUnknownKeys(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		text    string
		line    int
		key     string
		similar string
	}{
		"top":         {"\n# x\nhots = \"a\"\n", 3, "hots", "host"},
		"typo":        {"[heartbeat]\ninterval = \"50ms\"\ntimout = \"1s\"\n", 3, "heartbeat.timout", "heartbeat.timeout"},
		"wrong table": {"[agent]\nplaintext = true\n", 2, "agent.plaintext", "channel.plaintext"},
		"table":       {"host = \"a\"\n\n[secrets]\na = 1\nb = 2\n", 3, "secrets", ""},
		"inline":      {"heartbeat = { interval = \"50ms\",\n zzzzzzzz = 1 }\n", 1, "heartbeat.zzzzzzzz", ""},
		"multi-line":  {"[clone]\nzzzzzzzzz = [\n1,\n2]\n", 2, "clone.zzzzzzzzz", ""},
		"quoted":      {"[peers.\"b.example\"]\nchanel = \"h:1\"\n", 2, "peers.\"b.example\".chanel", "peers.\"b.example\".channel"},
		"in a string": {"libvirt_uri = \"\"\"\nbogusbogus = 1\n\"\"\"\n\nbogusbogus = 1\n", 5, "bogusbogus", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := write(t, tc.text)
			_, err := Load(path)
			var e *UnknownKeyError
			if !errors.As(err, &e) || !errors.Is(err, ErrUnknownKey) {
				t.Fatalf("got %v", err)
			}
			if e.File != path || e.Line != tc.line || e.Key != tc.key || e.Similar != tc.similar {
				t.Errorf("got %+v, want line %d key %s similar %q", e, tc.line, tc.key, tc.similar)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("one mistake, several errors: %v", err)
			}
		})
	}
}

func TestUnknownKeysAreReportedTogetherAndInOrder(t *testing.T) {
	t.Parallel()
	_, err := Parse("f", []byte("yyyyyyyy = 1\nxxxxxxxx = 2\n[agent]\nwwwwwwww = 3\n"))
	want := "f:1: unknown key yyyyyyyy; remove it, or see ftvirt.toml.example for the known ones\n" +
		"f:2: unknown key xxxxxxxx; remove it, or see ftvirt.toml.example for the known ones\n" +
		"f:4: unknown key agent.wwwwwwww; remove it, or see ftvirt.toml.example for the known ones"
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

// TestLongFilesAreReadQuickly: the hook reads the file while libvirt waits.
func TestLongFilesAreReadQuickly(t *testing.T) {
	t.Parallel()
	var text strings.Builder
	for i := 0; text.Len() < maxFile-20; i++ {
		fmt.Fprintf(&text, "k%d=1\n", i)
	}
	began := time.Now()
	_, err := Parse("f", []byte(text.String()))
	if !errors.Is(err, ErrUnknownKey) || len(strings.Split(err.Error(), "\n")) != maxUnknown {
		t.Errorf("%.100v", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestSyntaxErrors(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		text string
		line int
		says string
	}{
		"not toml":      {"host = \"a\"\nlisten :7700\n", 2, "expected"},
		"wrong type":    {"\n[channel]\nplaintext = \"yes\"\n", 3, "boolean"},
		"bad duration":  {"[heartbeat]\ntimeout = \"soon\"\n", 2, "soon"},
		"bad size":      {"[channel]\nsend_buffer = \"16MB\"\n", 2, "MiB"},
		"bad log level": {"[agent]\nlog_level = \"loud\"\n", 2, "loud"},
		"duplicate":     {"host = \"a\"\nhost = \"b\"\n", 2, "already"},
		"too large":     {strings.Repeat("#\n", maxFile), 0, "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Parse("f.toml", []byte(tc.text))
			var e *SyntaxError
			if !errors.As(err, &e) {
				t.Fatalf("got %T %v", err, err)
			}
			if e.Line != tc.line || !strings.Contains(err.Error(), tc.says) || !strings.HasPrefix(err.Error(), "f.toml:") {
				t.Errorf("line %d: %v; want line %d and %q", e.Line, err, tc.line, tc.says)
			}
		})
	}
}

func TestMissingFile(t *testing.T) {
	t.Parallel()
	_, err := Load(filepath.Join(t.TempDir(), "none.toml"))
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "ftvirt.toml.example") {
		t.Errorf("got %v", err)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for field, breakIt := range map[string]func(*Config){
		"host":                      func(c *Config) { c.Host = "a b" },
		"libvirt_uri":               func(c *Config) { c.LibvirtURI = "" },
		"agent.run_dir":             func(c *Config) { c.Agent.RunDir = "run" },
		"agent.state_dir":           func(c *Config) { c.Agent.StateDir = "" },
		"agent.plugin_file":         func(c *Config) { c.Agent.PluginFile = "/a,b.so" },
		"agent.admin_socket":        func(c *Config) { c.Agent.AdminSocket = "/" + strings.Repeat("x", 107) },
		"agent.plugin_socket":       func(c *Config) { c.Agent.PluginSocket = c.Agent.AdminSocket },
		"channel.listen":            func(c *Config) { c.Channel.Listen = "7700" },
		"channel.send_buffer":       func(c *Config) { c.Channel.SendBuffer = 10 },
		"channel.receive_buffer":    func(c *Config) { c.Channel.ReceiveBuffer = c.Channel.SendBuffer - 1 },
		"channel.reconnect_grace":   func(c *Config) { c.Channel.ReconnectGrace = c.Heartbeat.Timeout },
		"channel.ack_timeout":       func(c *Config) { c.Channel.AckTimeout = time.Minute },
		"channel.ca_cert":           func(c *Config) { c.Channel.CACert = "ca.pem" },
		"channel.crl":               func(c *Config) { c.Channel.CRL = "" },
		"channel.server_cert":       func(c *Config) { c.Channel.ServerCert = "" },
		"channel.server_key":        func(c *Config) { c.Channel.ServerKey = "" },
		"channel.client_cert":       func(c *Config) { c.Channel.ClientCert = "" },
		"channel.client_key":        func(c *Config) { c.Channel.ClientKey = "" },
		"peers.b.certificate_name":  func(c *Config) { c.Peers["b"] = Peer{Channel: "b:1", Heartbeat: "b:2", CertificateName: "*.b"} },
		"heartbeat.listen":          func(c *Config) { c.Heartbeat.Listen = ":0" },
		"heartbeat.interval":        func(c *Config) { c.Heartbeat.Interval = 50 },
		"heartbeat.timeout":         func(c *Config) { c.Heartbeat.Interval = 200 * time.Millisecond },
		"arbiter.kind":              func(c *Config) { c.Arbiter.Kind = "etcd" },
		"arbiter.path":              func(c *Config) { c.Arbiter.Path = "a" },
		"arbiter.retry":             func(c *Config) { c.Arbiter.Retry = -1 },
		"clone.downtime_limit":      func(c *Config) { c.Clone.DowntimeLimit = 2 * time.Second },
		"clone.bandwidth":           func(c *Config) { c.Clone.Bandwidth = 100 },
		"clone.timeout":             func(c *Config) { c.Clone.Timeout = 10 },
		"clone.disk_dir":            func(c *Config) { c.Clone.DiskDir = "images" },
		"replay.icount_shift":       func(c *Config) { c.Replay.ICountShift = 11 },
		"replay.tick_interval":      func(c *Config) { c.Replay.TickInterval = 0 },
		"replay.divergence_timeout": func(c *Config) { c.Replay.DivergenceTimeout = 150 * time.Millisecond },
		"replay.log_dir":            func(c *Config) { c.Replay.LogDir = "logs" },
		"metrics.listen":            func(c *Config) { c.Metrics.Listen = "7702" },
		"web.listen":                func(c *Config) { c.Web.Listen = "7703" },
		"peers.b.channel":           func(c *Config) { c.Peers["b"] = Peer{Channel: ":1", Heartbeat: "b:2"} },
		"service.links":             func(c *Config) { c.Service.Links = []string{"br0", "../br0"} },
		"service.yield":             func(c *Config) { c.Service.Yield = time.Minute },
		"peers.b.heartbeat":         func(c *Config) { c.Peers["b"] = Peer{Channel: "b:1", Heartbeat: "b:70000"} },
		`peers."a b"`:               func(c *Config) { c.Peers["a b"] = Peer{Channel: "b:1", Heartbeat: "b:2"} },
	} {
		t.Run(field, func(t *testing.T) {
			t.Parallel()
			c, err := Parse("f", []byte(valid))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Validate(); err != nil {
				t.Fatalf("before the change: %v", err)
			}
			breakIt(&c)
			err = c.Validate()
			var e *FieldError
			if !errors.As(err, &e) || !errors.Is(err, ErrInvalid) || e.Field != field || e.Remedy == "" {
				t.Errorf("got %v", err)
			}
		})
	}
}

// Each kind of arbiter needs its keys, and takes none of another kind.
func TestValidateArbiter(t *testing.T) {
	t.Parallel()
	lun := func(a *Arbiter) { a.Kind, a.Path, a.Device = ArbiterLUN, "", "/dev/disk/by-id/x" }
	majority := func(a *Arbiter) {
		a.Kind, a.Path = ArbiterMajority, ""
		a.Witnesses = []string{"a@hosta:1", "b@hostb:1", "c@[2001:db8::1]:1"}
	}
	for name, tc := range map[string]struct {
		base   func(*Arbiter)
		change func(*Arbiter)
		field  string // empty if it is valid
		says   string
	}{
		"directory":                  {nil, func(a *Arbiter) { a.ID = "x" }, "", ""},
		"directory with a device":    {nil, func(a *Arbiter) { a.Device = "/dev/x" }, "arbiter.device", `kind = "lun"`},
		"directory with witnesses":   {nil, func(a *Arbiter) { a.Witnesses = []string{"a@a:1"} }, "arbiter.witnesses", `kind = "majority"`},
		"directory without a path":   {nil, func(a *Arbiter) { a.Path = "" }, "arbiter.path", "not set"},
		"lun":                        {lun, nil, "", ""},
		"lun without a device":       {lun, func(a *Arbiter) { a.Device = "" }, "arbiter.device", "not set"},
		"lun with a path":            {lun, func(a *Arbiter) { a.Path = "/x" }, "arbiter.path", `kind = "directory"`},
		"lun by a relative path":     {lun, func(a *Arbiter) { a.Device = "sdb" }, "arbiter.device", "absolute"},
		"lun by the kernel's name":   {lun, func(a *Arbiter) { a.Device = "/dev/sdb" }, "arbiter.device", "by-id"},
		"lun by name and id":         {lun, func(a *Arbiter) { a.Device, a.ID = "/dev/sdb", "x" }, "", ""},
		"majority":                   {majority, nil, "", ""},
		"majority of five":           {majority, func(a *Arbiter) { a.Witnesses = append(a.Witnesses, "d@d:1", "e@e:1") }, "", ""},
		"no witnesses":               {majority, func(a *Arbiter) { a.Witnesses = nil }, "arbiter.witnesses", "3 or 5"},
		"an even number":             {majority, func(a *Arbiter) { a.Witnesses = append(a.Witnesses, "d@d:1") }, "arbiter.witnesses", "3 or 5"},
		"a witness without id":       {majority, func(a *Arbiter) { a.Witnesses[1] = "hostb:1" }, "arbiter.witnesses", "witness init"},
		"a witness without port":     {majority, func(a *Arbiter) { a.Witnesses[1] = "b@hostb" }, "arbiter.witnesses", "ID@HOST:PORT"},
		"the same witness twice":     {majority, func(a *Arbiter) { a.Witnesses[1] = "a@hostb:1" }, "arbiter.witnesses", "same witness"},
		"two witnesses on one host":  {majority, func(a *Arbiter) { a.Witnesses[1] = "b@hosta:2" }, "arbiter.witnesses", "on one host"},
		"majority with an id":        {majority, func(a *Arbiter) { a.ID = "x" }, "arbiter.id", "remove it"},
		"majority with a path":       {majority, func(a *Arbiter) { a.Path = "/x" }, "arbiter.path", "remove it"},
		"majority with no key file":  {majority, func(a *Arbiter) { a.KeyFile = "" }, "arbiter.key_file", "absolute"},
		"a kind that nobody knows":   {nil, func(a *Arbiter) { a.Kind = "" }, "arbiter.kind", `"majority"`},
		"lun with a misspelled kind": {lun, func(a *Arbiter) { a.Kind = "LUN" }, "arbiter.kind", `"lun"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := Parse("f", []byte(valid))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range []func(*Arbiter){tc.base, tc.change} {
				if f != nil {
					f(&c.Arbiter)
				}
			}
			err = c.Validate()
			if tc.field == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			e, ok := errors.AsType[*FieldError](err)
			if !ok || e.Field != tc.field || !strings.Contains(e.Error(), tc.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %s alone, saying %q", err, tc.field, tc.says)
			}
		})
	}
}

func TestPeer(t *testing.T) {
	t.Parallel()
	c, err := Parse("f", []byte(valid+"[peers.hosta]\nchannel = \"a:1\"\nheartbeat = \"a:2\"\n[peers.hostb]\nchannel = \"b:1\"\nheartbeat = \"b:2\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := c.Peer("hostb"); err != nil || p.Channel != "b:1" || p.Heartbeat != "b:2" {
		t.Errorf("got %+v, %v", p, err)
	}
	c.Peers["hostb"] = Peer{CertificateName: "b.example.org"}
	if b, x := c.CertificateName("hostb"), c.CertificateName("hostx"); b != "b.example.org" || x != "hostx" {
		t.Errorf("names of certificates: %q, %q", b, x)
	}
	for _, name := range []string{"hosta", "hostc", ""} {
		if _, err := c.Peer(name); !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("peer %q: %v", name, err)
		}
	}
	if _, err := c.Peer("hostc"); !strings.Contains(err.Error(), "hostb") || strings.Contains(err.Error(), "hosta") {
		t.Errorf("the known peers are not named: %v", err)
	}
}

func TestPathFromEnvironment(t *testing.T) {
	t.Setenv(PathEnv, "")
	if p := Path(); p != DefaultPath {
		t.Errorf("got %s", p)
	}
	t.Setenv(PathEnv, "/x/y.toml")
	if p := Path(); p != "/x/y.toml" {
		t.Errorf("got %s", p)
	}
}

func TestSizeText(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Size{"0": 0, "17": 17, "4KiB": 4 * KiB, "16 MiB": 16 * MiB, "2GiB": 2 * GiB} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%s: got %d, %v", text, s, err)
		}
		back, err := s.MarshalText()
		if err != nil || !bytes.Equal(back, []byte(strings.ReplaceAll(text, " ", ""))) {
			t.Errorf("%s: written as %s, %v", text, back, err)
		}
	}
	for _, text := range []string{"", "-1", "1.5GiB", "MiB", "9223372036854775807GiB", "16M"} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q: accepted as %d", text, s)
		}
	}
}

// What a primary that stands still may still let go is over before its backup may
// be live.
func TestReleaseLimits(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../qemu/ftvirt.h")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("#define FT_SILENCE_NS %d\n", PluginSilence.Nanoseconds()); !strings.Contains(string(text), want) {
		t.Errorf("plugin/qemu/ftvirt.h does not have %q", want)
	}
	c := Default()
	c.Arbiter.Path = "/arbiter"
	if sum := c.AckSilence() + 2*PluginSilence + SendGap; sum != c.Heartbeat.Timeout {
		t.Errorf("the limits are %v, heartbeat.timeout is %v", sum, c.Heartbeat.Timeout)
	}
	for _, tc := range []struct {
		timeout, interval, tick, grace time.Duration
		field                          string
	}{
		{350 * time.Millisecond, 50 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond, ""},
		{349 * time.Millisecond, 50 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond, "heartbeat.timeout"},
		{150 * time.Millisecond, 30 * time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond, "heartbeat.timeout"},
		{500 * time.Millisecond, 50 * time.Millisecond, 126 * time.Millisecond, 200 * time.Millisecond, "heartbeat.timeout"},
		{500 * time.Millisecond, 50 * time.Millisecond, 50 * time.Millisecond, 199 * time.Millisecond, "channel.reconnect_grace"},
	} {
		c.Heartbeat.Timeout, c.Heartbeat.Interval, c.Replay.TickInterval, c.Channel.ReconnectGrace = tc.timeout, tc.interval, tc.tick, tc.grace
		err := c.Validate()
		if (err == nil) != (tc.field == "") || err != nil && !strings.Contains(err.Error(), tc.field+": ") {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}
