// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"
)

const (
	off          = "off"
	qemuBackend  = "qemu" // the packet path without vhost
	driveKey     = "drive"
	recordOption = "rr=record,rrfile=/dev/null"
)

// Transform makes a domain that can be protected out of an ordinary one. The
// argument is not changed. Doing it twice is the same as doing it once; a
// domain that was edited since it was transformed is brought up to date.
//
// The guest's hardware changes where Rules says "adapted". What the operator
// wrote is noted in the metadata, for Plain. A domain that cannot be protected
// gives a *NotReadyError.
func Transform(dom *libvirtxml.Domain, o Options) (*libvirtxml.Domain, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	plain, err := Plain(dom)
	if err != nil {
		return nil, err
	}
	if cpuOf(dom) == cpuWithoutRep && isModel(dom.CPU, defaultModel) {
		// libvirt may have written down more of the model since.
		o.cpu = cpuWithoutRep
	}
	return apply(plain, o, false)
}

// apply changes a plain domain, in place.
func apply(dom *libvirtxml.Domain, o Options, backup bool) (*libvirtxml.Domain, error) {
	if problems := checkDomain(dom); len(problems) > 0 {
		return nil, &NotReadyError{Domain: dom.Name, Problems: problems}
	}
	original, err := encodeOriginal(dom)
	if err != nil {
		return nil, err
	}
	if err := setMetadata(dom, originalNamespace, original); err != nil {
		return nil, err
	}

	if dom.CPU == nil {
		dom.CPU = defaultCPU()
	}
	setTimer(dom, "rtc", func(t *libvirtxml.DomainTimer) { t.Track = "guest" })
	setTimer(dom, "hpet", func(t *libvirtxml.DomainTimer) { t.Present = "no" })
	takeOut(dom)
	dev := devices(dom)
	for i := range dev.Disks {
		d := &dev.Disks[i]
		if diskBus(d) != "virtio" {
			continue
		}
		if d.Driver == nil {
			d.Driver = new(libvirtxml.DomainDiskDriver)
		}
		d.Driver.EventIDX, d.Driver.IOEventFD = off, off
		// libvirt sorts disks before it fills in a missing bus, so the order
		// would change when it reads its own XML back.
		d.Target.Bus = "virtio"
	}
	for i := range dev.Interfaces {
		n := &dev.Interfaces[i]
		if n.Driver == nil {
			n.Driver = new(libvirtxml.DomainInterfaceDriver)
		}
		n.Driver.Name, n.Driver.EventIDX, n.Driver.IOEventFD = qemuBackend, off, off
	}
	return dom, addArguments(dom, o, backup)
}

// defaultModel is QEMU's own default, too.
const defaultModel = "qemu64"

// noRep makes Linux believe in a K8 of before revision C, on which it copies and
// clears memory by loops of moves: X86_FEATURE_REP_GOOD is not set (init_amd_k8).
// QEMU's model number is 107. While instructions are counted, each turn of a "rep
// movs" or "rep stos" is a translation block of its own, after which QEMU goes
// through its main loop (target/i386/tcg/translate.c, do_gen_rep, jmp_opt).
const noRep = "qemu64-x86_64-cpu.model=4"

// cpuChoice says whether a domain gets noRep.
type cpuChoice int

const (
	// cpuByDefinition: where nobody asked for a certain CPU.
	cpuByDefinition cpuChoice = iota
	cpuWithoutRep
	cpuAsNamed
)

// cpuOf tells which of the two a domain has that was transformed. The CPU of a
// guest must not change while it runs.
func cpuOf(dom *libvirtxml.Domain) cpuChoice {
	if dom.QEMUCommandline != nil {
		for i, a := range dom.QEMUCommandline.Args {
			if a.Value == noRep && i > 0 && dom.QEMUCommandline.Args[i-1].Value == "-global" {
				return cpuWithoutRep
			}
		}
	}
	return cpuAsNamed
}

func isModel(cpu *libvirtxml.DomainCPU, model string) bool {
	return cpu != nil && cpu.Model != nil && cpu.Model.Value == model
}

// defaultCPU is what libvirt writes for an emulated domain without a model. It
// needs nothing of the host's CPU, so it is the same on both hosts.
func defaultCPU() *libvirtxml.DomainCPU {
	return &libvirtxml.DomainCPU{
		Mode: "custom", Match: "exact", Check: "none",
		Model: &libvirtxml.DomainCPUModel{Fallback: "forbid", Value: defaultModel},
	}
}

func isDefaultCPU(cpu *libvirtxml.DomainCPU) bool {
	if cpu == nil {
		return false
	}
	bare := *cpu
	bare.XMLName = xml.Name{} // set by parsing only
	return reflect.DeepEqual(&bare, defaultCPU())
}

// setTimer changes a timer of the clock, which it makes if there is none.
func setTimer(dom *libvirtxml.Domain, name string, change func(*libvirtxml.DomainTimer)) {
	if dom.Clock == nil {
		dom.Clock = &libvirtxml.DomainClock{Offset: "utc"}
	}
	t := timer(dom, name)
	if t == nil {
		dom.Clock.Timer = append(dom.Clock.Timer, libvirtxml.DomainTimer{Name: name})
		t = &dom.Clock.Timer[len(dom.Clock.Timer)-1]
	}
	change(t)
}

func timer(dom *libvirtxml.Domain, name string) *libvirtxml.DomainTimer {
	if dom.Clock == nil {
		return nil
	}
	for i := range dom.Clock.Timer {
		if dom.Clock.Timer[i].Name == name {
			return &dom.Clock.Timer[i]
		}
	}
	return nil
}

// announceKey is the feature by which a virtio card asks its guest to announce
// itself after a migration. A backup must not: it would differ from the primary.
// Told so by announce-rounds=0, QEMU frees the card's timer for it, and crashes
// when the guest resets the card (virtio_net_post_load_device, virtio_net_reset;
// seen in 10.0.2). QEMU itself announces the backup that went live.
const announceKey = "guest_announce"

// blkreplay is the block node that records the order of a disk's completions.
type blkreplay struct {
	Driver   string `json:"driver"`
	NodeName string `json:"node-name"`
	Image    string `json:"image"`
	// ReadOnly must be that of the image: the device asks this node.
	ReadOnly bool `json:"read-only,omitempty"`
}

// noVAPIC leaves out a helper for old Windows guests under KVM: at a reset it
// makes the main loop wait for the vCPU thread, which in record mode waits for
// the main loop (hw/i386/vapic.c, vapic_enable_tpr_reporting).
const noVAPIC = "apic-common.vapic=off"

// addArguments adds what libvirt has no elements for. QEMU makes the block
// nodes in the order given, after libvirt's own, and the filters when the
// network backends exist.
func addArguments(dom *libvirtxml.Domain, o Options, backup bool) error {
	pluginArg := fmt.Sprintf("file=%s,socket=%s,uuid=%s", o.PluginFile, o.PluginSocket, dom.UUID)
	if backup {
		pluginArg += ",role=backup"
	}
	args := []string{
		"-icount", fmt.Sprintf("shift=%d,%s", o.ICountShift, recordOption),
		"-plugin", pluginArg,
		"-global", noVAPIC,
	}
	if o.cpu == cpuWithoutRep || o.cpu == cpuByDefinition && isDefaultCPU(dom.CPU) {
		args = append(args, "-global", noRep)
	}
	var overrides []libvirtxml.DomainQEMUOverrideDevice
	for i, alias := range netAliases(dom.Devices.Interfaces) {
		args = append(args, "-object", fmt.Sprintf("filter-replay,id=%s%d,netdev=host%s", netFilter, i, alias))
		overrides = append(overrides, libvirtxml.DomainQEMUOverrideDevice{
			Alias: alias,
			Frontend: libvirtxml.DomainQEMUOverrideFrontend{Properties: []libvirtxml.DomainQEMUOverrideProperty{
				{Name: announceKey, Type: "bool", Value: "false"},
			}},
		})
	}
	for _, n := range DiskNodes(dom) {
		node, err := json.Marshal(blkreplay{Driver: "blkreplay", NodeName: n.Replay, Image: n.Node, ReadOnly: n.ReadOnly})
		if err != nil {
			return fmt.Errorf("disk %s: %w", n.Target, err)
		}
		args = append(args, "-blockdev", string(node))
		overrides = append(overrides, libvirtxml.DomainQEMUOverrideDevice{
			Alias: n.Alias,
			Frontend: libvirtxml.DomainQEMUOverrideFrontend{Properties: []libvirtxml.DomainQEMUOverrideProperty{
				{Name: driveKey, Type: "string", Value: n.Replay},
			}},
		})
	}
	if backup {
		args = append(args, "-incoming", "defer")
	}

	if dom.QEMUCommandline == nil {
		dom.QEMUCommandline = new(libvirtxml.DomainQEMUCommandline)
	}
	for _, a := range args {
		dom.QEMUCommandline.Args = append(dom.QEMUCommandline.Args, libvirtxml.DomainQEMUCommandlineArg{Value: a})
	}
	for _, ov := range overrides {
		addOverride(dom, ov)
	}
	return nil
}

// addOverride joins with what the operator overrides for the same device.
func addOverride(dom *libvirtxml.Domain, ov libvirtxml.DomainQEMUOverrideDevice) {
	if dom.QEMUOverride == nil {
		dom.QEMUOverride = new(libvirtxml.DomainQEMUOverride)
	}
	devs := &dom.QEMUOverride.Devices
	for i := range *devs {
		if (*devs)[i].Alias == ov.Alias {
			props := &(*devs)[i].Frontend.Properties
			*props = append(*props, ov.Frontend.Properties...)
			return
		}
	}
	*devs = append(*devs, ov)
}

// removeArguments takes our arguments and overrides out, and tells whether the
// domain had the plugin.
func removeArguments(dom *libvirtxml.Domain) bool {
	had := transformed(dom)
	if c := dom.QEMUCommandline; c != nil {
		c.Args = foreign(c.Args)
		if len(c.Args) == 0 && len(c.Envs) == 0 {
			dom.QEMUCommandline = nil
		}
	}
	if o := dom.QEMUOverride; o != nil {
		for i := range o.Devices {
			f := &o.Devices[i].Frontend
			f.Properties = slices.DeleteFunc(f.Properties, func(p libvirtxml.DomainQEMUOverrideProperty) bool {
				return p.Name == driveKey && strings.HasPrefix(p.Value, replayNode) || p.Name == announceKey && p.Value == "false"
			})
		}
		o.Devices = slices.DeleteFunc(o.Devices, func(d libvirtxml.DomainQEMUOverrideDevice) bool {
			return len(d.Frontend.Properties) == 0
		})
		if len(o.Devices) == 0 {
			dom.QEMUOverride = nil
		}
	}
	return had
}

// transformed tells whether the domain's QEMU has the plugin and records.
func transformed(dom *libvirtxml.Domain) bool {
	_, ok := argument(dom, "-plugin")
	return ok
}

// argument finds the value of an option of ours.
func argument(dom *libvirtxml.Domain, option string) (string, bool) {
	if dom.QEMUCommandline == nil {
		return "", false
	}
	args := dom.QEMUCommandline.Args
	for i := range len(args) - 1 {
		if args[i].Value == option && ours(option, args[i+1].Value) {
			return args[i+1].Value, true
		}
	}
	return "", false
}

// foreign gives the arguments that are not ours.
func foreign(args []libvirtxml.DomainQEMUCommandlineArg) []libvirtxml.DomainQEMUCommandlineArg {
	var rest []libvirtxml.DomainQEMUCommandlineArg
	for i := 0; i < len(args); i++ {
		if i+1 < len(args) && ours(args[i].Value, args[i+1].Value) {
			i++
			continue
		}
		rest = append(rest, args[i])
	}
	return rest
}

// ours recognises what addArguments adds, with any values.
func ours(option, value string) bool {
	switch option {
	case "-icount":
		return strings.HasSuffix(value, ","+recordOption)
	case "-global":
		return value == noVAPIC || value == noRep
	case "-plugin":
		return strings.Contains(value, ",socket=") && strings.Contains(value, ",uuid=")
	case "-object":
		return strings.HasPrefix(value, "filter-replay,id="+netFilter)
	case "-blockdev":
		var node blkreplay
		return json.Unmarshal([]byte(value), &node) == nil && node.Driver == "blkreplay" && strings.HasPrefix(node.NodeName, replayNode)
	case "-incoming":
		return value == "defer"
	}
	return false
}

// shiftOf reads the instruction length that a running domain uses.
func shiftOf(dom *libvirtxml.Domain) (int, error) {
	var shift int
	value, ok := argument(dom, "-icount")
	if !ok {
		return 0, ErrNotTransformed
	}
	if _, err := fmt.Sscanf(value, "shift=%d,", &shift); err != nil || shift < 0 || shift > maxShift {
		return 0, fmt.Errorf("%w: -icount %q", ErrNotTransformed, value)
	}
	return shift, nil
}
