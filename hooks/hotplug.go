// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// hotplugged tells the disks and network cards of a running transformed domain
// that QEMU does not record, or recorded and has no longer: they were attached
// or detached since the start. The packets of such a card would not even wait
// for the backup.
func hotplugged(dom *libvirtxml.Domain) []string {
	if dom.ID == nil || !transformed(dom) {
		return nil
	}
	var paths []string
	filters, nics := filteredNetdevs(dom), devices(dom).Interfaces
	derived := netAliases(nics)
	for i := range nics {
		alias := derived[i]
		if nics[i].Alias != nil {
			alias = nics[i].Alias.Name
		}
		if !slices.Contains(filters, "host"+alias) {
			paths = append(paths, nicPath(&nics[i], i))
		}
	}
	if len(filters) > len(nics)-len(paths) {
		paths = append(paths, "interface that was detached")
	}
	replayed, found := replayedDisks(dom), 0
	for _, n := range DiskNodes(dom) {
		if slices.Contains(replayed, n.Alias) {
			found++
			continue
		}
		paths = append(paths, "disk "+n.Target)
	}
	if len(replayed) > found {
		paths = append(paths, "disk that was detached")
	}
	return paths
}

// filteredNetdevs lists the network backends whose packets are recorded.
func filteredNetdevs(dom *libvirtxml.Domain) []string {
	var list []string
	for _, a := range dom.QEMUCommandline.Args {
		if ours("-object", a.Value) {
			_, netdev, _ := strings.Cut(a.Value, ",netdev=")
			list = append(list, netdev)
		}
	}
	return list
}

// replayedDisks lists the aliases of the disks that sit on our nodes.
func replayedDisks(dom *libvirtxml.Domain) []string {
	var list []string
	if dom.QEMUOverride == nil {
		return nil
	}
	for _, d := range dom.QEMUOverride.Devices {
		for _, p := range d.Frontend.Properties {
			if p.Name == driveKey && strings.HasPrefix(p.Value, replayNode) {
				list = append(list, d.Alias)
			}
		}
	}
	return list
}
