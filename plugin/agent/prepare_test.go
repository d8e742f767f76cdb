// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/virt"
)

const plainDomain = `<domain type='qemu'>
  <name>web</name>
  <uuid>6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001</uuid>
  <memory unit='MiB'>16</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>`

// libvirtAgent is an agent on a private libvirt driver, which no other domain
// of the machine knows of.
func libvirtAgent(t *testing.T) *Agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "ftvirt-agent") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cfg := config.Default()
	cfg.Host = "hosta"
	cfg.Arbiter.Path = filepath.Join(dir, "arbiter")
	cfg.Channel.Plaintext = true
	cfg.Peers["hostb"] = config.Peer{Channel: "192.0.2.2:7700", Heartbeat: "192.0.2.2:7701"}
	a, err := New(cfg, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if a.virt, err = virt.Open(t.Context(), "qemu:///embed?root="+dir, virt.Events{}); err != nil {
		t.Fatalf("%v; run make deps", err)
	}
	t.Cleanup(a.virt.Close)
	if _, err := a.virt.Define(t.Context(), plainDomain); err != nil {
		t.Fatal(err)
	}
	return a
}

func definition(t *testing.T, a *Agent) string {
	t.Helper()
	x, err := a.XML(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	return x.XML
}

func TestPrepareAndRestore(t *testing.T) {
	a := libvirtAgent(t)
	before := definition(t, a)
	if err := a.Prepare(t.Context(), "web", "hostb"); err != nil {
		t.Fatal(err)
	}
	ready := definition(t, a)
	if !strings.Contains(ready, a.cfg.Agent.PluginFile) || !strings.Contains(ready, "rr=record") {
		t.Errorf("the definition does not record:\n%s", ready)
	}
	list, err := a.Domains(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id, _ := plugin.ParseUUID("6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001")
	want := DomainInfo{
		Domain: "web", UUID: id, Host: "hosta", Role: plugin.RoleNone, State: "unprotected", Reason: "not-enabled", Wanted: "hostb",
	}
	if len(list) != 1 || list[0] != want {
		t.Errorf("domains: %+v, want %+v", list, want)
	}
	if d, err := a.Domain(t.Context(), id.String()); err != nil || d != want {
		t.Errorf("domain: %+v, %v", d, err)
	}
	// Twice is the same as once.
	if err := a.Prepare(t.Context(), id.String(), "hostb"); err != nil {
		t.Fatal(err)
	}
	if again := definition(t, a); again != ready {
		t.Errorf("prepared twice:\n%s\nwant:\n%s", again, ready)
	}
	if err := a.Restore(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if after := definition(t, a); after != before {
		t.Errorf("restored:\n%s\nwant:\n%s", after, before)
	}
}

func TestPrepareRefusesAndChangesNothing(t *testing.T) {
	a := libvirtAgent(t)
	two := strings.Replace(strings.Replace(plainDomain, "<vcpu>1<", "<vcpu>2<", 1), ">web<", ">two<", 1)
	two = strings.Replace(two, "c001", "c002", 1)
	if _, err := a.virt.Define(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		domain, peer string
		want         error
	}{
		{"web", "hostc", config.ErrUnknownPeer},
		{"web", "hosta", config.ErrUnknownPeer},
		{"none", "hostb", virt.ErrNoDomain},
		{"two", "hostb", hooks.ErrNotReady},
	} {
		if err := a.Prepare(t.Context(), tc.domain, tc.peer); !errors.Is(err, tc.want) {
			t.Errorf("%s on %s: %v, want %v", tc.domain, tc.peer, err, tc.want)
		}
	}
	if x := definition(t, a); strings.Contains(x, "ftvirt") {
		t.Errorf("changed:\n%s", x)
	}
	if err := a.Restore(t.Context(), "none"); !errors.Is(err, virt.ErrNoDomain) {
		t.Errorf("restore: %v", err)
	}
}
