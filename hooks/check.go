// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"fmt"
	"slices"

	"libvirt.org/go/libvirtxml"
)

// Problem is one thing that keeps a domain from being protected.
type Problem struct {
	// Code is stable, for programs: the code of the rule.
	Code string `json:"code" yaml:"code"`
	// Path names the place, such as "disk sda". It is empty for the domain.
	Path   string `json:"path,omitempty" yaml:"path,omitempty"`
	Reason string `json:"reason" yaml:"reason"`
	Remedy string `json:"remedy" yaml:"remedy"`
}

func (p Problem) String() string {
	if p.Path == "" {
		return p.Reason + " (" + p.Remedy + ")"
	}
	return p.Path + ": " + p.Reason + " (" + p.Remedy + ")"
}

// CheckOptions are the facts that the XML does not tell. What is left out is
// not checked.
type CheckOptions struct {
	// Host is this host's name; a domain cannot have its backup here.
	Host string
	// Peer is the backup's host, if the annotation is yet to be written.
	Peer string
	// Peers are the known hosts; nil if they are not known here.
	Peers []string
	// Snapshots is how many snapshots libvirt has of the domain.
	Snapshots int
	// Running says that dom describes a running domain, whose hardware can no
	// longer be changed.
	Running bool
}

// Check gives all that keeps dom from being protected, in the order of Rules.
// An empty answer means that Transform takes it.
func Check(dom *libvirtxml.Domain, o CheckOptions) []Problem {
	problems := append(checkPair(dom, o), checkDomain(dom)...)
	if o.Running && transformed(dom) {
		problems = append(problems, attached(dom)...)
	}
	return problems
}

// Changes gives what Transform changes for the guest, or takes from it, that an
// operator may want to know before. A domain that has been transformed gives
// nothing.
func Changes(dom *libvirtxml.Domain) []Problem {
	return matching(dom, func(r Rule) bool { return r.Support != Refused })
}

// checkDomain applies the rules, which need the XML alone.
func checkDomain(dom *libvirtxml.Domain) []Problem {
	return matching(dom, func(r Rule) bool { return r.Support == Refused })
}

// attached tells of devices that a running domain got since it was started:
// Transform would take them out, which the guest would notice.
func attached(dom *libvirtxml.Domain) []Problem {
	problems := matching(dom, changesGuest)
	for i := range problems {
		problems[i].Remedy = "it was added since the start: detach it, or power the domain off and start it again"
	}
	return problems
}

// changesGuest tells the rows by which Transform changes the guest's hardware.
func changesGuest(r Rule) bool { return r.Support == Removed || r.Code == "video-model" }

// matching gives what the chosen rows say of a domain.
func matching(dom *libvirtxml.Domain, chosen func(Rule) bool) []Problem {
	if dom.Devices == nil {
		bare := *dom // the caller's domain is not to change
		bare.Devices = new(libvirtxml.DomainDeviceList)
		dom = &bare
	}
	var problems []Problem
	for _, r := range rules {
		if r.match == nil || !chosen(r) {
			continue
		}
		for _, path := range r.match(dom) {
			problems = append(problems, Problem{Code: r.Code, Path: path, Reason: r.Reason, Remedy: r.Remedy})
		}
	}
	return problems
}

func checkPair(dom *libvirtxml.Domain, o CheckOptions) []Problem {
	var problems []Problem
	add := func(code, reason, remedy string) {
		problems = append(problems, Problem{Code: code, Reason: reason, Remedy: remedy})
	}
	a, _, err := ReadAnnotation(dom)
	if err != nil {
		add("annotation", err.Error(), fmt.Sprintf(`write <%[1]s:pair xmlns:%[1]s=%[2]q mode="protected" peer="HOST"/>`, prefix, Namespace))
	}
	peer := o.Peer
	if peer == "" {
		peer = a.Peer
	}
	switch {
	case peer == "" && err == nil:
		add("missing-peer", "no host is named to run the backup", `name one: peer="HOST" in the annotation, or ftvirt enable --peer HOST`)
	case peer != "" && peer == o.Host:
		add("peer-is-this-host", fmt.Sprintf("the backup would run on this host, %s, too", peer), "name another host as peer")
	case peer != "" && o.Peers != nil && !slices.Contains(o.Peers, peer):
		add("unknown-peer", fmt.Sprintf("the peer %q is not configured", peer), "add a [peers] table for it to ftvirt.toml, or name another host")
	}
	if o.Snapshots > 0 {
		add("snapshots", fmt.Sprintf("libvirt has %d snapshots of it; reverting would take only one side back", o.Snapshots),
			"delete them with virsh snapshot-delete")
	}
	return problems
}
