// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"
)

const (
	replayNode = "ftvirt-rr-"
	netFilter  = "ftvirt-nf-"
	userAlias  = "ua-"
)

// DiskNode says which block nodes a virtio disk's device has.
type DiskNode struct {
	// Target is the disk's target device, such as vda.
	Target string
	// Alias is the id of the device in QEMU.
	Alias string
	// Node is the node that libvirt makes for the device to use.
	Node string
	// Replay is the blkreplay node on top of it, which the device uses in a
	// transformed domain.
	Replay string
	// ReadOnly tells that the guest cannot write to it.
	ReadOnly bool
}

// DiskNodes derives the nodes of a domain's virtio disks, in the domain's order.
//
// libvirt (11.3, checked against it by a test) numbers block nodes when it
// starts a domain: it goes through the disks from the last to the first, empty
// drives included, gives the disk's image the next number, and after it each
// image of the backing chain that the XML spells out. Chains that it has to
// probe get theirs when all disks have been numbered, so they do not matter
// here. The device uses libvirt-N-format, except that a raw image has
// libvirt-N-storage only. In the XML of a running domain the number is the
// source's index.
func DiskNodes(dom *libvirtxml.Domain) []DiskNode {
	if dom.Devices == nil {
		return nil
	}
	disks := dom.Devices.Disks
	order := libvirtOrder(disks)
	number := make([]uint, len(disks))
	next := uint(1)
	for _, i := range slices.Backward(order) {
		number[i] = next
		next += 1 + chainLength(disks[i].BackingStore)
		if dom.ID != nil && disks[i].Source != nil && disks[i].Source.Index != 0 {
			number[i] = disks[i].Source.Index
		}
	}
	var nodes []DiskNode
	for i := range disks {
		d := &disks[i]
		if diskBus(d) != "virtio" || d.Source == nil {
			continue
		}
		layer := "format"
		if imageFormat(d) == "raw" {
			layer = "storage"
		}
		nodes = append(nodes, DiskNode{
			Target:   target(d),
			Alias:    diskAlias(d),
			Node:     fmt.Sprintf("libvirt-%d-%s", number[i], layer),
			Replay:   fmt.Sprintf("%s%d", replayNode, len(nodes)),
			ReadOnly: d.ReadOnly != nil,
		})
	}
	return nodes
}

// libvirtOrder gives the indexes of disks in the order in which libvirt keeps
// them: those of one bus together where possible, by their target's letters.
func libvirtOrder(disks []libvirtxml.DomainDisk) []int {
	var order []int
	for i := range disks {
		at := -1
		for pos, j := range slices.Backward(order) {
			switch {
			case diskBus(&disks[j]) != diskBus(&disks[i]):
			case diskIndex(&disks[j]) > diskIndex(&disks[i]):
				at = pos
			case at == -1:
				at = pos + 1
			}
		}
		if at == -1 {
			at = len(order)
		}
		order = slices.Insert(order, at, i)
	}
	return order
}

// chainLength counts the backing images that the XML names. An empty element
// only ends the chain.
func chainLength(b *libvirtxml.DomainDiskBackingStore) uint {
	n := uint(0)
	for ; b != nil && b.Format != nil; b = b.BackingStore {
		n++
	}
	return n
}

func target(d *libvirtxml.DomainDisk) string {
	if d.Target == nil {
		return ""
	}
	return d.Target.Dev
}

// diskBus is the bus, which libvirt takes from the target's name if the XML
// does not tell it.
func diskBus(d *libvirtxml.DomainDisk) string {
	if d.Target != nil && d.Target.Bus != "" {
		return d.Target.Bus
	}
	for _, p := range []struct{ prefix, bus string }{
		{"vd", "virtio"}, {"sd", "scsi"}, {"hd", "ide"}, {"fd", "fdc"}, {"xvd", "xen"}, {"ubd", "uml"},
	} {
		if strings.HasPrefix(target(d), p.prefix) {
			return p.bus
		}
	}
	return ""
}

// diskIndex turns the letters after the prefix into a number: a is 0, aa is 26.
func diskIndex(d *libvirtxml.DomainDisk) int {
	name := target(d)
	for _, p := range []string{"xvd", "ubd", "fd", "hd", "sd", "vd"} {
		if rest, ok := strings.CutPrefix(name, p); ok {
			n := 0
			for i := 0; i < len(rest) && rest[i] >= 'a' && rest[i] <= 'z' && n < 1<<20; i++ {
				n = n*26 + int(rest[i]-'a') + 1
			}
			return n - 1
		}
	}
	return -1
}

func imageFormat(d *libvirtxml.DomainDisk) string {
	if d.Driver == nil || d.Driver.Type == "" {
		return "raw" // libvirt's default
	}
	return d.Driver.Type
}

func isUserAlias(a *libvirtxml.DomainAlias) bool {
	return a != nil && strings.HasPrefix(a.Name, userAlias)
}

// diskAlias is the alias that libvirt gives a virtio disk.
func diskAlias(d *libvirtxml.DomainDisk) string {
	if isUserAlias(d.Alias) {
		return d.Alias.Name
	}
	return fmt.Sprintf("virtio-disk%d", diskIndex(d))
}

// netAliases are the aliases that libvirt gives the interfaces: netN, counting
// those that have no alias of the operator's own.
func netAliases(nics []libvirtxml.DomainInterface) []string {
	aliases := make([]string, len(nics))
	n := 0
	for i := range nics {
		if isUserAlias(nics[i].Alias) {
			aliases[i] = nics[i].Alias.Name
			continue
		}
		aliases[i] = fmt.Sprintf("net%d", n)
		n++
	}
	return aliases
}
