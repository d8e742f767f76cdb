// SPDX-License-Identifier: Apache-2.0

// Package doctor judges whether a host, and a pair of hosts, can do what ftvirt
// asks of them, and says of each thing that is wrong how to mend it. What needs
// the agent is measured by the agent; judging it is here, and pure.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
)

// Level tells how bad a finding is.
type Level string

// The levels.
const (
	// OK: it is as it should be.
	OK Level = "ok"
	// Warning: it works, but less well, or less safely, than it could.
	Warning Level = "warning"
	// Problem: protection does not work until it is mended.
	Problem Level = "problem"
)

// Finding is the result of one check.
type Finding struct {
	// Host is the one that it is about, or "HOST and HOST".
	Host  string `json:"host"`
	Check string `json:"check"`
	Level Level  `json:"level"`
	Text  string `json:"text"`
	// Remedy is set with all but OK.
	Remedy string `json:"remedy,omitempty"`
}

// Facts are what of a host must fit to its peer's.
type Facts struct {
	Host    string `json:"host"`
	QEMU    string `json:"qemu"`
	Libvirt string `json:"libvirt"`
	// Plugin is the SHA-256 of the plugin's file, empty without one.
	Plugin       string        `json:"plugin"`
	PluginFile   string        `json:"plugin_file"`
	PluginSocket string        `json:"plugin_socket"`
	ICountShift  int           `json:"icount_shift"`
	Processor    string        `json:"processor"`
	Heartbeat    time.Duration `json:"heartbeat_timeout"`
	// Arbiter is what the arbiter's storage calls itself, empty if it has no
	// name.
	Arbiter string `json:"arbiter"`
}

// Report is what one host tells of itself.
type Report struct {
	Findings []Finding `json:"findings"`
	Facts    Facts     `json:"facts"`
}

// list collects the findings of one host.
type list struct {
	host string
	all  []Finding
}

func (l *list) ok(check, text string) {
	l.all = append(l.all, Finding{Host: l.host, Check: check, Level: OK, Text: text})
}

func (l *list) add(check string, level Level, text, remedy string) {
	l.all = append(l.all, Finding{Host: l.host, Check: check, Level: level, Text: text, Remedy: remedy})
}

// NewFacts has what of the facts the configuration says.
func NewFacts(cfg config.Config) Facts {
	return Facts{
		Host: cfg.Host, PluginFile: cfg.Agent.PluginFile, PluginSocket: cfg.Agent.PluginSocket,
		ICountShift: cfg.Replay.ICountShift, Heartbeat: cfg.Heartbeat.Timeout,
	}
}

// Compare judges how the facts of two hosts fit together.
func Compare(ours, theirs Facts) []Finding {
	l := &list{host: ours.Host + " and " + theirs.Host}
	same := func(check, what, a, b string, level Level, remedy string) {
		switch {
		case a == "" || b == "":
			// That one is missing is a finding about that host.
		case a == b:
			l.ok(check, fmt.Sprintf("both have %s %s", what, a))
		default:
			l.add(check, level, fmt.Sprintf("%s differs: %s on %s, %s on %s", what, a, ours.Host, b, theirs.Host), remedy)
		}
	}
	same("qemu", "QEMU", ours.QEMU, theirs.QEMU, Problem, "install the same version on both; a clone is refused until then")
	same("libvirt", "libvirt", ours.Libvirt, theirs.Libvirt, Warning, "install the same version on both: it writes the same QEMU command line then")
	same("plugin", "ftvirt.so", short(ours.Plugin), short(theirs.Plugin), Problem, "install the same package ftvirt-qemu-plugin on both")
	same("plugin-file", "agent.plugin_file", ours.PluginFile, theirs.PluginFile, Problem, "use the same path on both; it is part of the domain's definition")
	same("plugin-socket", "agent.plugin_socket", ours.PluginSocket, theirs.PluginSocket, Problem,
		"use the same path on both; it is part of the domain's definition")
	same("icount", "replay.icount_shift", fmt.Sprint(ours.ICountShift), fmt.Sprint(theirs.ICountShift), Problem, "set the same value on both, and enable domains anew")
	same("heartbeat", "heartbeat.timeout", ours.Heartbeat.String(), theirs.Heartbeat.String(), Warning, "set the same value on both, so that neither gives up long before the other")
	same("processor", "the processor", ours.Processor, theirs.Processor, Warning,
		"the guest's processor is emulated and the same on both, but a backup on the slower host slows its primary down")
	same("arbiter", "the arbiter", ours.Arbiter, theirs.Arbiter, Problem,
		"the two hosts do not share the arbiter's storage: mount the same there, and see arbiter in ftvirt.toml")
	return l.all
}

func short(hash string) string { return hash[:min(len(hash), 12)] }

// Link is what was measured between a host and its peer.
type Link struct {
	From, To string
	// RTT is the shortest round trip of a request, and Offset by how much the
	// peer's clock is ahead, give or take half of that.
	RTT, Offset time.Duration
	// Timeout is heartbeat.timeout.
	Timeout time.Duration
	// There and Back tell whether a datagram came through, LargeThere and
	// LargeBack whether one of Largest bytes did, the most that the interface
	// takes; 0 if that is not known.
	There, Back           bool
	Largest               int
	LargeThere, LargeBack bool
	// BulkThere and BulkBack tell whether the channel carried a message of many
	// packets.
	BulkThere, BulkBack bool
}

// Limits of what is well. Each reply of a protected guest waits for one round
// trip at least.
const (
	slowLink   = 5 * time.Millisecond
	wrongClock = time.Second
)

// Judge says what follows from what was measured.
func (m Link) Judge() []Finding {
	l := &list{host: m.From + " and " + m.To}
	text := fmt.Sprintf("a request takes %s", rounded(m.RTT))
	switch {
	case m.RTT > m.Timeout/4:
		l.add("round-trip", Problem, fmt.Sprintf("%s; heartbeat.timeout is %s", text, m.Timeout), "use a faster network for channel.listen, or a longer heartbeat.timeout")
	case m.RTT > slowLink:
		l.add("round-trip", Warning, text+", and each reply of a protected guest waits for it", "use a faster network for channel.listen")
	default:
		l.ok("round-trip", text)
	}
	switch off := m.Offset.Abs(); {
	case off > wrongClock+m.RTT:
		l.add("clock", Warning, fmt.Sprintf("the clocks differ by %s", rounded(off)),
			"synchronise them, as with chrony: times of events of the two hosts cannot be compared")
	default:
		l.ok("clock", fmt.Sprintf("the clocks differ by %s, give or take %s", rounded(off), rounded(m.RTT/2)))
	}
	switch {
	case m.There && m.Back:
		l.ok("heartbeat-path", "datagrams pass both ways")
	case !m.There:
		l.add("heartbeat-path", Problem, fmt.Sprintf("datagrams from %s do not reach %s", m.From, m.To),
			fmt.Sprintf("let UDP to heartbeat.listen of %s through the firewalls; see peers.%s.heartbeat on %s", m.To, m.To, m.From))
	default:
		l.add("heartbeat-path", Problem, fmt.Sprintf("datagrams from %s do not reach %s", m.To, m.From),
			fmt.Sprintf("let UDP to heartbeat.listen of %s through the firewalls; see peers.%s.heartbeat on %s", m.From, m.From, m.To))
	}
	m.judgeSize(l)
	return l.all
}

// judgeSize says whether large packets pass where small ones do.
func (m Link) judgeSize(l *list) {
	var lost []string
	note := func(passes bool, what, from, to string) {
		if !passes {
			lost = append(lost, fmt.Sprintf("%s from %s does not reach %s", what, from, to))
		}
	}
	note(m.BulkThere, "a long message over the channel", m.From, m.To)
	note(m.BulkBack, "a long message over the channel", m.To, m.From)
	if m.Largest > 0 {
		what := fmt.Sprintf("a packet of %d bytes that may not be cut", m.Largest)
		note(m.LargeThere || !m.There, what, m.From, m.To)
		note(m.LargeBack || !m.Back, what, m.To, m.From)
	}
	if len(lost) == 0 {
		l.ok("path-mtu", "large packets pass both ways")
		return
	}
	l.add("path-mtu", Problem, strings.Join(lost, ", ")+", though small ones do",
		"the MTU of the path is likely smaller than that of the hosts' interfaces: set both interfaces of channel.listen and all switches "+
			"between them to the same MTU, and let ICMP 'fragmentation needed' through the firewalls")
}

func rounded(d time.Duration) time.Duration {
	switch {
	case d >= 10*time.Millisecond:
		return d.Round(time.Millisecond)
	case d >= 10*time.Microsecond:
		return d.Round(10 * time.Microsecond)
	}
	return d
}

// Storage judges the arbiter: how long an answer took, or why none came.
func Storage(host, where string, took time.Duration, err error, timeout time.Duration) Finding {
	l := &list{host: host}
	switch {
	case err != nil:
		l.add("arbiter-storage", Problem, fmt.Sprintf("%s: %v", where, err), "see [arbiter] in ftvirt.toml; storage that is new is made the arbiter's once, by 'ftvirt arbiter init'")
	case took > timeout/2:
		l.add("arbiter-storage", Warning, fmt.Sprintf("%s answers in %s; a failover waits for it", where, rounded(took)), "use faster storage for the arbiter")
	default:
		l.ok("arbiter-storage", fmt.Sprintf("%s answers in %s", where, rounded(took)))
	}
	return l.all[0]
}

// DiskDir is the one directory that hosts may share.
const DiskDir = "clone.disk_dir"

// Directories judges which of this host's directories, by the keys of ftvirt.toml, the
// peer has as well.
func Directories(host, peer string, ours map[string]string, shared []string) []Finding {
	l := &list{host: host + " and " + peer}
	for _, key := range slices.Sorted(maps.Keys(ours)) {
		switch {
		case !slices.Contains(shared, key):
			continue
		case key == DiskDir:
			l.add("directories", Warning, fmt.Sprintf("%s, %s, is one directory on both: each host touches its own files only, but both copies of a domain are lost with it", key, ours[key]),
				"give each host storage of its own, unless that storage cannot fail as a whole")
		default:
			l.add("directories", Problem, fmt.Sprintf("%s, %s, is one directory on both: each agent would take the other's files for its own", key, ours[key]),
				"give each host a directory of its own, on a disk of its own")
		}
	}
	if len(l.all) == 0 {
		l.ok("directories", "the hosts share no directory")
	}
	return l.all
}

// Strangers judges the files in a host's clone.disk_dir that look like replicas and
// that it did not make: those of other hosts, and those that nobody is known to use.
func Strangers(host, dir string, hosts, unproven []string, err error) []Finding {
	l := &list{host: host}
	if err != nil {
		l.add("replicas", Warning, err.Error(), "see "+DiskDir+" in ftvirt.toml, and 'systemctl status libvirtd'")
	}
	if len(hosts) > 0 {
		l.add("replicas", Warning, fmt.Sprintf("%s has replicas of %s too: it is shared, and both copies of a domain are lost with it", dir, strings.Join(hosts, ", ")),
			"give each host storage of its own, unless that storage cannot fail as a whole")
	}
	if len(unproven) > 0 {
		l.add("replicas", Warning, fmt.Sprintf("this host cannot prove that it made %s, and leaves them alone: they may be of an earlier version", strings.Join(unproven, ", ")),
			"delete them by hand, once you know that no domain of any host uses them")
	}
	if len(l.all) == 0 {
		l.ok("replicas", "all replicas in "+dir+" are this host's")
	}
	return l.all
}

// Unreachable is the finding about a peer that could not be asked.
func Unreachable(host, peer string, err error) Finding {
	remedy := fmt.Sprintf("see that 'ftvirt agent' runs on %s, that TCP to peers.%s.channel passes the firewalls, and that the two hosts name each other in [peers]", peer, peer)
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		remedy += "; if a connection can be made, as by 'nc', large packets are likely lost: set the same MTU on both hosts and all switches between them"
	}
	return Finding{Host: host + " and " + peer, Check: "channel", Level: Problem, Text: strings.ReplaceAll(err.Error(), "\n", " "), Remedy: remedy}
}

// Reachable is its opposite.
func Reachable(host, peer, address string) Finding {
	return Finding{Host: host + " and " + peer, Check: "channel", Level: OK, Text: fmt.Sprintf("the agent of %s answers at %s", peer, address)}
}
