// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"
)

// TestLinks: a host knows that clients cannot reach its guests only where it
// knows how they would.
func TestLinks(t *testing.T) {
	t.Parallel()
	sys := t.TempDir()
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(sys, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(path string) {
		t.Helper()
		if err := os.RemoveAll(filepath.Join(sys, path)); err != nil {
			t.Fatal(err)
		}
	}
	bridge := func(name string, ports ...string) {
		put(name+"/operstate", "up\n")
		put(name+"/bridge/bridge_id", "")
		for _, p := range ports {
			put(name+"/brif/"+p, "") // a link, in reality
		}
	}
	// br0 has two ways out, virbr0 none; eth2 is a card of its own.
	bridge("br0", "vnet0", "eth0", "eth1")
	bridge("virbr0", "vnet1")
	put("virbr0/brif/vnet1", "")
	for _, tap := range []string{"vnet0", "vnet1"} {
		put(tap+"/operstate", "up\n")
		put(tap+"/tun_flags", "0x1002\n")
	}
	for _, card := range []string{"eth0", "eth1", "eth2"} {
		put(card+"/operstate", "up\n")
	}
	l := newLinks(sys)
	want := func(lost bool, networks ...string) {
		t.Helper()
		if l.lost(networks) != lost {
			t.Errorf("%v are lost: %v, want %v", networks, !lost, lost)
		}
	}
	want(false)
	want(false, "br0", "virbr0", "eth2", "none")
	put("eth0/operstate", "down\n")
	want(false, "br0")
	put("eth1/operstate", "lowerlayerdown\n")
	want(true, "br0")
	want(true, "virbr0", "br0")
	want(false, "virbr0", "eth2")
	put("eth1/operstate", "unknown\n") // a driver that does not watch its link
	want(false, "br0")
	put("eth2/operstate", "down\n")
	want(true, "eth2")

	// Cards that are pulled out of the machine, and a bridge that is removed.
	for _, card := range []string{"eth0", "eth1"} {
		remove(card)
		remove("br0/brif/" + card)
	}
	want(true, "br0")
	remove("br0")
	want(true, "br0")
	remove("virbr0")
	want(false, "virbr0")
}
