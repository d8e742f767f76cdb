// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"io"
	"log/slog"
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
