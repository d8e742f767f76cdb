// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"encoding/xml"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// buildDir is the cache that all tests of the repository share.
const buildDir = "../../../build/guest"

func TestBuild(t *testing.T) {
	first, err := guest.Build(t.Context(), buildDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{first.Kernel, first.Initrd, first.DiskTemplate} {
		if info, err := os.Stat(path); err != nil || info.Size() == 0 || info.Mode().Perm() != 0o644 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	second, err := guest.Build(t.Context(), buildDir)
	if err != nil || second != first {
		t.Errorf("second build is %v, %v; want the cached %v", second, err, first)
	}
}

func TestNewDisk(t *testing.T) {
	artifacts, err := guest.Build(t.Context(), buildDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"raw", "qcow2"} {
		path := filepath.Join(t.TempDir(), "disk."+format)
		if err := artifacts.NewDisk(t.Context(), path, format); err != nil {
			t.Fatal(err)
		}
		// A disk that no guest has written to has no lines' file; debugfs says
		// so on its error output and prints nothing.
		if n, err := guest.DiskLines(t.Context(), path); n != 0 || err != nil {
			t.Errorf("%s: %d lines, %v; want none", format, n, err)
		}
		if err := artifacts.NewDisk(t.Context(), path, format); !errors.Is(err, os.ErrExist) {
			t.Errorf("%s: over an existing disk: %v, want %v", format, err, os.ErrExist)
		}
	}
	if err := artifacts.NewDisk(t.Context(), filepath.Join(t.TempDir(), "d"), "vmdk"); err == nil {
		t.Error("format vmdk was accepted")
	}
}

func record(number int) string {
	body := fmt.Sprintf("L %010d %010d", number, 3000+50*number)
	return fmt.Sprintf("%s %08x\n", body, crc32.ChecksumIEEE([]byte(body)))
}

func records(numbers ...int) string {
	var b strings.Builder
	for _, n := range numbers {
		b.WriteString(record(n))
	}
	return b.String()
}

func TestVerifyLines(t *testing.T) {
	// A record as the guest itself wrote it pins the format.
	if n, err := guest.VerifyLines(strings.NewReader("L 0000000001 0000003181 7196547b\n")); n != 1 || err != nil {
		t.Errorf("a record of the guest: %d, %v", n, err)
	}
	for _, test := range []struct {
		name, input string
		n           int
		reason      string
	}{
		{"empty", "", 0, ""},
		{"consecutive", records(1, 2, 3), 3, ""},
		{"lost", records(1, 2, 4), 2, "number 4 instead of 3"},
		{"repeated", records(1, 2, 2, 3), 2, "number 2 instead of 3"},
		{"first lost", records(2, 3), 0, "number 2 instead of 1"},
		{"altered", records(1) + strings.Replace(record(2), " 000000310", " 000000311", 1), 1, "checksum is"},
		{"cut", records(1, 2)[:60], 1, "cut short"},
		{"not a record", records(1) + "kernel: hello\n", 1, "not a record"},
		{"zeros", records(1) + "\x00\x00\x00\x00\n", 1, "not a record"},
		{"checksum too short", records(1) + "L 0000000002 0000003100 12\n", 1, "malformed checksum"},
	} {
		t.Run(test.name, func(t *testing.T) {
			n, err := guest.VerifyLines(strings.NewReader(test.input))
			checkVerdict(t, n, test.n, err, test.reason)
		})
	}
}

func TestVerifyConsole(t *testing.T) {
	for _, test := range []struct {
		name, input string
		first, last int
		reason      string
	}{
		{"nothing", "SeaBIOS\r\n", 0, 0, ""},
		{"other lines between", "ftguest ready\r\n" + record(5) + "ok\n" + strings.ReplaceAll(record(6), "\n", "\r\n"), 5, 6, ""},
		{"cut at the end", records(1, 2) + record(3)[:9], 1, 2, ""},
		{"lost", records(7, 9), 7, 7, "number 9 instead of 8"},
		{"repeated", records(7, 7), 7, 7, "number 7 instead of 8"},
		{"altered", records(7) + "L 0000000008 0000003400 00000000\n", 7, 7, "checksum is"},
	} {
		t.Run(test.name, func(t *testing.T) {
			first, last, err := guest.VerifyConsole(strings.NewReader(test.input))
			if first != test.first {
				t.Errorf("first is %d, want %d", first, test.first)
			}
			checkVerdict(t, last, test.last, err, test.reason)
		})
	}
}

func checkVerdict(t *testing.T, got, want int, err error, reason string) {
	t.Helper()
	if got != want {
		t.Errorf("got %d, want %d", got, want)
	}
	if reason == "" {
		if err != nil {
			t.Errorf("unexpected error: %v", err)
		}
		return
	}
	var lineError *guest.LineError
	if !errors.As(err, &lineError) || !strings.Contains(lineError.Reason, reason) {
		t.Errorf("error is %v, want a LineError with %q", err, reason)
	}
}

func TestDomainXML(t *testing.T) {
	type parsed struct {
		Type string `xml:"type,attr"`
		Name string `xml:"name"`
		UUID string `xml:"uuid"`
		OS   struct {
			Cmdline string `xml:"cmdline"`
		} `xml:"os"`
		Memory int `xml:"memory"`
		Disks  []struct {
			Driver struct {
				Type string `xml:"type,attr"`
			} `xml:"driver"`
			Source struct {
				File string `xml:"file,attr"`
			} `xml:"source"`
		} `xml:"devices>disk"`
		Interfaces []struct {
			Source struct {
				Bridge string `xml:"bridge,attr"`
			} `xml:"source"`
		} `xml:"devices>interface"`
	}
	text, err := guest.DomainXML(guest.Domain{
		Name: "a&b", Kernel: "/k", Initrd: "/i", Disk: "/srv/it's.qcow2", DiskFormat: "qcow2",
		Bridge: "br-service", Address: netip.MustParsePrefix("10.77.0.10/24"), LinesRate: 20, Cmdline: "nokaslr",
	})
	if err != nil {
		t.Fatal(err)
	}
	var got parsed
	if err := xml.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if got.Type != "qemu" || got.Name != "a&b" || got.UUID != "" || got.Memory != 256 {
		t.Errorf("got %+v", got)
	}
	words := strings.Fields(got.OS.Cmdline)
	for _, want := range []string{"console=ttyS0", "ip=10.77.0.10/24", "ftguest.lines=20", "nokaslr"} {
		if !slices.Contains(words, want) {
			t.Errorf("kernel command line %q lacks %s", got.OS.Cmdline, want)
		}
	}
	if len(got.Disks) != 1 || got.Disks[0].Source.File != "/srv/it's.qcow2" || got.Disks[0].Driver.Type != "qcow2" {
		t.Errorf("disks: %+v", got.Disks)
	}
	if len(got.Interfaces) != 1 || got.Interfaces[0].Source.Bridge != "br-service" {
		t.Errorf("interfaces: %+v", got.Interfaces)
	}
	if _, err := guest.DomainXML(guest.Domain{Name: "x"}); err == nil {
		t.Error("a domain without a kernel was described")
	}
}

func TestDebianAdapt(t *testing.T) {
	d := guest.Domain{Name: "g", Kernel: "/k", Initrd: "/i", Address: netip.MustParsePrefix("10.77.0.10/24")}
	guest.Debian{}.Adapt(&d)
	text, err := guest.DomainXML(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"<cmdline>console=ttyS0 quiet root=/dev/vda rw net.ifnames=0 ip=10.77.0.10:::255.255.255.0::eth0:off</cmdline>",
		fmt.Sprintf("<memory unit='MiB'>%d</memory>", guest.DebianMemoryMiB),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
}
