// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
)

// machine is a host on which all is well.
func machine(t *testing.T) (System, config.Config) {
	t.Helper()
	cfg := config.Default()
	cfg.Host = "hosta"
	s := System{Root: t.TempDir(), Run: func(context.Context, string, string, ...string) (string, error) { return "", nil }}
	for path, mode := range map[string]os.FileMode{
		cfg.Agent.PluginFile: 0o644, hooksDir + "/ftvirt": 0o755, cfg.Clone.DiskDir + "/x": 0o600,
		"/sys/module/apparmor/parameters/enabled": 0o644, "/etc/apparmor.d/abstractions/libvirt-qemu.d/ftvirt": 0o644, "/proc/cpuinfo": 0o444,
	} {
		put(t, s, path, map[string]string{
			"/sys/module/apparmor/parameters/enabled":            "Y\n",
			"/etc/apparmor.d/abstractions/libvirt-qemu.d/ftvirt": "  " + cfg.Agent.PluginFile + " mr,\n",
			"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU\n",
		}[path], mode)
	}
	return s, cfg
}

func put(t *testing.T, s System, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.path(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path(path), []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func find(findings []Finding, check string) Finding {
	for _, f := range findings {
		if f.Check == check {
			return f
		}
	}
	return Finding{}
}

func TestLook(t *testing.T) {
	t.Parallel()
	s, cfg := machine(t)
	r := s.Look(t.Context(), cfg)
	for _, f := range r.Findings {
		if f.Level == Problem || f.Host != "hosta" {
			t.Errorf("a host that is well: %+v", f)
		}
	}
	if r.Facts.Processor != "Fast CPU" || len(r.Facts.Plugin) != 64 {
		t.Errorf("facts %+v", r.Facts)
	}
	remove := func(path string) func(*testing.T, *System, *config.Config) {
		return func(t *testing.T, s *System, _ *config.Config) {
			if err := os.RemoveAll(s.path(path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		spoil  func(*testing.T, *System, *config.Config)
		check  string
		level  Level
		says   string
		remedy string
	}{
		"no plugin": {remove("/usr/lib/ftvirt"), "plugin", Problem, "ftvirt.so", "ftvirt-qemu-plugin"},
		"a plugin for root alone": {func(t *testing.T, s *System, c *config.Config) {
			if err := os.Chmod(s.path(c.Agent.PluginFile), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "plugin", Problem, "QEMU's user", "chmod"},
		"a QEMU that the plugin refuses": {func(_ *testing.T, s *System, _ *config.Config) {
			s.Run = func(context.Context, string, string, ...string) (string, error) {
				return "noise\nftvirt: this QEMU 7.2.0 is not known\n", errors.New("exit status 1")
			}
		}, "plugin-load", Problem, "this QEMU 7.2.0 is not known", "9.1"},
		"no QEMU": {func(_ *testing.T, s *System, _ *config.Config) {
			s.Run = func(context.Context, string, string, ...string) (string, error) { return "", exec.ErrNotFound }
		}, "plugin-load", Problem, emulator, "install"},
		"no hook": {remove(hooksDir), "hook", Problem, "stale copy", "restart libvirtd"},
		"a hook that cannot run": {func(t *testing.T, s *System, _ *config.Config) {
			if err := os.Chmod(s.path(hooksDir+"/ftvirt"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, "hook", Problem, "executed", "chmod"},
		"no rules for AppArmor": {remove("/etc/apparmor.d"), "apparmor", Problem, "no rule", "libvirt-qemu.d"},
		"rules in the other place": {func(t *testing.T, s *System, c *config.Config) {
			remove("/etc/apparmor.d")(t, s, c)
			put(t, *s, "/etc/apparmor.d/local/abstractions/libvirt-qemu", c.Agent.PluginFile+" mr,\n", 0o644)
		}, "apparmor", OK, "local", ""},
		"no AppArmor":            {remove("/sys/module"), "apparmor", OK, "not in use", ""},
		"no directory for disks": {remove("/var/lib/libvirt"), "disk-dir", Problem, "images", "clone.disk_dir"},
		"plaintext":              {func(_ *testing.T, _ *System, c *config.Config) { c.Channel.Plaintext = true }, "encryption", Warning, "plaintext", "network"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, cfg := machine(t)
			tc.spoil(t, &s, &cfg)
			f := find(s.Look(t.Context(), cfg).Findings, tc.check)
			if f.Level != tc.level || !strings.Contains(f.Text, tc.says) || !strings.Contains(f.Remedy, tc.remedy) {
				t.Errorf("%+v", f)
			}
			if (f.Level == OK) != (f.Remedy == "") {
				t.Errorf("a remedy where none is needed, or none: %+v", f)
			}
		})
	}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	a := Facts{
		Host: "hosta", QEMU: "10.0.2", Libvirt: "11.3.0", Plugin: strings.Repeat("a", 64), PluginFile: "/p", PluginSocket: "/s",
		ICountShift: 3, Processor: "Fast CPU", Heartbeat: time.Second, Arbiter: "id",
	}
	b := a
	b.Host = "hostb"
	all := Compare(a, b)
	for _, f := range all {
		if f.Level != OK || f.Host != "hosta and hostb" {
			t.Errorf("hosts that are the same: %+v", f)
		}
	}
	if len(all) != 9 {
		t.Errorf("%d findings", len(all))
	}
	for check, tc := range map[string]struct {
		change func(*Facts)
		level  Level
	}{
		"qemu":          {func(f *Facts) { f.QEMU = "9.1.0" }, Problem},
		"libvirt":       {func(f *Facts) { f.Libvirt = "10.0.0" }, Warning},
		"plugin":        {func(f *Facts) { f.Plugin = strings.Repeat("b", 64) }, Problem},
		"plugin-file":   {func(f *Facts) { f.PluginFile = "/q" }, Problem},
		"plugin-socket": {func(f *Facts) { f.PluginSocket = "/q" }, Problem},
		"icount":        {func(f *Facts) { f.ICountShift = 4 }, Problem},
		"processor":     {func(f *Facts) { f.Processor = "Slow CPU" }, Warning},
		"heartbeat":     {func(f *Facts) { f.Heartbeat = time.Minute }, Warning},
		"arbiter":       {func(f *Facts) { f.Arbiter = "other" }, Problem},
	} {
		other := b
		tc.change(&other)
		if f := find(Compare(a, other), check); f.Level != tc.level || f.Remedy == "" {
			t.Errorf("%s: %+v", check, f)
		}
	}
	if f := find(Compare(a, Facts{Host: "hostb"}), "qemu"); f.Check != "" {
		t.Errorf("what is not known is compared: %+v", f)
	}
}

func TestJudge(t *testing.T) {
	t.Parallel()
	well := Link{From: "hosta", To: "hostb", RTT: 300 * time.Microsecond, Offset: -time.Millisecond, Timeout: 500 * time.Millisecond, There: true, Back: true,
		Largest: 1500, LargeThere: true, LargeBack: true, BulkThere: true, BulkBack: true}
	for _, f := range well.Judge() {
		if f.Level != OK {
			t.Errorf("a link that is well: %+v", f)
		}
	}
	for name, tc := range map[string]struct {
		change func(*Link)
		check  string
		level  Level
	}{
		"slow":                       {func(m *Link) { m.RTT = 20 * time.Millisecond }, "round-trip", Warning},
		"too slow":                   {func(m *Link) { m.RTT = 200 * time.Millisecond }, "round-trip", Problem},
		"ahead":                      {func(m *Link) { m.Offset = time.Minute }, "clock", Warning},
		"behind":                     {func(m *Link) { m.Offset = -time.Minute }, "clock", Warning},
		"no way there":               {func(m *Link) { m.There = false }, "heartbeat-path", Problem},
		"no way back":                {func(m *Link) { m.Back = false }, "heartbeat-path", Problem},
		"large datagrams lost there": {func(m *Link) { m.LargeThere = false }, "path-mtu", Problem},
		"large datagrams lost back":  {func(m *Link) { m.LargeBack = false }, "path-mtu", Problem},
		"long messages lost there":   {func(m *Link) { m.BulkThere = false }, "path-mtu", Problem},
		"long messages lost back":    {func(m *Link) { m.BulkBack = false }, "path-mtu", Problem},
		"no datagrams at all":        {func(m *Link) { m.There, m.LargeThere = false, false }, "path-mtu", OK},
		"an MTU that is not known":   {func(m *Link) { m.Largest, m.LargeThere = 0, false }, "path-mtu", OK},
		"slow but well":              {func(m *Link) { m.RTT, m.Offset = 20*time.Millisecond, time.Second }, "clock", OK},
	} {
		m := well
		tc.change(&m)
		if f := find(m.Judge(), tc.check); f.Level != tc.level {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

func TestStorage(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		took time.Duration
		err  error
		want Level
	}{
		{time.Millisecond, nil, OK},
		{400 * time.Millisecond, nil, Warning},
		{time.Millisecond, errors.New("not mounted"), Problem},
	} {
		if f := Storage("hosta", "directory arbiter", tc.took, tc.err, 500*time.Millisecond); f.Level != tc.want || f.Host != "hosta" {
			t.Errorf("%v, %v: %+v", tc.took, tc.err, f)
		}
	}
}

func TestStrangers(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		hosts, files []string
		err          error
		says         []string
	}{
		"own":         {says: []string{"all replicas"}},
		"shared":      {hosts: []string{"hostb", "hostc"}, says: []string{"hostb, hostc"}},
		"old":         {files: []string{"/images/ftvirt-x"}, says: []string{"/images/ftvirt-x"}},
		"both":        {hosts: []string{"hostb"}, files: []string{"/images/ftvirt-x"}, says: []string{"hostb", "/images/ftvirt-x"}},
		"cannot tell": {err: errors.New("libvirt is down"), says: []string{"libvirt is down"}},
	} {
		got := Strangers("hosta", "/images", tc.hosts, tc.files, tc.err)
		if len(got) != len(tc.says) {
			t.Errorf("%s: %+v", name, got)
			continue
		}
		for i, says := range tc.says {
			if f := got[i]; !strings.Contains(f.Text, says) || (f.Level == OK) != (name == "own") || (f.Remedy == "") != (f.Level == OK) {
				t.Errorf("%s: %+v", name, f)
			}
		}
	}
}
