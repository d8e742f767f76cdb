// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin"
	"libvirt.org/go/libvirtxml"
)

var update = flag.Bool("update", false, "write the golden files in testdata")

var options = Options{
	PluginFile:   "/usr/lib/ftvirt/ftvirt.so",
	PluginSocket: "/run/ftvirt/plugin.sock",
	ICountShift:  DefaultICountShift,
}

func read(t *testing.T, name string) *libvirtxml.Domain {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	dom, err := Parse(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return dom
}

func marshal(t *testing.T, dom *libvirtxml.Domain) string {
	t.Helper()
	text, err := dom.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return text + "\n"
}

// golden compares the domain with a golden file and has libvirt's own schema
// judge it.
func golden(t *testing.T, name string, dom *libvirtxml.Domain) {
	t.Helper()
	got := marshal(t, dom)
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v; write it with go test ./hooks -update", err)
	}
	if masked(got) != masked(string(want)) {
		t.Errorf("%s differs; got:\n%s", name, got)
	}
	validate(t, got)
}

var note = regexp.MustCompile(`(?s)(<fto:original [^>]*>).*?(</fto:original>)`)

// masked leaves the noted definition out: its text depends on the compressor.
// What it says is tested by Plain.
func masked(text string) string { return note.ReplaceAllString(text, "$1...$2") }

func validate(t *testing.T, text string) {
	t.Helper()
	tool, err := exec.LookPath("virt-xml-validate")
	if err != nil {
		t.Fatal("virt-xml-validate is missing; run make deps")
	}
	file := filepath.Join(t.TempDir(), "domain.xml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, file, "domain").CombinedOutput(); err != nil {
		t.Errorf("not valid to libvirt: %v\n%s", err, out)
	}
}

func inputs(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.in.xml")
	if err != nil || len(files) < 6 {
		t.Fatalf("inputs: %v, %v", files, err)
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".in.xml")
	}
	return files
}

func TestTransform(t *testing.T) {
	t.Parallel()
	for _, name := range inputs(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := read(t, name+".in.xml")
			before := marshal(t, in)
			out, err := Transform(in, options)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name+".ft.xml", out)
			if after := marshal(t, in); after != before {
				t.Error("the argument was changed")
			}

			again, err := Transform(out, options)
			if err != nil {
				t.Fatal(err)
			}
			if marshal(t, again) != marshal(t, out) {
				t.Errorf("twice is not once:\n%s", marshal(t, again))
			}
			other, err := Transform(out, Options{PluginFile: "/x.so", PluginSocket: "/y.sock", ICountShift: 7})
			if err != nil {
				t.Fatal(err)
			}
			back, err := Transform(other, options)
			if err != nil {
				t.Fatal(err)
			}
			if marshal(t, back) != marshal(t, out) {
				t.Error("other options leave traces")
			}

			plain, err := Plain(out)
			if err != nil {
				t.Fatal(err)
			}
			if got := marshal(t, plain); got != before {
				t.Errorf("Plain does not give the operator's domain back:\n%s", got)
			}
		})
	}
}

func TestTransformAlreadyTransformed(t *testing.T) {
	t.Parallel()
	in := read(t, "q35-plain.ft.xml")
	out, err := Transform(in, options)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "q35-plain.ft.xml", out)
}

// An operator may edit a transformed domain: the edit must survive both ways.
func TestEditsSurvive(t *testing.T) {
	t.Parallel()
	ft := read(t, "q35-two-of-each.ft.xml")
	ft.Description = "edited"
	ft.Devices.Disks = append(ft.Devices.Disks, libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw", EventIDX: "on"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: "/new.img"}},
		Target: &libvirtxml.DomainDiskTarget{Dev: "vdc", Bus: "virtio"},
	})
	ft.Devices.Interfaces = ft.Devices.Interfaces[1:]
	out, err := Transform(ft, options)
	if err != nil {
		t.Fatal(err)
	}
	text := marshal(t, out)
	for _, want := range []string{"ftvirt-rr-2", "libvirt-3-storage", "libvirt-2-format", "libvirt-1-storage", "edited"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is missing in\n%s", want, text)
		}
	}
	if strings.Contains(text, netFilter+"1") {
		t.Error("a filter for the removed interface is left")
	}
	plain, err := Plain(out)
	if err != nil {
		t.Fatal(err)
	}
	if got := plain.Devices.Disks[2].Driver.EventIDX; got != "on" {
		t.Errorf("the new disk's event_idx is %q", got)
	}
	if got := plain.Devices.Interfaces[0].Driver.Name; got != "vhost" {
		t.Errorf("the remaining interface's driver is %q", got)
	}
	if plain.Description != "edited" || len(plain.Devices.Disks) != 3 {
		t.Error("the edit was lost")
	}
}

// libvirt shows metadata to whoever may look, passwords only to those who may
// change: the note must not have them, and they must not get lost either.
func TestPasswordIsNotNoted(t *testing.T) {
	t.Parallel()
	in := read(t, "q35-two-of-each.in.xml")
	in.Devices.Graphics[0].VNC.Passwd = "open sesame"
	out, err := Transform(in, options)
	if err != nil {
		t.Fatal(err)
	}
	noted, err := readOriginal(out)
	if err != nil {
		t.Fatal(err)
	}
	if text := marshal(t, noted); strings.Contains(text, "sesame") {
		t.Errorf("the password is in\n%s", text)
	}
	plain, err := Plain(out)
	if err != nil {
		t.Fatal(err)
	}
	if got := plain.Devices.Graphics[0].VNC.Passwd; got != "open sesame" {
		t.Errorf("the password is now %q", got)
	}
}

// Without the note, our settings go and libvirt's defaults take their place.
func TestPlainWithoutNote(t *testing.T) {
	t.Parallel()
	ft := read(t, "q35-two-of-each.ft.xml")
	if err := setMetadata(ft, originalNamespace, ""); err != nil {
		t.Fatal(err)
	}
	plain, err := Plain(ft)
	if err != nil {
		t.Fatal(err)
	}
	text := marshal(t, plain)
	for _, gone := range []string{"ftvirt", "icount", "hpet", "track=", "event_idx", "ioeventfd", "memballoon"} {
		if strings.Contains(text, gone) {
			t.Errorf("%s is left in\n%s", gone, text)
		}
	}
	if !strings.Contains(text, `tickpolicy="catchup"`) {
		t.Error("the rest of the timer was lost")
	}
}

func TestDamagedNote(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"base64": "!", "gzip": "aGVsbG8=", "empty": "",
	} {
		ft := read(t, "q35-plain.ft.xml")
		if err := setMetadata(ft, originalNamespace, `<o:original xmlns:o="urn:ftvirt:original:1">`+body+`</o:original>`); err != nil {
			t.Fatal(err)
		}
		if _, err := Plain(ft); !errors.Is(err, ErrOriginal) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestTransformRefuses(t *testing.T) {
	t.Parallel()
	in := read(t, "q35-plain.in.xml")
	in.Type = "kvm"
	_, err := Transform(in, options)
	var e *NotReadyError
	if !errors.As(err, &e) || !errors.Is(err, ErrNotReady) || len(e.Problems) != 1 || !strings.Contains(err.Error(), "<domain type='qemu'>") {
		t.Errorf("got %v", err)
	}
	for name, o := range map[string]Options{
		"comma":    {PluginFile: "/a,b.so", PluginSocket: "/s"},
		"relative": {PluginFile: "/a.so", PluginSocket: "s"},
		"shift":    {PluginFile: "/a.so", PluginSocket: "/s", ICountShift: 11},
	} {
		if _, err := Transform(read(t, "q35-plain.in.xml"), o); !errors.Is(err, ErrOptions) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func backupOptions() BackupOptions {
	return BackupOptions{
		Options: options,
		Epoch:   7,
		Primary: "hosta",
		Replicas: map[string]Replica{
			"vda": {File: "/var/lib/ftvirt/replicas/live/vda.img"},
			"vdb": {File: "/var/lib/ftvirt/replicas/live/vdb.qcow2", Backing: true},
		},
	}
}

func TestBackupXML(t *testing.T) {
	t.Parallel()
	live := read(t, "live.xml")
	before := marshal(t, live)
	out, err := BackupXML(live, backupOptions())
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "live.backup.xml", out)
	if marshal(t, live) != before {
		t.Error("the argument was changed")
	}
	a, ok, err := ReadAnnotation(out)
	if err != nil || !ok || a != (Annotation{Mode: ModeProtected, Peer: "hosta", Role: plugin.RoleBackup, Epoch: 7}) {
		t.Errorf("annotation: %+v, %v, %v", a, ok, err)
	}
	if live.UUID != out.UUID || live.Name != out.Name || live.OS.Type.Machine != out.OS.Type.Machine {
		t.Error("the copy is another domain")
	}
	text := marshal(t, out)
	for _, gone := range []string{"vnet", "/dev/pts", ".img\" index", "qcow2\" index", "<seclabel", "alias name", "portid", "5901", "<domain type=\"qemu\" id"} {
		if strings.Contains(text, gone) {
			t.Errorf("%s is left in the copy", gone)
		}
	}
	// After a failover the copy is the one that is protected again.
	id := 3
	out.ID = &id
	next := backupOptions()
	next.Epoch, next.Primary = 8, "hostb"
	third, err := BackupXML(out, next)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.NewReplacer(`epoch="8"`, `epoch="7"`, `peer="hostb"`, `peer="hosta"`).Replace(marshal(t, third))
	out.ID = nil
	if got != marshal(t, out) {
		t.Errorf("a copy of a copy differs:\n%s", got)
	}
}

func TestBackupXMLReplaces(t *testing.T) {
	t.Parallel()
	o := backupOptions()
	o.Replicas["vdb"] = Replica{File: "/r/vdb.img", Format: "raw"}
	o.ICountShift = 9
	out, err := BackupXML(read(t, "live.xml"), o)
	if err != nil {
		t.Fatal(err)
	}
	text := marshal(t, out)
	if strings.Contains(text, "base.img") || !strings.Contains(text, "/r/vdb.img") {
		t.Errorf("the chain of a replica that stands alone is left:\n%s", text)
	}
	if !strings.Contains(text, "shift=3,") {
		t.Error("the backup counts otherwise than the primary")
	}
	nodes := DiskNodes(out)
	if len(nodes) != 2 || nodes[1].Node != "libvirt-1-storage" || nodes[0].Node != "libvirt-2-storage" {
		t.Errorf("nodes: %+v", nodes)
	}
}

func TestBackupXMLRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		change func(*libvirtxml.Domain, *BackupOptions)
		want   error
	}{
		"no epoch":       {func(_ *libvirtxml.Domain, o *BackupOptions) { o.Epoch = 0 }, ErrOptions},
		"no primary":     {func(_ *libvirtxml.Domain, o *BackupOptions) { o.Primary = "" }, ErrOptions},
		"relative disk":  {func(_ *libvirtxml.Domain, o *BackupOptions) { o.Replicas["vda"] = Replica{File: "a"} }, ErrOptions},
		"unknown disk":   {func(_ *libvirtxml.Domain, o *BackupOptions) { o.Replicas["vdz"] = Replica{File: "/a"} }, ErrOptions},
		"not recording":  {func(d *libvirtxml.Domain, _ *BackupOptions) { d.QEMUCommandline = nil }, ErrNotTransformed},
		"device plugged": {func(d *libvirtxml.Domain, _ *BackupOptions) { d.Devices.RNGs = make([]libvirtxml.DomainRNG, 1) }, ErrNotReady},
	} {
		live, o := read(t, "live.xml"), backupOptions()
		tc.change(live, &o)
		if _, err := BackupXML(live, o); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// What was attached to or detached from a running domain is not recorded, and
// what a protected domain may not have is not taken out of it.
func TestHotplug(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		change func(*libvirtxml.DomainDeviceList)
		code   string
	}{
		"as started": {func(*libvirtxml.DomainDeviceList) {}, ""},
		"card attached": {func(d *libvirtxml.DomainDeviceList) {
			nic := d.Interfaces[0]
			nic.Alias = &libvirtxml.DomainAlias{Name: "net1"}
			d.Interfaces = append(d.Interfaces, nic)
		}, "hotplug"},
		"card detached": {func(d *libvirtxml.DomainDeviceList) { d.Interfaces = nil }, "hotplug"},
		"card exchanged": {func(d *libvirtxml.DomainDeviceList) {
			d.Interfaces[0].Alias = &libvirtxml.DomainAlias{Name: "net1"}
		}, "hotplug"},
		"disk attached": {func(d *libvirtxml.DomainDeviceList) {
			disk := d.Disks[0]
			disk.Target = &libvirtxml.DomainDiskTarget{Dev: "vdz", Bus: "virtio"}
			d.Disks = append(d.Disks, disk)
		}, "hotplug"},
		"disk detached": {func(d *libvirtxml.DomainDeviceList) { d.Disks = d.Disks[1:] }, "hotplug"},
		"rng attached":  {func(d *libvirtxml.DomainDeviceList) { d.RNGs = make([]libvirtxml.DomainRNG, 1) }, "rng"},
		"drive attached": {func(d *libvirtxml.DomainDeviceList) {
			d.Disks = append(d.Disks, libvirtxml.DomainDisk{Device: "cdrom"})
		}, "cdrom"},
	} {
		live, o := read(t, "live.xml"), backupOptions()
		tc.change(live.Devices)
		o.Replicas = nil // each that is given must be used
		problems := Check(live, CheckOptions{Running: true, Peers: []string{"hosta", "hostb"}})
		_, err := BackupXML(live, o)
		switch {
		case tc.code == "" && len(problems) == 0 && err == nil:
		case tc.code == "" || len(problems) == 0 || problems[0].Code != tc.code || !errors.Is(err, ErrNotReady):
			t.Errorf("%s: %v, %v", name, problems, err)
		}
	}
}

func TestFilters(t *testing.T) {
	t.Parallel()
	file := func(name string) []byte {
		text, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	// Its hardware fits, but it was not started to record.
	fits, err := Parse(file("q35-plain.ft.xml"))
	if err != nil {
		t.Fatal(err)
	}
	args := fits.QEMUCommandline.Args
	i := slices.IndexFunc(args, func(a libvirtxml.DomainQEMUCommandlineArg) bool { return a.Value == "-icount" })
	fits.QEMUCommandline.Args = slices.Delete(args, i, i+2)
	uncounted, err := fits.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []func([]byte, Options) ([]byte, error){RestoreFilter, MigrateFilter} {
		if out, err := f(file("i440fx.in.xml"), options); out != nil || err != nil {
			t.Errorf("without annotation: %s, %v", out, err)
		}
		if out, err := f(file("q35-plain.ft.xml"), options); out != nil || err != nil {
			t.Errorf("ready already: %s, %v", out, err)
		}
		if _, err := f(file("q35-plain.in.xml"), options); !errors.Is(err, ErrGuestABI) {
			t.Errorf("other hardware: %v", err)
		}
		if out, err := f([]byte(uncounted), options); out != nil || !errors.Is(err, ErrGuestABI) {
			t.Errorf("saved without record: %s, %v", out, err)
		}
		other := options
		other.ICountShift++
		if out, err := f(file("q35-plain.ft.xml"), other); out != nil || err != nil {
			t.Errorf("saved with another instruction length: %s, %v", out, err)
		}
		if _, err := f(file("live.backup.xml"), options); !errors.Is(err, ErrNotReady) {
			t.Errorf("a backup: %v", err)
		}
		if _, err := f([]byte("<domain"), options); err == nil {
			t.Error("broken XML was taken")
		}
		moved := options
		moved.PluginSocket = "/elsewhere.sock"
		out, err := f(file("q35-plain.ft.xml"), moved)
		if err != nil || !bytes.Contains(out, []byte("/elsewhere.sock")) {
			t.Errorf("other paths: %v\n%s", err, out)
		}
	}
}
