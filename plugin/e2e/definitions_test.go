// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// What virt-install adds to each of its definitions.
const installed = `
    <input type='tablet' bus='usb'/>
    <graphics type='vnc' port='-1' autoport='yes'><listen type='address' address='127.0.0.1'/></graphics>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
`

// Everything that hooks/DEVICES.md says is supported runs, is cloned and fails
// over, in definitions as virt-install writes them; what was taken out comes
// back with the plain definition, on the other host.
func TestDefinitions(t *testing.T) {
	b, hosta, hostb := bed(t)
	for _, tc := range []struct {
		name, machine  string
		running        bool // when protection is asked for
		clock, devices string
	}{
		{"q35", "q35", false, `<timer name='rtc' tickpolicy='catchup'/><timer name='pit' tickpolicy='delay'/><timer name='hpet' present='no'/>`, `
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/><source file='IMAGES/top.qcow2'/><target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='IMAGES/static.img'/><target dev='vdc' bus='virtio'/><readonly/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <controller type='scsi' index='0' model='virtio-scsi'/>
    <interface type='bridge'><source bridge='BRIDGE'/><model type='virtio'/></interface>
    <video><model type='virtio'/></video>
    <watchdog model='i6300esb' action='reset'/>`},
		{"i440fx", "pc", true, `<timer name='rtc' tickpolicy='catchup'/>`, `
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='IMAGES/second.img'/><target dev='vdb' bus='virtio'/></disk>
    <interface type='user'><model type='virtio'/></interface>
    <sound model='ich9'/>
    <video><model type='cirrus'/></video>`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			images(t, hosta, "base.img", "top.qcow2", "static.img", "second.img")
			images(t, hostb, "static.img")
			shared.guests++
			name := fmt.Sprintf("guest%d", shared.guests)
			vm, err := b.DefineVM(t.Context(), hosta, shared.guests, name, func(text string) string {
				bridge := regexp.MustCompile(`bridge='([^']+)'`).FindStringSubmatch(text)[1]
				devices := strings.NewReplacer("IMAGES", lab.ImageDir, "BRIDGE", bridge).Replace(tc.devices)
				return strings.NewReplacer(
					"machine='q35'", "machine='"+tc.machine+"'", "<clock offset='utc'/>", "<clock offset='utc'>"+tc.clock+"</clock>",
					"    <controller type='usb' model='none'/>\n", "", "</devices>", devices+installed+"</devices>",
				).Replace(text)
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if t.Failed() {
					saveLogs(t, b, labtest.Root(t))
				}
				if err := vm.Remove(context.Background()); err != nil {
					t.Error(err)
				}
			})
			if tc.running {
				atNextBoot(t, vm, hosta, hostb)
			} else {
				_, err := hosta.Exec(t.Context(), lab.BinDir+"/ftvirt", "enable", vm.Name, "--peer", hostb.Name)
				must(t, err)
			}
			must(t, vm.Boot(t.Context(), hosta))
			traffic, err := vm.Traffic(t.Context())
			must(t, err)
			t.Cleanup(traffic.Close)
			must(t, protect(t, vm, hosta, hostb))
			must(t, scenario.Pause(t.Context(), 3*time.Second))
			killed, err := vm.KillQEMU(t.Context(), hosta)
			must(t, err)
			_, err = b.WaitState(t.Context(), hostb, vm.Name, "live", 15*time.Second)
			must(t, err)
			alive(t, traffic, killed)
			must(t, traffic.Stop())

			_, err = hostb.Virsh(t.Context(), "destroy", vm.Name)
			must(t, err)
			must(t, b.WaitGone(t.Context(), hostb, vm.Name))
			_, err = hostb.Exec(t.Context(), lab.BinDir+"/ftvirt", "disable", vm.Name)
			must(t, err)
			text, err := hostb.Virsh(t.Context(), "dumpxml", "--inactive", vm.Name)
			must(t, err)
			for _, want := range []string{"tablet", "guest_agent", "<rng", "<memballoon model='virtio'", "<video>"} {
				if !strings.Contains(text, want) {
					t.Errorf("%s is not in the plain definition:\n%s", want, text)
				}
			}
			for _, gone := range []string{"icount", "urn:ftvirt", "type='vga'"} {
				if strings.Contains(text, gone) {
					t.Errorf("%s is left in the plain definition:\n%s", gone, text)
				}
			}
		})
	}
}

// atNextBoot asks for the protection of a domain that runs as virt-install left it:
// it is refused, but can be had from the next start on.
func atNextBoot(t *testing.T, vm *scenario.VM, h, peer *lab.Host) {
	t.Helper()
	_, err := h.Virsh(t.Context(), "start", vm.Name)
	must(t, err)
	before, err := h.Virsh(t.Context(), "dumpxml", vm.Name)
	must(t, err)
	enable := []string{lab.BinDir + "/ftvirt", "enable", vm.Name, "--peer", peer.Name}
	if out, err := h.Exec(t.Context(), enable...); err == nil || !strings.Contains(err.Error(), "--at-next-boot") {
		t.Fatalf("a running domain that is not ready: %v, %s", err, out)
	}
	_, err = h.Exec(t.Context(), append(enable, "--at-next-boot")...)
	must(t, err)
	after, err := h.Virsh(t.Context(), "dumpxml", vm.Name)
	must(t, err)
	if after != before {
		t.Errorf("the domain that runs was changed:\n%s\nbefore:\n%s", after, before)
	}
	_, err = h.Virsh(t.Context(), "destroy", vm.Name)
	must(t, err)
}

// images makes the disks that definitions of TestDefinitions name.
func images(t *testing.T, h *lab.Host, names ...string) {
	t.Helper()
	for _, name := range names {
		create := []string{"qemu-img", "create", "-q", "-f", "raw", lab.ImageDir + "/" + name, "8M"}
		if name == "top.qcow2" {
			create = []string{"qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", lab.ImageDir + "/" + name}
		}
		_, err := h.Exec(t.Context(), create...)
		must(t, err)
		t.Cleanup(func() {
			if err := os.Remove(h.Path(lab.ImageDir + "/" + name)); err != nil {
				t.Error(err)
			}
		})
	}
}
