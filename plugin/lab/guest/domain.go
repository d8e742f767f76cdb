// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/xml"
	"fmt"
	"net/netip"
	"strings"
	"text/template"
)

// Domain says what DomainXML describes. Paths are as the host that runs the
// domain sees them.
type Domain struct {
	Name   string
	UUID   string // left out of the XML when empty: libvirt makes one
	Kernel string
	Initrd string

	MemoryMiB int // 0 means 256

	Disk       string // no disk when empty
	DiskFormat string // "raw" or "qcow2"; "" means raw

	Bridge  string       // no network card when empty
	MAC     string       // libvirt makes one when empty
	Address netip.Prefix // the guest's address and network

	ConsoleLog string // file that virtlogd copies the console to; none when empty

	LinesRate int // lines per second that the guest writes from its start
	LoadRate  int // disk operations per second from its start

	Cmdline string // added to the kernel's command line
}

// domainTemplate is what an operator would write for a plain virtual machine:
// nothing in it knows of fault tolerance.
var domainTemplate = template.Must(template.New("domain").Funcs(template.FuncMap{"x": escapeXML}).Parse(
	`<domain type='qemu'>
  <name>{{x .Name}}</name>
{{- with .UUID}}
  <uuid>{{x .}}</uuid>
{{- end}}
  <memory unit='MiB'>{{.MemoryMiB}}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{{x .Kernel}}</kernel>
    <initrd>{{x .Initrd}}</initrd>
    <cmdline>{{x .Cmdline}}</cmdline>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
{{- with .Disk}}
    <disk type='file' device='disk'>
      <driver name='qemu' type='{{x $.DiskFormat}}'/>
      <source file='{{x .}}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
{{- end}}
    <controller type='usb' model='none'/>
{{- with .Bridge}}
    <interface type='bridge'>
{{- with $.MAC}}
      <mac address='{{x .}}'/>
{{- end}}
      <source bridge='{{x .}}'/>
      <model type='virtio'/>
    </interface>
{{- end}}
    <serial type='pty'>
{{- with .ConsoleLog}}
      <log file='{{x .}}' append='on'/>
{{- end}}
      <target port='0'/>
    </serial>
    <console type='pty'>
      <target type='serial' port='0'/>
    </console>
  </devices>
</domain>
`))

// DomainXML describes d to libvirt: TCG, q35, one vCPU, direct kernel boot, at
// most one virtio disk and one virtio network card, a serial console.
func DomainXML(d Domain) (string, error) {
	if d.Name == "" || d.Kernel == "" || d.Initrd == "" {
		return "", fmt.Errorf("guest domain %q: name, kernel and initrd are needed", d.Name)
	}
	if d.MemoryMiB == 0 {
		d.MemoryMiB = 256
	}
	if d.DiskFormat == "" {
		d.DiskFormat = "raw"
	}
	words := []string{"console=ttyS0", "quiet"}
	if d.Address.IsValid() {
		words = append(words, "ip="+d.Address.String())
	}
	if d.LinesRate > 0 {
		words = append(words, fmt.Sprintf("ftguest.lines=%d", d.LinesRate))
	}
	if d.LoadRate > 0 {
		words = append(words, fmt.Sprintf("ftguest.load=%d", d.LoadRate))
	}
	if d.Cmdline != "" {
		words = append(words, d.Cmdline)
	}
	d.Cmdline = strings.Join(words, " ")

	var b strings.Builder
	if err := domainTemplate.Execute(&b, d); err != nil {
		return "", fmt.Errorf("guest domain %q: %w", d.Name, err)
	}
	return b.String(), nil
}

func escapeXML(s string) (string, error) {
	var b strings.Builder
	err := xml.EscapeText(&b, []byte(s))
	return b.String(), err
}
