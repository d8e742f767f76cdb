// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

const witnessPort = 7702

// witness starts a witness on a node of the lab, and gives its name for
// [arbiter]. It ends with the test or with the node.
func witness(t *testing.T, n *lab.Node, ftvirt, dir, key string, addr netip.Addr) string {
	t.Helper()
	out, err := n.Exec(t.Context(), ftvirt, "witness", "init", dir)
	must(t, err)
	at := netip.AddrPortFrom(addr, witnessPort).String()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := n.Command(ctx, ftvirt, "witness", "serve", "--path", dir, "--listen", at, "--key-file", key)
	log, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
	})
	// It says so when it serves, and nothing else while all is well.
	line, err := bufio.NewReader(log).ReadString('\n')
	if err != nil || !strings.Contains(line, "voting") {
		t.Fatalf("witness on %s: %v: %s", n.Name, err, line)
	}
	return strings.TrimSpace(out) + "@" + at
}

// FT paper, section 4.1: hosts that share no storage decide by a third party.
// A host dies together with its witness; the other two are still a majority.
func TestMajority(t *testing.T) {
	b, hosta, hostb := bed(t)
	bin := *bin
	if bin == "" {
		bin = filepath.Join(labtest.Root(t), "bin")
	}
	const keyFile, dir = "/etc/ftvirt/witness.key", "/var/lib/ftvirt-witness"
	key := filepath.Join(t.TempDir(), "key")
	must(t, arbiter.MakeKey(key))
	secret, err := os.ReadFile(key)
	must(t, err)
	list := []string{witness(t, b.Client, filepath.Join(bin, "ftvirt"), t.TempDir(), key, lab.ClientAddr)}
	for _, h := range []*lab.Host{hosta, hostb} {
		must(t, os.WriteFile(h.Path(keyFile), secret, 0o600))
		must(t, os.Mkdir(h.Path(dir), 0o700))
		t.Cleanup(func() { must(t, os.RemoveAll(h.Path(dir))) })
		list = append(list, witness(t, h.Node, filepath.Join(lab.BinDir, "ftvirt"), dir, keyFile, h.ServiceAddr()))
	}
	ftvirt := filepath.Join(lab.BinDir, "ftvirt")
	accept := func(ctx context.Context) {
		for _, h := range []*lab.Host{hosta, hostb} {
			_, err := h.Exec(ctx, ftvirt, "arbiter", "accept")
			must(t, err)
		}
	}
	t.Cleanup(func() { accept(context.Background()) }) // the one of before
	for _, h := range []*lab.Host{hosta, hostb} {
		configured(t, b, h, func(c *config.Config) {
			c.Protect.Auto = false
			c.Arbiter.Kind, c.Arbiter.Path, c.Arbiter.Witnesses = config.ArbiterMajority, "", list
		})
	}
	out, err := hosta.Exec(t.Context(), ftvirt, "doctor")
	if err == nil || !strings.Contains(out+err.Error(), "cannot be believed") {
		t.Errorf("another arbiter than before is believed: %v: %s", err, out)
	}
	accept(t.Context())
	out, err = hosta.Exec(t.Context(), ftvirt, "arbiter", "init")
	if must(t, err); strings.Count(out, "votes\n") != 3 {
		t.Errorf("the witnesses: %s", out)
	}

	vm, traffic := protected(t, b, hosta, hostb)
	crashed := time.Now()
	must(t, hosta.Crash(t.Context()))
	_, err = b.WaitState(t.Context(), hostb, vm.Name, "live", 15*time.Second)
	must(t, err)
	alive(t, traffic, crashed)
	out, err = hostb.Exec(t.Context(), ftvirt, "arbiter", "show", vm.UUID.String(), "-o", "yaml")
	if must(t, err); !strings.Contains(out, "owner: "+hostb.Name) {
		t.Errorf("the arbiter says: %s", out)
	}
	must(t, traffic.Stop())
	_, err = vm.VerifyDisk(t.Context(), hostb)
	must(t, err)

	// The hook on the host that is back asks the same witnesses, of which its own
	// is away.
	must(t, hosta.Boot(t.Context()))
	must(t, b.WaitAgent(t.Context(), hosta))
	refused(t, vm, hosta)
	must(t, scenario.Pause(t.Context(), 500*time.Millisecond))
	runsOnlyOn(t, b, vm, hostb, hosta)
}
