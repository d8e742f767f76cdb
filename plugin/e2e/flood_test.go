// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// floodRate is in datagrams per second.
const floodRate = 5000

// A guest that never rests, and that is sent thousands of packets a second, costs
// time, but not its backup: neither is a host for dead that is busy with it, nor
// does a clone fail of that.
func TestFlood(t *testing.T) {
	b, hosta, hostb := bed(t)
	shared.guests++
	d, err := hosta.GuestDomain(t.Context(), shared.guests, "busy", "qcow2")
	must(t, err)
	d.Initrd = filepath.Join(lab.GuestDir, "busy.gz")
	d.Cmdline = "rdinit=/busy"
	for _, h := range []*lab.Host{hosta, hostb} {
		plain, err := os.ReadFile(h.Path(filepath.Join(lab.GuestDir, "initrd.gz")))
		must(t, err)
		text, err := guest.WithScript(plain, "busy", []byte("#!/bin/busybox sh\nwhile :; do :; done &\nexec /init\n"))
		must(t, err)
		must(t, os.WriteFile(h.Path(d.Initrd), text, 0o644))
	}
	vm, err := b.DefineDomain(t.Context(), hosta, d, d.Address.Addr(), nil)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			saveLogs(t, b, labtest.Root(t))
		}
		if err := vm.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	must(t, b.Agent(hosta).Prepare(t.Context(), vm.Name, hostb.Name))
	must(t, vm.Boot(t.Context(), hosta))
	for round := range 2 {
		s, err := vm.Protect(t.Context(), hosta, hostb)
		must(t, err)
		stop := flood(t, b, vm)
		for range 10 {
			must(t, scenario.Pause(t.Context(), time.Second))
			now, err := b.Agent(hosta).StatusOf(t.Context(), vm.Name)
			must(t, err)
			t.Logf("%s, lag %.0f ms, slowed %.2f, %.1f MB/s of log", now.State, now.Lag, now.Slowed, now.LogRate/1e6)
			if now.State != "protected" || now.Epoch != s.Epoch {
				t.Fatalf("the pair was given up: %s", now)
			}
		}
		if round == 0 {
			// A clone under the same load.
			must(t, b.Agent(hosta).Disable(t.Context(), vm.Name))
			_, err = b.Wait(t.Context(), hosta, vm.Name, "the end of the pair", 15*time.Second,
				func(s client.Status) (bool, error) { return s.State == "unprotected", nil })
			must(t, err)
			must(t, b.WaitGone(t.Context(), hostb, vm.Name))
			_, err = vm.Protect(t.Context(), hosta, hostb)
			must(t, err)
			must(t, vm.Unprotect(t.Context(), hosta, hostb))
		}
		t.Logf("%d datagrams were sent", stop())
	}
}

// flood sends datagrams to a guest until stop is called, which tells how many.
func flood(t *testing.T, b *scenario.Bed, vm *scenario.VM) (stop func() int) {
	t.Helper()
	var conn net.Conn
	must(t, b.Client.InNetwork(func() (err error) {
		conn, err = new(net.Dialer).DialContext(t.Context(), "udp", netip.AddrPortFrom(vm.Guest.Address, 9).String())
		return err
	}))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	sent := make(chan int, 1)
	go func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		payload := make([]byte, 100)
		total := 0
		for last := time.Now(); ; {
			select {
			case <-tick.C:
			case <-ctx.Done():
				_ = conn.Close()
				sent <- total
				return
			}
			now := time.Now()
			n := int(now.Sub(last).Seconds() * floodRate)
			last = now
			for range n {
				_, _ = conn.Write(payload) // nobody has the port, and the guest says so
			}
			total += n
		}
	}()
	done := false
	stop = func() int {
		if done {
			return 0
		}
		done = true
		cancel()
		return <-sent
	}
	t.Cleanup(func() { stop() })
	return stop
}
