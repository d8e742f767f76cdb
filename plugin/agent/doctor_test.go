// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/doctor"
	"ftvirt.org/ftvirt/plugin/virt"
)

// servingPair is two agents that serve each other, without domains. Their
// libvirt is its own test driver, which has no QEMU.
func servingPair(t *testing.T) (a, b *Agent) {
	t.Helper()
	shared := t.TempDir()
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: shared}); err != nil {
		t.Fatal(err)
	}
	agents := []*Agent{testAgent(t), testAgent(t)}
	names := []string{"hosta", "hostb"}
	var listeners []net.Listener
	for i, a := range agents {
		dir, err := arbiter.NewDir(arbiter.DirConfig{Path: shared})
		if err != nil {
			t.Fatal(err)
		}
		a.arbiter, a.cfg.Host = dir, names[i]
		a.virt, err = virt.Open("test:///default", virt.Events{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(a.virt.Close)
		l, err := a.transport.Listen(t.Context(), "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
	}
	for i, a := range agents {
		other := agents[1-i]
		a.cfg.Peers = map[string]config.Peer{names[1-i]: {Channel: listeners[1-i].Addr().String(), Heartbeat: other.detect.Addr().String()}}
		ctx, cancel := context.WithCancel(context.Background())
		a.ctx = ctx
		done := make(chan error, 2)
		go func() { done <- channel.Serve(ctx, a.transport, listeners[i], a.channel, a.servePeer) }()
		go func() { done <- a.detect.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			for range 2 {
				if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			}
		})
	}
	return agents[0], agents[1]
}

func levels(t *testing.T, a *Agent, peer string) map[string]doctor.Finding {
	t.Helper()
	findings, err := a.Doctor(t.Context(), peer)
	if err != nil {
		t.Fatal(err)
	}
	byCheck := map[string]doctor.Finding{}
	for _, f := range findings {
		if f.Level != doctor.OK && f.Remedy == "" {
			t.Errorf("without a remedy: %+v", f)
		}
		byCheck[f.Host+": "+f.Check] = f
	}
	return byCheck
}

func TestDoctorOfAPair(t *testing.T) {
	t.Parallel()
	a, b := servingPair(t)
	got := levels(t, a, "hostb")
	for check, want := range map[string]doctor.Level{
		"hosta: arbiter-storage":          doctor.OK,
		"hostb: arbiter-storage":          doctor.OK,
		"hosta: encryption":               doctor.Warning,
		"hosta: plugin":                   doctor.Problem, // nothing is installed here
		"hostb: qemu":                     doctor.Problem,
		"hosta and hostb: channel":        doctor.OK,
		"hosta and hostb: round-trip":     doctor.OK,
		"hosta and hostb: clock":          doctor.OK,
		"hosta and hostb: heartbeat-path": doctor.OK,
		"hosta and hostb: arbiter":        doctor.OK,
		"hosta and hostb: libvirt":        doctor.OK,
		"hosta and hostb: plugin-socket":  doctor.OK,
		"hosta and hostb: processor":      doctor.OK,
		"hosta and hostb: heartbeat":      doctor.OK,
		"hosta and hostb: icount":         doctor.OK,
		"hosta and hostb: plugin-file":    doctor.OK,
	} {
		if got[check].Level != want {
			t.Errorf("%s: %+v, want %s", check, got[check], want)
		}
	}
	// Another storage, another value, and a firewall before B's heartbeats.
	other := t.TempDir()
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: other}); err != nil {
		t.Fatal(err)
	}
	dir, err := arbiter.NewDir(arbiter.DirConfig{Path: other})
	if err != nil {
		t.Fatal(err)
	}
	b.arbiter = dir
	b.cfg.Replay.ICountShift++
	peer := b.cfg.Peers["hosta"]
	peer.Heartbeat = "127.0.0.1:9"
	b.cfg.Peers["hosta"] = peer
	got = levels(t, a, "hostb")
	for check, says := range map[string]string{
		"hosta and hostb: arbiter":        "do not share",
		"hosta and hostb: icount":         "same value",
		"hosta and hostb: heartbeat-path": "peers.hosta.heartbeat on hostb",
	} {
		if f := got[check]; f.Level != doctor.Problem || !strings.Contains(f.Remedy, says) {
			t.Errorf("%s: %+v", check, f)
		}
	}
}

// TestDoctorOfSharedDirectories: one for images is a risk, any other a fault.
func TestDoctorOfSharedDirectories(t *testing.T) {
	t.Parallel()
	a, b := servingPair(t)
	images := t.TempDir()
	a.cfg.Clone.DiskDir, b.cfg.Clone.DiskDir = t.TempDir(), t.TempDir()
	for _, a := range []*Agent{a, b} {
		if err := os.MkdirAll(a.cfg.Agent.RunDir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	shared := func(want ...doctor.Level) string {
		t.Helper()
		findings, err := a.Doctor(t.Context(), "hostb")
		if err != nil {
			t.Fatal(err)
		}
		var text string
		var got []doctor.Level
		for _, f := range findings {
			if f.Check == "directories" {
				got, text = append(got, f.Level), text+f.Text+"; "
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%v, want %v: %s", got, want, text)
		}
		return text
	}
	shared(doctor.OK)
	// By another path, as where two hosts mount it in different places.
	link := filepath.Join(t.TempDir(), "images")
	if err := os.Symlink(images, link); err != nil {
		t.Fatal(err)
	}
	a.cfg.Clone.DiskDir, b.cfg.Clone.DiskDir = images, link
	if text := shared(doctor.Warning); !strings.Contains(text, "clone.disk_dir") {
		t.Error(text)
	}
	b.cfg.Agent.StateDir, b.cfg.Agent.RunDir = a.cfg.Agent.StateDir, a.cfg.Agent.RunDir
	if text := shared(doctor.Problem, doctor.Problem, doctor.Warning); !strings.Contains(text, "agent.state_dir") {
		t.Error(text)
	}
	for _, dir := range []string{images, a.cfg.Agent.StateDir, a.cfg.Agent.RunDir} {
		if left, err := filepath.Glob(filepath.Join(dir, tokenPrefix+"*")); err != nil || len(left) > 0 {
			t.Errorf("left are %v, %v", left, err)
		}
	}
	// A peer does not choose what is looked at.
	if r := a.sees(seesRequest{Files: map[string]string{doctor.DiskDir: tokenPrefix + "/../../etc/passwd", "agent.run_dir": "../x"}}); len(r.Keys) > 0 {
		t.Errorf("it sees %v", r.Keys)
	}
}

func TestDoctorWithoutPeer(t *testing.T) {
	t.Parallel()
	a, _ := servingPair(t)
	a.cfg.Peers["hostc"] = config.Peer{Channel: "127.0.0.1:1", Heartbeat: "127.0.0.1:1"}
	if f := levels(t, a, "hostc")["hosta and hostc: channel"]; f.Level != doctor.Problem || !strings.Contains(f.Text, "127.0.0.1:1") {
		t.Errorf("a peer that is not there: %+v", f)
	}
	if _, err := a.Doctor(t.Context(), "hostx"); err == nil {
		t.Error("a peer that is not configured is no error")
	}
	dir, err := arbiter.NewDir(arbiter.DirConfig{Path: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	a.arbiter = dir
	if f := levels(t, a, "")["hosta: arbiter-storage"]; f.Level != doctor.Problem || !strings.Contains(f.Text, "mounted") {
		t.Errorf("storage that is not mounted: %+v", f)
	}
}
