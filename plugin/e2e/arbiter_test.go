// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// What a user asks for costs a pair no copy while the arbiter does not answer: it
// is refused, and the pair stays. An annotation is followed when it does.
func TestUsersDuringOutage(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	before, err := b.Agent(hosta).StatusOf(t.Context(), vm.Name)
	must(t, err)
	holds := func(what string) {
		t.Helper()
		for _, h := range []*lab.Host{hosta, hostb} {
			s, err := b.Agent(h).StatusOf(t.Context(), vm.Name)
			if err != nil || s.State != "protected" || s.Epoch != before.Epoch {
				t.Fatalf("%s: %s has it %s in epoch %d (%v)", what, h.Name, s.State, s.Epoch, err)
			}
		}
	}
	refused := func(host *lab.Host, command ...string) {
		t.Helper()
		out, err := host.Exec(t.Context(), append([]string{lab.BinDir + "/ftvirt"}, append(command, vm.Name)...)...)
		if text := out + errorText(err); err == nil || !strings.Contains(text, "the arbiter does not answer") {
			t.Errorf("%v: %s (%v)", command, text, err)
		}
		holds(strings.Join(command, " "))
	}
	disturbed := func(host *lab.Host, fault lab.StorageFault, f func()) {
		t.Helper()
		heal, err := host.DisturbStorage(t.Context(), fault, 0)
		must(t, err)
		defer func() { must(t, heal(context.WithoutCancel(t.Context()))) }()
		f()
	}

	for _, fault := range []lab.StorageFault{lab.StorageAway, lab.StorageReadOnly, lab.StorageHung} {
		disturbed(hosta, fault, func() {
			for _, command := range []string{"disable", "suspend", "restart-backup", "failover"} {
				refused(hosta, command)
			}
		})
		// The backup's host is who would have to win.
		disturbed(hostb, fault, func() { refused(hosta, "failover") })
	}
	out, err := hosta.Virsh(t.Context(), "dumpxml", vm.Name)
	if err != nil || !strings.Contains(out, `mode="protected"`) && !strings.Contains(out, "mode='protected'") {
		t.Errorf("the annotation has changed (%v): %s", err, out)
	}
	alive(t, traffic, time.Now())

	disturbed(hosta, lab.StorageAway, func() {
		_, err := hosta.Virsh(t.Context(), "metadata", vm.Name, "--uri", "urn:ftvirt:domain:1", "--key", "ft", "--live", "--config",
			"--set", `<pair mode="suspended" peer="hostb"/>`)
		must(t, err)
		_, err = b.Wait(t.Context(), hosta, vm.Name, "to be told that the annotation cannot be followed", 10*time.Second,
			func(s client.Status) (bool, error) {
				return strings.Contains(s.Failure, "the arbiter does not answer"), nil
			})
		must(t, err)
		must(t, scenario.Pause(t.Context(), time.Second))
		holds("an edited annotation")
	})
	alive(t, traffic, time.Now())
	staysAlone(t, b, vm, hosta, hostb)
	alive(t, traffic, time.Now())
	must(t, traffic.Stop())
	_, err = vm.VerifyDisk(t.Context(), hosta)
	must(t, err)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
