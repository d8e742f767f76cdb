// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"
)

// refused lists changes to the plain domain, each with the one problem, and its
// place, that it must give.
var refused = []struct{ code, from, to, path string }{
	{"domain-type", "<domain type='qemu'", "<domain type='kvm'", ""},
	{"no-uuid", "<uuid>3e0a1c52-8d0f-4b8e-9a55-0d8c44a1d1b0</uuid>", "", ""},
	{"architecture", "arch='x86_64'", "arch='aarch64'", ""},
	{"vcpus", ">1</vcpu>", ">2</vcpu>", ""},
	{"vcpus", "<vcpu placement='static'>1", "<vcpu current='1'>4", ""},
	{"machine-unversioned", "machine='pc-q35-10.0'", "machine='q35'", ""},
	{"machine-type", "machine='pc-q35-10.0'", "machine='microvm'", ""},
	{"cpu-host", "<clock", "<cpu mode='host-passthrough'/><clock", ""},
	{"cpu-host", "<clock", "<cpu mode='host-model'/><clock", ""},
	{"cpu-host", "<clock", "<cpu mode='maximum'/><clock", ""},
	{"clock-local", "offset='utc'", "offset='localtime'", ""},
	{"clock-local", "offset='utc'", "offset='timezone' timezone='Europe/Berlin'", ""},
	{"clock-local", "offset='utc'", "offset='variable' basis='localtime'", ""},
	{"uefi", "<os>", "<os firmware='efi'>", ""},
	{"uefi", "<boot dev='hd'/>", "<loader readonly='yes' type='pflash'>/x.fd</loader><nvram>/y.fd</nvram>", ""},
	{"vmgenid", "<memory ", "<genid>3e0a1c52-8d0f-4b8e-9a55-0d8c44a1d1b1</genid><memory ", ""},
	{"memory-hotplug", "</devices>", "<memory model='dimm'><target><size>1</size></target></memory></devices>", "memory device"},
	{"memory-shared", "<os>", "<memoryBacking><access mode='shared'/></memoryBacking><os>", ""},
	{"iothreads", "<os>", "<iothreads>1</iothreads><os>", ""},
	{"launch-security", "</domain>", "<launchSecurity type='sev'/></domain>", ""},
	{"qemu-arguments", "</domain>", "<commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'><arg value='-device'/><arg value='edu'/></commandline></domain>", "qemu argument -device"},
	{"disk-bus", "bus='virtio'", "bus='sata'", "disk vda"},
	{"cdrom-medium", "</devices>", "<disk type='file' device='cdrom'><source file='/x.iso'/><target dev='sda' bus='sata'/></disk></devices>", "disk sda"},
	{"hyperv", "<features>", "<features><hyperv><relaxed state='on'/></hyperv>", ""},
	{"hyperv", "<clock offset='utc'/>", "<clock offset='utc'><timer name='hypervclock' present='yes'/></clock>", ""},
	{"floppy", "</devices>", "<disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk></devices>", "disk fda"},
	{"disk-lun", "</devices>", "<disk type='block' device='lun'><source dev='/dev/x'/><target dev='sda' bus='scsi'/></disk></devices>", "disk sda"},
	{"disk-source", "type='file' device='disk'", "type='block' device='disk'", "disk vda"},
	{"disk-source", "<source file='/var/lib/libvirt/images/vda.img'/>", "", "disk vda"},
	{"disk-format", "type='raw'", "type='vmdk'", "disk vda"},
	{"disk-shareable", "<target dev='vda'", "<shareable/><target dev='vda'", "disk vda"},
	{"disk-transient", "<target dev='vda'", "<transient/><target dev='vda'", "disk vda"},
	{"disk-encryption", "<target dev='vda'", "<encryption format='luks'/><target dev='vda'", "disk vda"},
	{"disk-layers", "type='raw'", "type='raw' copy_on_read='on'", "disk vda"},
	{"disk-layers", "vda.img'/>", "vda.img'><slices><slice type='storage' offset='0' size='1'/></slices></source>", "disk vda"},
	{"disk-throttling", "<target dev='vda'", "<iotune><total_iops_sec>9</total_iops_sec></iotune><target dev='vda'", "disk vda"},
	{"disk-job", "<target dev='vda'", "<mirror type='file' file='/m'><source file='/m'/></mirror><target dev='vda'", "disk vda"},
	{"disk-iothread", "type='raw'", "type='raw' iothread='1'", "disk vda"},
	{"disk-target", "</devices>", "<disk type='file'><source file='/x'/><target dev='sda' bus='virtio'/></disk></devices>", "disk sda"},
	{"filesystem", "</devices>", "<filesystem type='mount'><source dir='/x'/><target dir='y'/></filesystem></devices>", "filesystem"},
	{"nic-model", "<model type='virtio'/>", "<model type='e1000'/>", "interface 52:54:00:6b:3c:01"},
	{"nic-backend", "<interface type='bridge'>", "<interface type='vhostuser'>", "interface 52:54:00:6b:3c:01"},
	{"nic-backend", "<interface type='bridge'>", "<interface type='direct'>", "interface 52:54:00:6b:3c:01"},
	{"nic-backend", "<model type='virtio'/>", "<model type='virtio'/><backend type='passt'/>", "interface 52:54:00:6b:3c:01"},
	{"nic-queues", "<model type='virtio'/>", "<model type='virtio'/><driver queues='2'/>", "interface 52:54:00:6b:3c:01"},
	{"nic-teaming", "<model type='virtio'/>", "<model type='virtio'/><teaming type='persistent'/>", "interface 52:54:00:6b:3c:01"},
	{"serial-model", "<target type='isa-serial' port='0'>", "<target type='pci-serial' port='0'>", "serial 0"},
	{"console-virtio", "<target type='serial' port='0'/>", "<target type='virtio' port='0'/>", "console 0"},
	{"parallel", "</devices>", "<parallel type='pty'/></devices>", "parallel"},
	{"channel-other", "</devices>", "<channel type='unix'><target type='virtio' name='org.example.0'/></channel></devices>", "channel"},
	{"controller", "</devices>", "<controller type='ccid' index='0'/></devices>", "controller ccid"},
	{"input-other", "</devices>", "<input type='evdev'><source dev='/dev/input/event1'/></input></devices>", "input evdev"},
	{"input-other", "</devices>", "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event1'/></input></devices>", "input passthrough virtio"},
	{"usb-redirection-other", "</devices>", "<redirdev bus='usb' type='tcp'><source mode='connect' host='x' service='1'/></redirdev></devices>", "redirdev"},
	{"hostdev", "</devices>", "<hostdev mode='subsystem' type='pci'/></devices>", "hostdev"},
	{"tpm", "</devices>", "<tpm model='tpm-tis'><backend type='emulator'/></tpm></devices>", "tpm"},
	{"smartcard", "</devices>", "<smartcard mode='host'/></devices>", "smartcard"},
	{"balloon-stats", "<memballoon model='virtio'/>", "<memballoon model='virtio'><stats period='10'/></memballoon>", ""},
	{"video-other", "</devices>", "<video><model type='ramfb'/></video></devices>", "video ramfb"},
	{"video-second", "</devices>", "<video><model type='vga'/></video><video><model type='virtio'/></video></devices>", ""},
	{"graphics", "</devices>", "<graphics type='sdl' display=':0'/></devices>", "graphics 0"},
	{"spice-only", "</devices>", "<graphics type='spice'><gl enable='yes'/></graphics></devices>", "graphics 0"},
	{"spice-only", "</devices>", "<graphics type='spice' defaultMode='secure'/></devices>", "graphics 0"},
	{"spice-only", "</devices>", "<graphics type='spice'><channel name='main' mode='secure'/></graphics></devices>", "graphics 0"},
	{"spice-only", "</devices>", "<graphics type='spice' passwd='nine chars'/></devices>", "graphics 0"},
	{"watchdog-model", "</devices>", "<watchdog model='ib700'/></devices>", "watchdog ib700"},
	{"iommu", "</devices>", "<iommu model='intel'/></devices>", "iommu"},
	{"vsock", "</devices>", "<vsock model='virtio'/></devices>", ""},
	{"shmem", "</devices>", "<shmem name='x'/></devices>", "shmem"},
	{"crypto", "</devices>", "<crypto model='virtio' type='qemu'/></devices>", "crypto"},
	{"panic", "</devices>", "<panic model='isa'/></devices>", "panic"},
	{"pstore", "</devices>", "<pstore backend='acpi-erst'/></devices>", ""},
}

func plainText(t *testing.T) string {
	t.Helper()
	text := marshal(t, read(t, "q35-plain.in.xml"))
	// The table above is in libvirt's way of writing.
	text = strings.ReplaceAll(text, `"`, `'`)
	return regexp.MustCompile(`></[a-z]+>`).ReplaceAllStringFunc(text, func(s string) string { return "/>" })
}

func TestCheckRefuses(t *testing.T) {
	t.Parallel()
	text := plainText(t)
	tested := map[string]bool{}
	for _, tc := range refused {
		tested[tc.code] = true
		if !strings.Contains(text, tc.from) {
			t.Errorf("%s: %q is not in the domain", tc.code, tc.from)
			continue
		}
		dom, err := Parse([]byte(strings.Replace(text, tc.from, tc.to, 1)))
		if err != nil {
			t.Errorf("%s: %v", tc.code, err)
			continue
		}
		problems := Check(dom, CheckOptions{})
		if len(problems) != 1 || problems[0].Code != tc.code || problems[0].Path != tc.path {
			t.Errorf("%s: %q: got %+v", tc.code, tc.to, problems)
		}
		if _, err := Transform(dom, options); err == nil {
			t.Errorf("%s: was transformed all the same", tc.code)
		}
	}
	for _, r := range Rules() {
		if r.Support == Refused && !tested[r.Code] && r.Code != "hotplug" { // see TestHotplug
			t.Errorf("rule %s has no test", r.Code)
		}
	}
}

func TestCheckAccepts(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"q35-plain.in.xml", "q35-plain.ft.xml", "live.xml", "live.backup.xml"} {
		if problems := Check(read(t, name), CheckOptions{Peers: []string{"hosta", "hostb"}, Host: "hostc"}); len(problems) > 0 {
			t.Errorf("%s: %+v", name, problems)
		}
	}
	for _, name := range inputs(t) {
		if problems := Check(read(t, name+".in.xml"), CheckOptions{Peer: "hostb"}); len(problems) > 0 {
			t.Errorf("%s: %+v", name, problems)
		}
	}
}

func TestCheckPair(t *testing.T) {
	t.Parallel()
	plain := read(t, "i440fx.in.xml")
	annotated := read(t, "q35-plain.in.xml")
	broken := withMetadata(`<ft:pair` + declared + ` mode="x"/>`)
	for name, tc := range map[string]struct {
		dom  *libvirtxml.Domain
		o    CheckOptions
		want string
	}{
		"missing":     {plain, CheckOptions{}, "missing-peer"},
		"given":       {plain, CheckOptions{Peer: "hostb"}, ""},
		"annotated":   {annotated, CheckOptions{Host: "hosta"}, ""},
		"itself":      {annotated, CheckOptions{Host: "hostb"}, "peer-is-this-host"},
		"unknown":     {annotated, CheckOptions{Peers: []string{}}, "unknown-peer"},
		"overridden":  {annotated, CheckOptions{Peer: "hostc", Peers: []string{"hostc"}}, ""},
		"snapshots":   {annotated, CheckOptions{Snapshots: 2}, "snapshots"},
		"annotation":  {broken, CheckOptions{}, "annotation"},
		"broken, too": {broken, CheckOptions{Peer: "hostb"}, "annotation"},
	} {
		got := checkPair(tc.dom, tc.o)
		if tc.want == "" && len(got) == 0 {
			continue
		}
		if len(got) != 1 || got[0].Code != tc.want || got[0].Reason == "" || got[0].Remedy == "" {
			t.Errorf("%s: got %+v, want %q", name, got, tc.want)
		}
	}
}

func TestRules(t *testing.T) {
	t.Parallel()
	var codes []string
	for _, r := range Rules() {
		if slices.Contains(codes, r.Code) {
			t.Errorf("code %s is used twice", r.Code)
		}
		codes = append(codes, r.Code)
		if needs := r.Support == Refused || r.Support == Removed; needs && r.match == nil || r.match != nil && !needs && r.Support != Adapted {
			t.Errorf("%s: %s with match %t", r.Code, r.Support, r.match != nil)
		}
		if (r.Proof() == "") != (r.Support == Refused) {
			t.Errorf("%s: %s, proven by %q", r.Code, r.Support, r.Proof())
		}
		if r.Subject == "" || (r.Support != Supported) != (r.Reason != "" && r.Remedy != "") {
			t.Errorf("%s: incomplete: %+v", r.Code, r)
		}
	}
	// No rule may take an empty domain for granted.
	Check(&libvirtxml.Domain{}, CheckOptions{})
}
