// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

var asked = regexp.MustCompile(`ftvirt_ (\S+)(?: --format '([^']*)')? "\$OCF_RESKEY_domain"( "\$host")?`)

// The resource agent for Pacemaker is tested with a stand-in for this command;
// this is what it takes for granted of the command.
func TestResourceAgentCommands(t *testing.T) {
	t.Parallel()
	alone := protected()
	alone.Peer = ""
	f := serve(t, map[string]any{
		"GET /v1/status/web": protected(), "GET /v1/status/alone": alone,
		"POST /v1/failover": struct{}{}, "POST /v1/restart-backup": struct{}{},
	})
	file := filepath.Join(t.TempDir(), "ftvirt.toml")
	text := fmt.Sprintf("host = \"hosta\"\n[agent]\nadmin_socket = %q\n[arbiter]\npath = \"/mnt\"\n[peers.hostb]\nchannel = \"192.0.2.2:7700\"\nheartbeat = \"192.0.2.2:7701\"\n", f.socket)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("../../contrib/ocf/ftvirt")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, m := range asked.FindAllStringSubmatch(string(script), -1) {
		command, format, host := m[1], m[2], m[3]
		seen[command] = true
		args := []string{command, "--config", file}
		if format != "" {
			args = append(args, "--format", format)
		}
		args = append(args, "web")
		if host != "" {
			args = append(args, "hostb")
		}
		r := run(t, "", args...)
		if r.code != exitOK {
			t.Errorf("%q: %+v", args, r)
		}
		if format == "" {
			continue
		}
		for _, s := range []client.Status{protected(), alone} {
			peer, name := s.Peer, "web"
			if peer == "" {
				peer, name = "-", "alone"
			}
			args[len(args)-1] = name
			if r, want := run(t, "", args...), fmt.Sprintf("%s %s %s\n", s.Role, s.State, peer); r.out != want || r.code != exitOK {
				t.Errorf("%q: %+v, want %q", args, r, want)
			}
		}
	}
	if len(seen) != 3 || !seen["status"] || !seen["failover"] || !seen["migrate-backup"] {
		t.Errorf("commands: %v", seen)
	}
}
