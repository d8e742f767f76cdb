// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/config"
)

const (
	// hooksDir is where libvirt looks for hooks.
	hooksDir = "/etc/libvirt/hooks/qemu.d"
	// emulator is the program of QEMU on all of Debian's kin.
	emulator = "qemu-system-x86_64"
	// loadTimeout bounds the try to load the plugin.
	loadTimeout = 20 * time.Second
	// leastSpace is below what any disk of a guest needs.
	leastSpace = 1 << 30
)

// System is the machine that is looked at. Tests put another in its place.
type System struct {
	// Root is put before each path.
	Root string
	// Run runs a program with an input and gives all that it writes.
	Run func(ctx context.Context, input, name string, args ...string) (string, error)
}

// ThisMachine is the one that runs this.
func ThisMachine() System {
	return System{Run: func(ctx context.Context, input, name string, args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Stdin = strings.NewReader(input)
		// What it left behind must not keep us.
		cmd.WaitDelay = time.Second
		out, err := cmd.CombinedOutput()
		return string(out), err
	}}
}

func (s System) path(p string) string { return filepath.Join(s.Root, p) }

// Look checks what can be seen without an agent.
func (s System) Look(ctx context.Context, cfg config.Config) Report {
	l := &list{host: cfg.Host}
	f := NewFacts(cfg)
	f.Processor = s.processor()
	f.Plugin = s.plugin(l, cfg)
	if f.Plugin != "" {
		s.load(ctx, l, cfg)
	}
	s.hook(l)
	s.appArmor(l, cfg)
	s.disks(l, cfg)
	if cfg.Channel.Plaintext {
		l.add("encryption", Warning, "channel.plaintext is set: who reads the channel's network reads the guests' memory, who writes to it controls the guests",
			"use it only on a network that nobody else reaches")
	} else {
		l.ok("encryption", "the channel is not plaintext")
	}
	return Report{Findings: l.all, Facts: f}
}

// plugin gives the hash of the plugin's file.
func (s System) plugin(l *list, cfg config.Config) string {
	path := cfg.Agent.PluginFile
	const remedy = "install the package ftvirt-qemu-plugin, or see agent.plugin_file in ftvirt.toml"
	file, err := os.Open(s.path(path))
	if err != nil {
		l.add("plugin", Problem, err.Error(), remedy)
		return ""
	}
	defer func() { _ = file.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, file); err != nil {
		l.add("plugin", Problem, err.Error(), remedy)
		return ""
	}
	hash := hex.EncodeToString(h.Sum(nil))
	if st, err := file.Stat(); err == nil && st.Mode().Perm()&0o004 == 0 {
		l.add("plugin", Problem, path+" cannot be read by QEMU's user", "chmod 0644 "+path)
		return hash
	}
	l.ok("plugin", fmt.Sprintf("%s is there, SHA-256 %s", path, short(hash)))
	return hash
}

// load has QEMU load the plugin, which checks itself then, and end.
func (s System) load(ctx context.Context, l *list, cfg config.Config) {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	out, err := s.Run(ctx, "quit\n", emulator, "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg", "-m", "16",
		"-icount", fmt.Sprintf("shift=%d,rr=record,rrfile=/dev/null", cfg.Replay.ICountShift),
		"-plugin", "file="+s.path(cfg.Agent.PluginFile)+",socket=/nonexistent/ftvirt.sock,uuid=00000000-0000-0000-0000-000000000001",
		"-S", "-monitor", "stdio")
	switch {
	case errors.Is(err, exec.ErrNotFound):
		l.add("plugin-load", Problem, emulator+" is not there", "install qemu-system-x86, version 9.1 to 10.x")
	case err != nil:
		l.add("plugin-load", Problem, fmt.Sprintf("QEMU does not load the plugin: %v: %s", err, lastLine(out)),
			"install QEMU 9.1 to 10.x and the ftvirt-qemu-plugin that belongs to this ftvirt; Debian 12 has QEMU in bookworm-backports")
	default:
		l.ok("plugin-load", "QEMU loads the plugin, and the plugin accepts QEMU")
	}
}

// lastLine is where a program says why it ended.
func lastLine(out string) string {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// hook looks for ours among those that libvirt runs.
func (s System) hook(l *list) {
	const remedy = "install the package ftvirt-agent, or copy ftvirt-hook to " + hooksDir + "/ftvirt, and restart libvirtd"
	path := filepath.Join(hooksDir, "ftvirt")
	st, err := os.Stat(s.path(path))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		l.add("hook", Problem, "there is no hook "+path+": libvirt would start a stale copy of a domain that failed over", remedy)
	case err != nil:
		l.add("hook", Problem, err.Error(), remedy)
	case !st.Mode().IsRegular() || st.Mode().Perm()&0o100 == 0:
		l.add("hook", Problem, path+" cannot be executed, so libvirt passes it over", "chmod 0755 "+path+", and restart libvirtd")
	default:
		l.ok("hook", path+" is installed; libvirtd runs it if it was started since")
	}
}

// appArmor looks for the rules that let QEMU load the plugin.
func (s System) appArmor(l *list, cfg config.Config) {
	enabled, err := os.ReadFile(s.path("/sys/module/apparmor/parameters/enabled"))
	if err != nil || !bytes.HasPrefix(enabled, []byte("Y")) {
		l.ok("apparmor", "AppArmor is not in use")
		return
	}
	files, _ := filepath.Glob(s.path("/etc/apparmor.d/abstractions/libvirt-qemu.d/*"))
	files = append(files, s.path("/etc/apparmor.d/local/abstractions/libvirt-qemu"))
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(text), cfg.Agent.PluginFile) {
			l.ok("apparmor", strings.TrimPrefix(f, s.Root)+" lets QEMU load the plugin")
			return
		}
	}
	l.add("apparmor", Problem, "no rule of AppArmor lets a domain's QEMU load "+cfg.Agent.PluginFile,
		"install the package ftvirt-qemu-plugin, or contrib/apparmor-libvirt-qemu as /etc/apparmor.d/abstractions/libvirt-qemu.d/ftvirt")
}

// disks looks at where replicas are to lie.
func (s System) disks(l *list, cfg config.Config) {
	var st unix.Statfs_t
	dir := cfg.Clone.DiskDir
	err := unix.Statfs(s.path(dir), &st)
	free := st.Bavail * uint64(st.Bsize)
	switch {
	case err != nil:
		l.add("disk-dir", Problem, fmt.Sprintf("%s: %v", dir, err), "make the directory, or see clone.disk_dir in ftvirt.toml")
	case free < leastSpace:
		l.add("disk-dir", Warning, fmt.Sprintf("%s has %s free", dir, size(free)), "free some: a replica needs as much as its disk")
	default:
		l.ok("disk-dir", fmt.Sprintf("%s has %s free", dir, size(free)))
	}
}

func size(n uint64) string { return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30)) }

// processor is the model as Linux tells it.
func (s System) processor() string {
	text, err := os.ReadFile(s.path("/proc/cpuinfo"))
	if err != nil {
		return ""
	}
	for _, l := range strings.Split(string(text), "\n") {
		if name, value, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
