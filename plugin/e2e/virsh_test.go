// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

var update = flag.Bool("update", false, "write VIRSH.md")

// outcome is what comes of an operation of virsh on a protected domain.
type outcome string

const (
	// The pair does it, and stays a pair.
	works outcome = "works on the pair"
	// The plugin has QEMU refuse it; the pair stays.
	vetoed outcome = "refused, by ftvirt"
	// libvirt refuses it for reasons of its own; the pair stays.
	libvirts outcome = "refused, by libvirt"
	// The primary does it, and the backup is made anew.
	anew outcome = "works, and costs the backup; it is made anew"
	// The pair ends on both hosts, on purpose.
	ends outcome = "ends the domain on both hosts"
)

// operations are run one after the other; DOMAIN is the domain.
var operations = []struct {
	// virsh is the command line; host names where it is run.
	virsh   string
	backup  bool // on the backup's host, not on the primary's
	outcome outcome
	// says is part of what virsh tells of a refusal.
	says, note string
}{
	{"start DOMAIN", false, libvirts, "already active", ""},
	{"start DOMAIN", true, libvirts, "already active", "a stale copy of a domain that runs elsewhere is refused by the hook"},
	{"suspend DOMAIN", false, works, "", "the backup waits as well"},
	{"resume DOMAIN", false, works, "", ""},
	{"reset DOMAIN", false, works, "", "the backup is reset at the same instruction"},
	{"send-key DOMAIN KEY_A", false, works, "", "input is recorded, be it from here or by VNC"},
	{"screenshot DOMAIN /tmp/screen.ppm", false, libvirts, "no screens", "with graphics, it shows the primary's"},
	{"dump DOMAIN /tmp/core --memory-only", false, works, "", "the guest stands still meanwhile"},
	{"dump DOMAIN /tmp/core", false, vetoed, "protected by ftvirt", "use --memory-only"},
	{"managedsave DOMAIN", false, vetoed, "protected by ftvirt", ""},
	{"save DOMAIN /tmp/saved", false, vetoed, "protected by ftvirt", ""},
	{"snapshot-create-as DOMAIN inner", false, vetoed, "protected by ftvirt", ""},
	{"snapshot-create-as DOMAIN outer --disk-only", false, vetoed, "protected by ftvirt", ""},
	{"snapshot-create-as DOMAIN both --memspec /tmp/memory,snapshot=external", false, vetoed, "protected by ftvirt", ""},
	{"backup-begin DOMAIN", false, vetoed, "protected by ftvirt", ""},
	{"blockcopy DOMAIN vda /tmp/copy.qcow2 --transient-job", false, vetoed, "protected by ftvirt", ""},
	{"blockresize DOMAIN vda 1G", false, vetoed, "protected by ftvirt", ""},
	{"migrate DOMAIN OTHER --live --unsafe", false, vetoed, "protected by ftvirt", "by the hook of the host that it would come to, and by QEMU; see 'ftvirt failover' and 'ftvirt migrate-backup'"},
	{"attach-disk DOMAIN IMAGE vdz --live", false, vetoed, "protected by ftvirt", "--config takes effect with the next start"},
	{"detach-disk DOMAIN vda --live", false, vetoed, "protected by ftvirt", "as above"},
	{"attach-interface DOMAIN bridge BRIDGE --model virtio --live", false, vetoed, "protected by ftvirt", "as above"},
	{"detach-interface DOMAIN bridge --live", false, vetoed, "protected by ftvirt", "as above"},
	{"domif-setlink DOMAIN MAC down", false, vetoed, "protected by ftvirt", ""},
	{"attach-disk DOMAIN IMAGE vdz --live", true, vetoed, "backup of ftvirt", "nothing may be done to a backup"},
	{"suspend DOMAIN", true, vetoed, "backup of ftvirt", "as above"},
	{"reset DOMAIN", true, vetoed, "backup of ftvirt", "as above"},
	{"shutdown DOMAIN", true, vetoed, "backup of ftvirt", "as above"},
	{"inject-nmi DOMAIN", false, vetoed, "protected by ftvirt", ""},
	{"setmem DOMAIN 128M --live", false, vetoed, "protected by ftvirt", "--config takes effect with the next start"},
	{"setvcpus DOMAIN 2 --live", false, libvirts, "", "a protected domain has one"},
	{"autostart DOMAIN", false, works, "", "where the domain is: it moves along in a failover"},
	{"setmaxmem DOMAIN 300M --config", false, works, "", "with the next start, on whichever host; `virsh edit` alike, see `TestDefinitionMovesAlong`"},
	{"destroy DOMAIN", true, anew, "", "as the loss of any backup"},
	{"reboot DOMAIN", false, anew, "", "the guest powers off, and libvirt resets the primary instead of ending it"},
	{"undefine DOMAIN", false, works, "", "the domain runs on as a transient one, and so does its backup"},
	{"shutdown DOMAIN", false, ends, "", ""},
}

const virshHead = "# virsh on a protected domain\n\n" +
	"Each line is run by `TestVirsh`, which also says what must come of it; this file is made from its table by\n" +
	"`go test ./plugin/e2e -run TestVirshDocument -update`. libvirt gives no veto over what is done to a running domain, but QEMU's\n" +
	"monitor does: commands that would change the guest unrecorded, or that QEMU cannot do while it records, are disabled in the plugin\n" +
	"([veto.c](../qemu/veto.c)) while there is a pair. virsh shows the reason. `ftvirt suspend DOMAIN` takes the protection away for as long\n" +
	"as such an operation needs, `ftvirt resume DOMAIN` brings it back. `virsh destroy` and a guest's own power-off are in\n" +
	"`TestDeliberateEnd`, the annotation by `virsh metadata` in `TestVirshOnly`.\n\n" +
	"| virsh | on the host of the | what comes of it | |\n| --- | --- | --- | --- |\n"

// VIRSH.md is what the table says.
func TestVirshDocument(t *testing.T) {
	var b bytes.Buffer
	b.WriteString(virshHead)
	for _, o := range operations {
		where := "primary"
		if o.backup {
			where = "backup"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", o.virsh, where, o.outcome, o.note)
	}
	path := filepath.Join(labtest.Root(t), "plugin/e2e/VIRSH.md")
	if *update {
		must(t, os.WriteFile(path, b.Bytes(), 0o644))
	}
	have, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(have, b.Bytes()) {
		t.Error("VIRSH.md is not what the table says; write it with go test ./plugin/e2e -run TestVirshDocument -update")
	}
}

// Whatever virsh does to a protected domain, it works on both copies or is
// refused with the reason; nothing changes one of them alone.
func TestVirsh(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	images(t, hosta, "static.img")
	images(t, hostb, "static.img")
	first, err := b.Agent(hosta).StatusOf(t.Context(), vm.Name)
	must(t, err)
	reconnect := func() {
		t.Helper()
		traffic.Close()
		must(t, vm.Guest.WaitReady(t.Context()))
		must(t, vm.Load(t.Context()))
		traffic, err = vm.Traffic(t.Context())
		must(t, err)
		t.Cleanup(traffic.Close)
	}
	pair := func(what string) {
		t.Helper()
		for _, h := range []*lab.Host{hosta, hostb} {
			s, err := b.Agent(h).StatusOf(t.Context(), vm.Name)
			if err != nil || s.State != "protected" || s.Epoch != first.Epoch {
				t.Fatalf("after %s: %s (%v)", what, s, err)
			}
		}
	}
	for _, o := range operations {
		h := hosta
		if o.backup {
			h = hostb
		}
		line := strings.NewReplacer("DOMAIN", vm.Name, "IMAGE", lab.ImageDir+"/static.img", "BRIDGE", lab.ServiceBridge, "MAC", vm.MAC, "OTHER", hostb.LibvirtURI()).Replace(o.virsh)
		what := "virsh " + line + " on " + h.Name
		began := time.Now()
		out, err := operate(t, h, strings.Fields(line))
		text := strings.TrimSpace(out)
		if err != nil {
			text = err.Error()
		}
		t.Logf("%s: after %v: %s", what, time.Since(began).Round(time.Millisecond), text)
		refusal := o.outcome == vetoed || o.outcome == libvirts
		if refusal != (err != nil) || refusal && !strings.Contains(text, o.says) {
			t.Errorf("%s: %v, want: %s %q", what, err, o.outcome, o.says)
		}
		switch {
		case o.outcome == ends:
			ended(t, b, vm, hosta, hostb)
			// The button was pressed on both sides.
			events, err := vm.Events(t.Context(), hostb, first.Epoch)
			must(t, err)
			for _, e := range events {
				if e.Reason == "divergence" {
					t.Errorf("%s: the backup did not follow: %+v", what, e)
				}
			}
			continue
		case strings.HasPrefix(line, "suspend"):
			must(t, scenario.Pause(t.Context(), 700*time.Millisecond))
		case strings.HasPrefix(line, "reset"):
			// Its connections and its load end, as those of a machine do.
			reconnect()
		case o.outcome == anew:
			must(t, b.WaitGone(t.Context(), hostb, vm.Name))
			must(t, scenario.Pause(t.Context(), time.Second)) // it may answer still
			reconnect()
			must(t, protect(t, vm, hosta, hostb))
			first, err = b.Agent(hosta).StatusOf(t.Context(), vm.Name)
			must(t, err)
		case o.outcome == works:
			alive(t, traffic, began)
		}
		pair(what)
	}
	traffic.Close()
}

// operate runs virsh on a host, but one that has to reach both on the machine.
func operate(t *testing.T, h *lab.Host, args []string) (string, error) {
	t.Helper()
	if args[0] != "migrate" {
		return h.Virsh(t.Context(), args...)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "virsh", append([]string{"-q", "-c", h.LibvirtURI()}, args...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return string(out), err
}

// An operator needs virsh alone: an annotation is followed as soon as the domain
// is off, and one that is wrong is told of.
func TestVirshOnly(t *testing.T) {
	b, hosta, hostb := bed(t)
	for _, h := range b.Hosts() {
		configured(t, b, h, func(c *config.Config) { c.Protect.Auto = true })
	}
	shared.guests++
	vm, err := b.DefineVM(t.Context(), hosta, shared.guests, fmt.Sprintf("guest%d", shared.guests), nil)
	must(t, err)
	t.Cleanup(func() {
		if err := vm.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	metadata := []string{"metadata", vm.Name, "--uri", "urn:ftvirt:domain:1", "--key", "ft", "--config"}
	annotate := func(text string) {
		t.Helper()
		_, err := hosta.Virsh(t.Context(), append(metadata, "--set", text)...)
		must(t, err)
	}
	annotate(`<pair mode="protected" pear="hostb"/>`)
	s, err := b.Wait(t.Context(), hosta, vm.Name, "the wrong annotation to be told", 10*time.Second,
		func(s client.Status) (bool, error) { return s.AnnotationError != "", nil })
	must(t, err)
	if !strings.Contains(s.AnnotationError, `pear="hostb"`) {
		t.Errorf("status says %q", s.AnnotationError)
	}
	out, err := hosta.Exec(t.Context(), lab.BinDir+"/ftvirt", "status")
	must(t, err)
	log, err := hosta.AgentLog()
	must(t, err)
	if !strings.Contains(out, "annotation not understood") || !strings.Contains(log, "the annotation is not understood") {
		t.Errorf("ftvirt status:\n%s\nlog:\n%s", out, log)
	}

	if out, err := hosta.Virsh(t.Context(), "start", vm.Name); err == nil || !strings.Contains(err.Error(), "correct it with virsh edit") {
		t.Errorf("started with a wrong annotation: %s (%v)", out, err)
	}
	_, err = hosta.Virsh(t.Context(), append(metadata, "--remove")...)
	must(t, err)
	_, err = hosta.Virsh(t.Context(), "start", vm.Name)
	must(t, err)
	// Right, but too late for this run.
	annotate(`<pair mode="protected" peer="hostb"/>`)
	_, err = b.Wait(t.Context(), hosta, vm.Name, "the annotation to be taken", 10*time.Second,
		func(s client.Status) (bool, error) { return s.AnnotationError == "", nil })
	must(t, err)
	_, err = hosta.Virsh(t.Context(), "destroy", vm.Name)
	must(t, err)
	ready := func() bool {
		text, err := hosta.Virsh(t.Context(), "dumpxml", "--inactive", vm.Name)
		must(t, err)
		return strings.Contains(text, "-icount")
	}
	for deadline := time.Now().Add(10 * time.Second); !ready(); {
		if time.Now().After(deadline) {
			t.Fatal("the definition was not made ready")
		}
		must(t, scenario.Pause(t.Context(), 100*time.Millisecond))
	}
	watched := make(chan string, 1)
	watch, stop := context.WithTimeout(t.Context(), 3*time.Minute)
	defer stop()
	go func() {
		out, _ := hostb.Exec(watch, "stdbuf", "-oL", "virsh", "-q", "-c", "qemu:///system", "event", "--event", "lifecycle", "--loop")
		watched <- out
	}()
	must(t, vm.Boot(t.Context(), hosta))
	again(t, b, vm, hosta, hostb, plugin.Epoch(0))
	_, err = vm.KillQEMU(t.Context(), hosta)
	must(t, err)
	again(t, b, vm, hostb, hosta, plugin.Epoch(0))
	list, err := hostb.Virsh(t.Context(), "list")
	must(t, err)
	if !regexp.MustCompile(vm.Name + ` +running`).MatchString(list) {
		t.Errorf("virsh list on hostb:\n%s", list)
	}
	stop()
	events := <-watched
	t.Log(events)
	if !regexp.MustCompile(`(?s)'lifecycle' for domain '` + vm.Name + `': Started .*Resumed`).MatchString(events) {
		t.Errorf("virsh event on hostb:\n%s", events)
	}
}
