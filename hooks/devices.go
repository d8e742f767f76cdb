// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// Support says how far a device or setting can be part of a protected domain.
type Support uint8

const (
	// Supported: nothing needs to be done.
	Supported Support = iota
	// Adapted: supported, with a change that Transform makes.
	Adapted
	// Removed: Transform takes it out; the guest can do without.
	Removed
	// Conditional: supported if the remedy's condition holds.
	Conditional
	// Refused: Check reports it.
	Refused
)

func (s Support) String() string {
	return [...]string{"supported", "adapted", "taken out", "supported if", "refused"}[s]
}

// Rule is one row of the table that says what a protected domain may have.
type Rule struct {
	// Code is stable. Refused rows give it to their problems.
	Code string
	// Subject is the device or setting, as a person calls it.
	Subject string
	Support Support
	// Reason says why it is not simply supported.
	Reason string
	// Remedy says what to do, or what Transform does.
	Remedy string

	// match gives the places that the row applies to; "" is the domain
	// itself. Refused and removed rows have it, and those of adapted ones
	// that an operator may want to hear of.
	match func(*libvirtxml.Domain) []string
}

// Rules is the table, for documentation; DEVICES.md is made from it.
func Rules() []Rule { return slices.Clone(rules) }

// Proof names the test that shows it; refused rows have none.
func (r Rule) Proof() string { return proofs[r.Code] }

// The tests that run what the table supports: with definitions in which all of
// it occurs, through the real libvirt and QEMU, cloned and failed over.
const (
	proofQ35  = "TestDefinitions/q35"
	proofI440 = "TestDefinitions/i440fx"
	proofAll  = "TestDefinitions"
	// The QEMU that tests run with has no SPICE: libvirt cannot be asked, but
	// what such a definition becomes is compared with what it is to be.
	proofReal = "TestReal"
)

// proofs names the test of each row that is not refused.
var proofs = map[string]string{
	"machine": proofAll, "cpu-default": proofAll, "rtc": proofAll, "hpet": proofAll, "firmware": proofAll, "kernel": proofAll,
	"disk-virtio": proofAll, "disk-chain": proofQ35, "disk-readonly": proofQ35, "cdrom": proofQ35, "nic-virtio": proofAll, "nic-user": proofI440,
	"serial": proofAll, "channel": proofQ35, "usb-controller": proofAll, "idle-controller": proofQ35, "input": proofQ35, "ps2": proofAll,
	"usb-redirection": proofReal, "rng": proofQ35, "sound": proofI440, "balloon": proofAll, "video": proofAll, "video-model": proofAll,
	"vnc": proofAll, "spice": proofReal, "watchdog": proofAll,
}

const (
	notMigrated = "part of its state stays behind when the backup is cloned, so the backup would diverge"
	notProven   = "its replay is not proven"
	localState  = "its state lives outside of what is replayed"
	takenOut    = "it is taken out"
)

// rules is that table. Its order is that of the problems.
var rules = []Rule{
	// The domain.
	{"domain-type", "KVM acceleration", Refused, "record/replay counts guest instructions, which only QEMU's own emulation can",
		"write <domain type='qemu'>; if it runs, do so with virsh edit, then use ftvirt enable --at-next-boot, shut it down and start it",
		onDomain(func(d *libvirtxml.Domain) bool { return d.Type != "qemu" })},
	{"no-uuid", "domain without UUID", Refused, "the pair is known by its UUID", "define it with virsh define, which gives it one",
		onDomain(func(d *libvirtxml.Domain) bool { return d.UUID == "" })},
	{"architecture", "guests other than x86_64", Refused, notProven, "use an x86_64 guest",
		onDomain(func(d *libvirtxml.Domain) bool {
			return d.OS == nil || d.OS.Type == nil || d.OS.Type.Type != "hvm" || d.OS.Type.Arch != "" && d.OS.Type.Arch != "x86_64"
		})},
	{"vcpus", "more than one vCPU", Refused, "the order in which two vCPUs reach memory is not recorded",
		"write <vcpu>1</vcpu>", onDomain(func(d *libvirtxml.Domain) bool {
			return d.VCPU != nil && d.VCPU.Value > 1 || d.VCPUs != nil && len(d.VCPUs.VCPU) > 1
		})},
	{"machine", "machine types q35 and i440fx (pc)", Supported, "", "", nil},
	{"machine-unversioned", "machine type without a version", Refused, "both hosts must build the same machine",
		"name the version, such as pc-q35-10.0; virsh define does it for an alias", onDomain(func(d *libvirtxml.Domain) bool {
			return d.OS != nil && d.OS.Type != nil && (d.OS.Type.Machine == "" || d.OS.Type.Machine == "q35" || d.OS.Type.Machine == "pc")
		})},
	{"machine-type", "other machine types", Refused, notProven, "use a q35 or i440fx machine",
		onDomain(func(d *libvirtxml.Domain) bool {
			if d.OS == nil || d.OS.Type == nil {
				return false
			}
			m := d.OS.Type.Machine
			return m != "" && m != "q35" && m != "pc" && !machineType.MatchString(m)
		})},
	{"cpu-host", "CPU modes host-passthrough, host-model and maximum", Refused, "the guest would see another CPU on the other host",
		"name a model: <cpu mode='custom' match='exact'><model>qemu64</model></cpu>", onDomain(func(d *libvirtxml.Domain) bool {
			return d.CPU != nil && d.CPU.Mode != "" && d.CPU.Mode != "custom"
		})},
	{"cpu-default", "no CPU model", Adapted, "the default of QEMU may change, and Linux on it uses string instructions, which are slow while instructions are counted",
		"qemu64 is written down, with model number 4; name another model, or a feature, for one without that", nil},
	{"clock-local", "clock in local time", Refused, "both hosts must show the guest the same clock",
		"write <clock offset='utc'>", onDomain(func(d *libvirtxml.Domain) bool {
			return d.Clock != nil && (d.Clock.Offset == "localtime" || d.Clock.Offset == "timezone" ||
				d.Clock.Offset == "variable" && d.Clock.Basis == "localtime")
		})},
	{"rtc", "real-time clock", Adapted, "on the host's clock it makes the log grow at every turn of the main loop",
		"its timer tracks the guest's time", nil},
	{"hpet", "HPET", Removed, notMigrated, "it is switched off, so the guest uses another clock source",
		onDomain(func(d *libvirtxml.Domain) bool { t := timer(d, "hpet"); return t == nil || t.Present != "no" })},
	{"hyperv", "Hyper-V enlightenments", Refused, "only KVM has them", "remove <hyperv> from <features>, and the timer hypervclock",
		onDomain(func(d *libvirtxml.Domain) bool {
			return d.Features != nil && d.Features.HyperV != nil || timer(d, "hypervclock") != nil && timer(d, "hypervclock").Present != "no"
		})},
	{"firmware", "BIOS", Supported, "", "", nil},
	{"uefi", "UEFI", Refused, "its variable store is not replicated", "install the guest with BIOS: virt-install writes no loader then",
		onDomain(func(d *libvirtxml.Domain) bool {
			return d.OS != nil && (d.OS.NVRam != nil || d.OS.Firmware == "efi" || d.OS.Loader != nil &&
				(d.OS.Loader.Type == "pflash" || d.OS.Loader.Secure == "yes" || d.OS.Loader.Stateless == "yes"))
		})},
	{"kernel", "direct kernel boot", Conditional, "QEMU reads the files when it starts", "keep the same files at the same paths on both hosts", nil},
	{"vmgenid", "VM generation ID", Refused, notMigrated, "remove <genid>", onDomain(func(d *libvirtxml.Domain) bool { return d.GenID != nil })},
	{"memory-hotplug", "memory devices", Refused, notProven, "give all memory in <memory>", func(d *libvirtxml.Domain) []string {
		return each("memory device", devices(d).Memorydevs)
	}},
	{"memory-shared", "shared memory backing", Refused, "another process may change it unrecorded", "remove <access mode='shared'/>",
		onDomain(func(d *libvirtxml.Domain) bool {
			return d.MemoryBacking != nil && d.MemoryBacking.MemoryAccess != nil && d.MemoryBacking.MemoryAccess.Mode == "shared"
		})},
	{"iothreads", "I/O threads", Refused, "they act outside of the recorded order", "remove <iothreads> and the iothread of each disk",
		onDomain(func(d *libvirtxml.Domain) bool { return d.IOThreads > 0 || d.IOThreadIDs != nil })},
	{"launch-security", "encrypted guest memory", Refused, "it needs hardware that emulation does not have", "remove <launchSecurity>",
		onDomain(func(d *libvirtxml.Domain) bool { return d.LaunchSecurity != nil })},
	{"qemu-arguments", "QEMU arguments of one's own that add devices or change time", Refused, "what they add is not recorded",
		"remove them from <qemu:commandline>, or use libvirt's elements", foreignArguments},
	{"hotplug", "disks and network cards that were attached or detached while the domain ran", Refused, "QEMU records what was there at the start",
		"power the domain off and start it again", hotplugged},

	// Disks.
	{"disk-virtio", "virtio-blk disk, raw or qcow2, in local files", Adapted, "its completions must be recorded",
		"a blkreplay node is put on top of its image; event_idx and ioeventfd are switched off", nil},
	{"disk-chain", "disk with backing images", Supported, "", "", nil},
	{"disk-readonly", "read-only disk", Conditional, "it is not replicated, since nothing can be written to a replica", "keep the same image at the same path on both hosts", nil},
	{"disk-bus", "SATA, IDE, SCSI, USB and other disk buses", Refused, notMigrated, "write <target dev='vda' bus='virtio'/>, and remove its <address>; the guest must have the driver",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return diskDevice(d) == "disk" && diskBus(d) != "virtio" })},
	{"cdrom", "CD-ROM drive without a medium", Removed, "part of its controller's state stays behind when the backup is cloned", takenOut, onDisks(emptyDrive)},
	{"cdrom-medium", "CD-ROM drive with a medium", Refused, "part of its controller's state stays behind when the backup is cloned",
		"eject it: virsh change-media DOMAIN TARGET --eject --config; or give the image as a read-only virtio disk",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return diskDevice(d) == "cdrom" && !emptyDrive(d) })},
	{"floppy", "floppy drive", Refused, notProven, "remove it",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return diskDevice(d) == "floppy" })},
	{"disk-lun", "SCSI pass-through", Refused, "the device answers unrecorded", "use device='disk'",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return diskDevice(d) == "lun" })},
	{"disk-source", "disk without a local file", Refused, "only files can be replicated", "use <disk type='file'>",
		onDisks(func(d *libvirtxml.DomainDisk) bool {
			return diskDevice(d) == "disk" && (d.Source == nil || d.Source.File == nil || d.Source.File.File == "" || d.Source.File.FDGroup != "")
		})},
	{"disk-format", "image formats other than raw and qcow2", Refused, notProven, "convert it with qemu-img convert",
		onDisks(func(d *libvirtxml.DomainDisk) bool {
			return diskDevice(d) == "disk" && imageFormat(d) != "raw" && imageFormat(d) != "qcow2"
		})},
	{"disk-shareable", "shareable disk", Refused, "another domain may change it unrecorded", "remove <shareable/>",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return d.Shareable != nil })},
	{"disk-transient", "transient disk", Refused, "its overlay is not replicated", "remove <transient/>",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return d.Transient != nil })},
	{"disk-encryption", "image encrypted by QEMU", Refused, "its secret is not given to the other host", "encrypt inside the guest",
		onDisks(func(d *libvirtxml.DomainDisk) bool {
			return d.Encryption != nil || d.Source != nil && d.Source.Encryption != nil
		})},
	{"disk-layers", "slices, data files, copy-on-read and persistent reservations", Refused, "they change which block node the device uses",
		"remove them", onDisks(func(d *libvirtxml.DomainDisk) bool {
			return d.Source != nil && (d.Source.Slices != nil || d.Source.DataStore != nil || d.Source.Reservations != nil) ||
				d.Driver != nil && d.Driver.CopyOnRead == "on"
		})},
	{"disk-throttling", "I/O limits of a disk", Refused, "throttling delays requests by the host's clock", "remove <iotune> and <throttlefilters>",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return d.IOTune != nil || d.ThrottleFilters != nil })},
	{"disk-job", "block job in progress", Refused, "it changes the block graph under the recording", "wait for it, or virsh blockjob --abort",
		onDisks(func(d *libvirtxml.DomainDisk) bool { return d.Mirror != nil })},
	{"disk-iothread", "disk served by an I/O thread", Refused, "it acts outside of the recorded order", "remove the iothread of its <driver>",
		onDisks(func(d *libvirtxml.DomainDisk) bool {
			return d.Driver != nil && (d.Driver.IOThread != nil || d.Driver.IOThreads != nil)
		})},
	{"disk-target", "two disks that libvirt would give one name", Refused, "the name tells which device is which", "give each a target of its own, vda, vdb, and so on", doubleAliases},
	{"filesystem", "shared host directory", Refused, localState, "use a disk", func(d *libvirtxml.Domain) []string {
		return each("filesystem", devices(d).Filesystems)
	}},

	// Network.
	{"nic-virtio", "virtio network card on a network, bridge, tap device or user networking", Adapted, "packets must be recorded, and outgoing ones held back",
		"a filter-replay object is added; vhost, event_idx and ioeventfd are switched off", nil},
	{"nic-user", "user networking by QEMU itself", Supported, "", "", nil},
	{"nic-model", "other network card models", Refused, notProven, "write <model type='virtio'/>",
		onNICs(func(n *libvirtxml.DomainInterface) bool { return n.Model == nil || n.Model.Type != "virtio" })},
	{"nic-backend", "vhost-user, vDPA, macvtap, pass-through and socket networking", Refused, "packets bypass QEMU, or their replay is not proven",
		"use <interface type='bridge'> or 'network'", onNICs(func(n *libvirtxml.DomainInterface) bool {
			s := n.Source
			return s == nil || s.User == nil && s.Ethernet == nil && s.Network == nil && s.Bridge == nil ||
				n.Backend != nil && n.Backend.Type == "passt"
		})},
	{"nic-queues", "several queues on a network card", Refused, notProven, "remove queues from its <driver>",
		onNICs(func(n *libvirtxml.DomainInterface) bool { return n.Driver != nil && n.Driver.Queues > 1 })},
	{"nic-teaming", "teamed network cards", Refused, "the partner is a passed-through device", "remove <teaming>",
		onNICs(func(n *libvirtxml.DomainInterface) bool { return n.Teaming != nil })},

	// Other devices.
	{"serial", "serial port and its console", Supported, "", "", nil},
	{"serial-model", "serial ports that are not 16550A", Refused, notProven, "use <target type='isa-serial'>", func(d *libvirtxml.Domain) []string {
		var bad []string
		for i, s := range devices(d).Serials {
			if s.Target != nil && s.Target.Type != "" && s.Target.Type != "isa-serial" {
				bad = append(bad, fmt.Sprintf("serial %d", i))
			}
		}
		return bad
	}},
	{"console-virtio", "virtio console", Refused, notMigrated, "use a serial console: <target type='serial'/>", func(d *libvirtxml.Domain) []string {
		var bad []string
		for i, c := range devices(d).Consoles {
			if c.Target != nil && c.Target.Type != "" && c.Target.Type != "serial" {
				bad = append(bad, fmt.Sprintf("console %d", i))
			}
		}
		return bad
	}},
	{"parallel", "parallel port", Refused, notProven, "remove it", func(d *libvirtxml.Domain) []string { return each("parallel", devices(d).Parallels) }},
	{"channel", "channel of the guest agent, and those of SPICE", Removed, notMigrated, takenOut + "; the guest's agent then has nobody to talk to",
		onEach("channel", func(d *libvirtxml.DomainDeviceList) []libvirtxml.DomainChannel { return d.Channels }, looseChannel)},
	{"channel-other", "other channels", Refused, notMigrated, "remove <channel>",
		onEach("channel", func(d *libvirtxml.DomainDeviceList) []libvirtxml.DomainChannel { return d.Channels }, not(looseChannel))},
	{"usb-controller", "USB controllers", Removed, "their timers are not those of the primary", takenOut,
		onEach("USB controller", func(d *libvirtxml.DomainDeviceList) []libvirtxml.DomainController { return d.Controllers },
			func(c *libvirtxml.DomainController) bool { return c.Type == "usb" && looseController(c) })},
	{"idle-controller", "virtio-serial and SCSI controllers to which nothing is attached", Removed, notMigrated, takenOut,
		onEach("controller", func(d *libvirtxml.DomainDeviceList) []libvirtxml.DomainController { return d.Controllers },
			func(c *libvirtxml.DomainController) bool { return c.Type != "usb" && looseController(c) })},
	{"controller", "controllers other than PCI, USB, SATA, IDE, SCSI and virtio-serial ones", Refused, notProven, "remove the controller and what is attached to it",
		func(d *libvirtxml.Domain) []string {
			var bad []string
			for i := range devices(d).Controllers {
				c := &d.Devices.Controllers[i]
				if !looseController(c) && !slices.Contains([]string{"pci", "usb", "sata", "ide", "fdc", "isa"}, c.Type) {
					bad = append(bad, "controller "+c.Type)
				}
			}
			return bad
		}},
	{"ps2", "PS/2 mouse and keyboard", Supported, "", "", nil},
	{"input", "USB and virtio input devices, such as the tablet", Removed, notMigrated, takenOut + "; the PS/2 mouse and keyboard stay",
		onEach("input", func(d *libvirtxml.DomainDeviceList) []libvirtxml.DomainInput { return d.Inputs }, looseInput)},
	{"input-other", "input devices of the host", Refused, "the device answers unrecorded", "remove <input>", func(d *libvirtxml.Domain) []string {
		var bad []string
		for _, in := range devices(d).Inputs {
			if !looseInput(&in) && in.Bus != "ps2" && (in.Bus != "" || in.Type != "mouse" && in.Type != "keyboard") {
				bad = append(bad, strings.TrimSpace("input "+in.Type+" "+in.Bus))
			}
		}
		return bad
	}},
	{"usb-redirection", "USB redirection by SPICE, and hubs", Removed, "the device answers unrecorded", takenOut, func(d *libvirtxml.Domain) []string {
		redirected := onEach("redirdev", func(d *libvirtxml.DomainDeviceList) []libvirtxml.DomainRedirDev { return d.RedirDevs }, looseRedirDev)
		return append(redirected(d), each("hub", devices(d).Hubs)...)
	}},
	{"usb-redirection-other", "USB redirection by other means", Refused, "the device answers unrecorded", "remove <redirdev>",
		onEach("redirdev", func(d *libvirtxml.DomainDeviceList) []libvirtxml.DomainRedirDev { return d.RedirDevs }, not(looseRedirDev))},
	{"hostdev", "passed-through host device", Refused, "the device answers unrecorded, and the other host does not have it", "remove <hostdev>", func(d *libvirtxml.Domain) []string {
		return each("hostdev", devices(d).Hostdevs)
	}},
	{"tpm", "TPM", Refused, localState, "remove <tpm>", func(d *libvirtxml.Domain) []string { return each("tpm", devices(d).TPMs) }},
	{"smartcard", "smart card", Refused, "the card answers unrecorded", "remove it", func(d *libvirtxml.Domain) []string { return each("smartcard", devices(d).Smartcards) }},
	{"rng", "virtio random number generator", Removed, notMigrated, takenOut + "; the guest has other sources", func(d *libvirtxml.Domain) []string {
		return each("rng", devices(d).RNGs)
	}},
	{"sound", "sound card", Removed, notProven, takenOut, func(d *libvirtxml.Domain) []string { return each("sound", devices(d).Sounds) }},
	{"balloon", "memory balloon", Removed, "it changes the guest's memory on the host's demand", takenOut,
		onDomain(func(d *libvirtxml.Domain) bool { b := devices(d).MemBalloon; return b == nil || b.Model != "none" })},
	{"balloon-stats", "memory balloon with statistics", Refused, "its timer does not match the primary's, and the figures would end with the balloon",
		"remove <stats> from <memballoon>", onDomain(func(d *libvirtxml.Domain) bool {
			b := devices(d).MemBalloon
			return b != nil && b.Model != "none" && b.Stats != nil && b.Stats.Period > 0
		})},
	{"video", "VGA graphics", Supported, "", "", nil},
	{"video-model", "video models qxl, virtio, cirrus and bochs", Adapted, notProven, "they are replaced by VGA", func(d *libvirtxml.Domain) []string {
		return videos(d, otherVideo)
	}},
	{"video-other", "other video models", Refused, notProven, "write <model type='vga'/>", func(d *libvirtxml.Domain) []string {
		return videos(d, func(v *libvirtxml.DomainVideo) bool {
			return !otherVideo(v) && !slices.Contains([]string{"", "none", "vga"}, v.Model.Type)
		})
	}},
	{"video-second", "a second video device", Refused, notProven, "keep one <video>", onDomain(func(d *libvirtxml.Domain) bool { return len(devices(d).Videos) > 1 })},
	{"vnc", "display by VNC", Supported, "", "", nil},
	{"spice", "display by SPICE", Adapted, notProven, "it is shown by VNC, at the same address and with the same password",
		onGraphics(func(g *libvirtxml.DomainGraphic) bool { return g.Spice != nil })},
	{"spice-only", "displays that VNC cannot take the place of: SPICE with OpenGL, TLS only, or a password of more than 8 characters", Refused, notProven,
		"write <graphics type='vnc'/>", onGraphics(func(g *libvirtxml.DomainGraphic) bool { return g.Spice != nil && !replaceable(g.Spice) })},
	{"graphics", "displays other than VNC and SPICE", Refused, notProven, "write <graphics type='vnc'/>",
		onGraphics(func(g *libvirtxml.DomainGraphic) bool { return g.VNC == nil && g.Spice == nil })},
	{"watchdog", "watchdogs i6300esb and iTCO", Supported, "", "", nil},
	{"watchdog-model", "other watchdogs", Refused, notProven, "write <watchdog model='i6300esb'/>", func(d *libvirtxml.Domain) []string {
		var bad []string
		for _, w := range devices(d).Watchdogs {
			if w.Model != "itco" && w.Model != "i6300esb" {
				bad = append(bad, "watchdog "+w.Model)
			}
		}
		return bad
	}},
	{"iommu", "IOMMU", Refused, notProven, "remove <iommu>", func(d *libvirtxml.Domain) []string {
		bad := each("iommu", devices(d).IOMMUs)
		if len(bad) == 0 && d.Devices.IOMMU != nil {
			bad = append(bad, "iommu")
		}
		return bad
	}},
	{"vsock", "vsock", Refused, "vhost moves its data unrecorded", "remove <vsock>", onDomain(func(d *libvirtxml.Domain) bool { return devices(d).VSock != nil })},
	{"shmem", "memory shared between domains", Refused, "another process may change it unrecorded", "remove <shmem>", func(d *libvirtxml.Domain) []string {
		return each("shmem", devices(d).Shmems)
	}},
	{"crypto", "virtio crypto device", Refused, notProven, "remove <crypto>", func(d *libvirtxml.Domain) []string { return each("crypto", devices(d).Crypto) }},
	{"panic", "panic notifier", Refused, notProven, "remove <panic>", func(d *libvirtxml.Domain) []string { return each("panic", devices(d).Panics) }},
	{"pstore", "persistent storage for crash dumps", Refused, localState, "remove <pstore>", onDomain(func(d *libvirtxml.Domain) bool { return devices(d).PStore != nil })},
}

var machineType = regexp.MustCompile(`^pc-(q35|i440fx)-[0-9]+\.[0-9]+(\.[0-9]+)?$`)

func onDomain(bad func(*libvirtxml.Domain) bool) func(*libvirtxml.Domain) []string {
	return func(d *libvirtxml.Domain) []string {
		if bad(d) {
			return []string{""}
		}
		return nil
	}
}

func onDisks(bad func(*libvirtxml.DomainDisk) bool) func(*libvirtxml.Domain) []string {
	return func(d *libvirtxml.Domain) []string {
		var paths []string
		for i := range devices(d).Disks {
			if disk := &d.Devices.Disks[i]; bad(disk) {
				paths = append(paths, "disk "+target(disk))
			}
		}
		return paths
	}
}

func onNICs(bad func(*libvirtxml.DomainInterface) bool) func(*libvirtxml.Domain) []string {
	return func(d *libvirtxml.Domain) []string {
		var paths []string
		for i := range devices(d).Interfaces {
			if nic := &d.Devices.Interfaces[i]; bad(nic) {
				paths = append(paths, nicPath(nic, i))
			}
		}
		return paths
	}
}

func onGraphics(bad func(*libvirtxml.DomainGraphic) bool) func(*libvirtxml.Domain) []string {
	return func(d *libvirtxml.Domain) []string {
		var paths []string
		for i := range devices(d).Graphics {
			if bad(&d.Devices.Graphics[i]) {
				paths = append(paths, fmt.Sprintf("graphics %d", i))
			}
		}
		return paths
	}
}

// onEach gives the devices of one kind that bad tells.
func onEach[T any](name string, list func(*libvirtxml.DomainDeviceList) []T, bad func(*T) bool) func(*libvirtxml.Domain) []string {
	return func(d *libvirtxml.Domain) []string {
		var paths []string
		all := list(devices(d))
		names := each(name, all)
		for i := range all {
			if bad(&all[i]) {
				paths = append(paths, names[i])
			}
		}
		return paths
	}
}

func not[T any](f func(*T) bool) func(*T) bool { return func(x *T) bool { return !f(x) } }

func videos(d *libvirtxml.Domain, bad func(*libvirtxml.DomainVideo) bool) []string {
	var paths []string
	for i := range devices(d).Videos {
		if v := &d.Devices.Videos[i]; bad(v) {
			paths = append(paths, "video "+v.Model.Type)
		}
	}
	return paths
}

func nicPath(nic *libvirtxml.DomainInterface, i int) string {
	if nic.MAC != nil && nic.MAC.Address != "" {
		return "interface " + nic.MAC.Address
	}
	return fmt.Sprintf("interface %d", i)
}

// each refuses every device of a kind.
func each[T any](name string, list []T) []string {
	paths := make([]string, len(list))
	for i := range list {
		paths[i] = name
		if len(list) > 1 {
			paths[i] = fmt.Sprintf("%s %d", name, i)
		}
	}
	return paths
}

func diskDevice(d *libvirtxml.DomainDisk) string {
	if d.Device == "" {
		return "disk"
	}
	return d.Device
}

// doubleAliases finds virtio disks that libvirt's rule gives one alias, or none.
func doubleAliases(d *libvirtxml.Domain) []string {
	var bad []string
	seen := map[string]bool{}
	for i := range devices(d).Disks {
		disk := &d.Devices.Disks[i]
		if diskDevice(disk) != "disk" || diskBus(disk) != "virtio" {
			continue
		}
		alias := diskAlias(disk)
		if seen[alias] || !isUserAlias(disk.Alias) && diskIndex(disk) < 0 {
			bad = append(bad, "disk "+target(disk))
		}
		seen[alias] = true
	}
	return bad
}

// risky are the QEMU options that add a device, a backend or another clock.
var risky = []string{
	"accel", "audio", "audiodev", "blockdev", "cdrom", "chardev", "cpu", "device", "drive", "fsdev", "hda", "hdb", "hdc", "hdd",
	"icount", "incoming", "loadvm", "machine", "M", "monitor", "net", "netdev", "nic", "object", "parallel", "pflash", "plugin",
	"qmp", "rtc", "sd", "serial", "smp", "snapshot", "tpmdev", "usb", "usbdevice", "virtfs",
}

func foreignArguments(d *libvirtxml.Domain) []string {
	if d.QEMUCommandline == nil {
		return nil
	}
	var bad []string
	for _, a := range foreign(d.QEMUCommandline.Args) {
		if name := strings.TrimLeft(a.Value, "-"); name != a.Value && slices.Contains(risky, name) {
			bad = append(bad, "qemu argument "+a.Value)
		}
	}
	return bad
}
