// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"libvirt.org/go/libvirtxml"
)

// How libvirt names block nodes and devices is its own affair, so the
// derivation is held against the libvirt and the QEMU that are installed: a
// transformed domain with all that matters to the numbering is started, paused,
// by a private driver that no other domain of the machine knows of.
func TestNamesAgreeWithLibvirt(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"virsh", "qemu-img", "qemu-system-x86_64"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v; run make deps", err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	dir := t.TempDir()
	run := func(name string, args ...string) {
		t.Helper()
		out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	image := func(name string) string { return filepath.Join(dir, name) }
	run("qemu-img", "create", "-q", "-f", "raw", image("base.img"), "1M")
	run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", image("mid.qcow2"))
	for _, top := range []string{"declared.qcow2", "probed.qcow2"} {
		run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", image(top))
	}
	run("qemu-img", "create", "-q", "-f", "raw", image("plain.img"), "1M")
	run("qemu-img", "create", "-q", "-f", "raw", image("readonly.img"), "1M")
	run("qemu-img", "create", "-q", "-f", "qcow2", image("alone.qcow2"), "1M")

	text := strings.NewReplacer("DIR", dir).Replace(`<domain type='qemu'>
  <name>names</name>
  <uuid>0f9c2f0a-55a5-4f38-9e1c-5a8f0a1d7b01</uuid>
  <memory unit='MiB'>16</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-q35-9.1'>hvm</type></os>
  <devices>
    <disk type='file'><driver name='qemu' type='qcow2'/><source file='DIR/probed.qcow2'/><target dev='vdaa' bus='virtio'/></disk>
    <disk type='file'><source file='DIR/plain.img'/><target dev='vda'/></disk>
    <disk type='file'><driver name='qemu' type='qcow2'/><source file='DIR/declared.qcow2'/>
      <backingStore type='file'><format type='qcow2'/><source file='DIR/mid.qcow2'/>
        <backingStore type='file'><format type='raw'/><source file='DIR/base.img'/><backingStore/></backingStore>
      </backingStore><target dev='vdd' bus='virtio'/></disk>
    <disk type='file'><driver name='qemu' type='qcow2' cache='none' discard='unmap' detect_zeroes='unmap'/><source file='DIR/alone.qcow2'/><backingStore/><target dev='vdb' bus='virtio'/><alias name='ua-own'/></disk>
    <disk type='file'><driver name='qemu' type='raw' io='threads' detect_zeroes='on'/><source file='DIR/readonly.img'/><target dev='vdc' bus='virtio'/><readonly/></disk>
    <interface type='ethernet'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>
    <interface type='ethernet'><mac address='52:54:00:00:00:02'/><model type='virtio'/><alias name='ua-up'/></interface>
    <interface type='ethernet'><mac address='52:54:00:00:00:03'/><model type='virtio'/><driver name='vhost'/></interface>
  </devices>
</domain>`)
	dom, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	ft, err := Transform(dom, options)
	if err != nil {
		t.Fatal(err)
	}
	// An empty drive takes a number, too, although a protected domain may not
	// have one. It is added here, since Transform refuses it.
	ft.Devices.Disks = append(ft.Devices.Disks, libvirtxml.DomainDisk{
		Device: "cdrom", Target: &libvirtxml.DomainDiskTarget{Dev: "sda", Bus: "sata"},
	})
	nodes := DiskNodes(ft)
	removeArguments(ft)
	if err := addArguments(ft, options, false); err != nil {
		t.Fatal(err)
	}
	// The plugin is tested elsewhere; here QEMU runs without.
	withoutPlugin(ft)
	file := image("names.xml")
	if err := os.WriteFile(file, []byte(marshal(t, ft)), 0o600); err != nil {
		t.Fatal(err)
	}
	out := embedded(ctx, t,
		"create "+file+" --paused",
		"dumpxml names",
		`qemu-monitor-command names '{"execute":"query-named-block-nodes","arguments":{"flat":true}}'`,
		"destroy names",
	)

	from, to := strings.Index(out, "<domain "), strings.Index(out, "</domain>")
	if from < 0 || to < 0 {
		t.Fatalf("no domain:\n%s", out)
	}
	live, err := Parse([]byte(out[from : to+len("</domain>")]))
	if err != nil {
		t.Fatal(err)
	}
	var reply struct {
		Return []struct {
			NodeName string `json:"node-name"`
			File     string
		}
	}
	if err := json.Unmarshal([]byte(regexp.MustCompile(`(?m)^\{"return".*$`).FindString(out)), &reply); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	fileOf := map[string]string{}
	for _, n := range reply.Return {
		fileOf[n.NodeName] = n.File
	}

	byTarget := map[string]DiskNode{}
	for _, n := range nodes {
		byTarget[n.Target] = n
	}
	if len(byTarget) != 5 {
		t.Fatalf("nodes: %+v", nodes)
	}
	for i := range live.Devices.Disks {
		d := &live.Devices.Disks[i]
		if d.Device == "cdrom" {
			continue
		}
		n := byTarget[target(d)]
		layer := "format"
		if imageFormat(d) == "raw" {
			layer = "storage"
		}
		if want := fmt.Sprintf("libvirt-%d-%s", d.Source.Index, layer); n.Node != want {
			t.Errorf("disk %s: derived node %s, libvirt made %s", n.Target, n.Node, want)
		}
		if n.Alias != d.Alias.Name {
			t.Errorf("disk %s: derived alias %s, libvirt gave %s", n.Target, n.Alias, d.Alias.Name)
		}
		// The device sits on the replay node; that must be on the right image.
		if top := fileOf[n.Replay]; !strings.Contains(top, filepath.Base(d.Source.File.File)) {
			t.Errorf("disk %s: %s is on %s, not on %s", n.Target, n.Replay, top, d.Source.File.File)
		}
	}
	aliases := netAliases(ft.Devices.Interfaces)
	for i, n := range live.Devices.Interfaces {
		if n.Alias.Name != aliases[i] {
			t.Errorf("interface %d: derived alias %s, libvirt gave %s", i, aliases[i], n.Alias.Name)
		}
	}
	// What libvirt shows of a running domain must give the same answer.
	for _, n := range DiskNodes(live) {
		if byTarget[n.Target].Node != n.Node {
			t.Errorf("disk %s: %s from the live XML, %s from the definition", n.Target, n.Node, byTarget[n.Target].Node)
		}
	}
	if again, err := Plain(live); err != nil || transformed(again) {
		t.Errorf("Plain of the running domain: %v", err)
	}
}

// driver is the directory of a private driver, in which what it found out about
// QEMU is kept from one use to the next.
var driver struct {
	sync.Mutex
	dir string
}

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if driver.dir != "" {
		_ = os.RemoveAll(driver.dir)
	}
	os.Exit(code)
}

// embedded runs virsh's commands with the private driver.
func embedded(ctx context.Context, t *testing.T, commands ...string) string {
	t.Helper()
	driver.Lock()
	defer driver.Unlock()
	if driver.dir == "" {
		dir, err := os.MkdirTemp("", "ftvirt-hooks") // short: sockets are below it
		if err != nil {
			t.Fatal(err)
		}
		driver.dir = dir
		conf := "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nnamespaces = []\nremember_owner = 0\n"
		if os.Geteuid() == 0 {
			conf += "user = \"root\"\ngroup = \"root\"\n"
		}
		if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "etc/qemu.conf"), []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(ctx, "virsh", "-q", "-c", "qemu:///embed?root="+driver.dir, strings.Join(commands, "; ")).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh: %v\n%s", err, out)
	}
	return string(out)
}

func withoutPlugin(dom *libvirtxml.Domain) {
	args := dom.QEMUCommandline.Args
	for i := range args {
		if args[i].Value == "-plugin" {
			dom.QEMUCommandline.Args = append(args[:i:i], args[i+2:]...)
			return
		}
	}
}
