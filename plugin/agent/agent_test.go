// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"ftvirt.org/ftvirt/plugin/config"
)

// testAgent is an agent that does not run and has no libvirt.
func testAgent(t *testing.T) *Agent {
	t.Helper()
	cfg := config.Default()
	cfg.Host, cfg.Channel.Plaintext, cfg.Heartbeat.Listen = "hosta", true, "127.0.0.1:0"
	cfg.Arbiter.Path = t.TempDir()
	cfg.Agent.StateDir, cfg.Agent.RunDir = t.TempDir(), filepath.Join(t.TempDir(), "run")
	cfg.Peers["hostb"] = config.Peer{Channel: "127.0.0.1:1", Heartbeat: "127.0.0.1:1"}
	a, err := New(cfg, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if a.detect, err = a.newDetector(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.detect.Close() })
	return a
}

func TestOwnDirectory(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(path, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil { // whatever the umask
		t.Fatal(err)
	}
	if err := ownDirectory(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if os.Geteuid() != 0 {
		return // only root can give a directory away
	}
	if err := os.Chown(path, 12345, -1); err != nil {
		t.Fatal(err)
	}
	if err := ownDirectory(path, 0o700); err == nil {
		t.Error("another user's directory was taken")
	}
}
