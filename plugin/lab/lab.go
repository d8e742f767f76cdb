// SPDX-License-Identifier: Apache-2.0

// Package lab makes hosts out of namespaces, for tests and for the demo: each
// has its own network, mounts, processes, control groups and host name, and
// runs its own libvirtd, virtlogd and ftvirt agent.
//
//	client eth0 ─┐
//	             ├─ "service" bridge ── hosta br-service ── guests' taps
//	             │                 └─── hostb br-service ── guests' taps
//	               "logging" bridge ─── hosta log0
//	                               └─── hostb log0
//
// All of it lives in namespaces that are held by one process 1 each, so that
// killing those processes removes the networks, mounts and processes of the
// lab. What is left are a state directory and control groups, which Down
// removes, or the next Up if the lab was killed.
//
// The lab needs root. It touches nothing of the machine's own network, mounts
// and libvirt.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/pki"
)

// Errors that callers tell apart.
var (
	// ErrNotRoot is returned when the caller is not root.
	ErrNotRoot = errors.New("the lab makes namespaces and needs root: run it as root, e.g. with sudo")
	// ErrUp is returned by Up for a lab that is up already.
	ErrUp = errors.New("lab already up")
	// ErrNotUp is returned by Open for a lab that is not up.
	ErrNotUp = errors.New("lab is not up")
	// ErrMissingTools is returned when programs that the lab runs are not installed.
	ErrMissingTools = errors.New("needed programs are not installed: run 'make deps'")
	// ErrUnknownHost is returned for a name that is none of the lab's.
	ErrUnknownHost = errors.New("no such host in the lab")
	// ErrHostDown is returned for work on a host that has crashed.
	ErrHostDown = errors.New("host is down")
	// ErrAgentEnded is returned when an agent ends while it should start.
	ErrAgentEnded = errors.New("the agent ended while it started")
	// ErrInvalidOptions is returned by Up for options that make no lab.
	ErrInvalidOptions = errors.New("invalid lab options")
)

// DefaultName is the name of the lab that the command line works on.
const DefaultName = "ftlab"

// stateRoot holds one directory for each lab. Paths to libvirt's sockets start
// with it and must stay short: a socket's path has at most 107 bytes.
const stateRoot = "/var/lib/ftvirt-lab"

// teardownTimeout bounds the removal of a lab, in Down and after a failed Up.
const teardownTimeout = 30 * time.Second

// Paths on every host of a lab.
const (
	ArbiterDir = "/srv/ftvirt-arbiter" // shared by all hosts
	BinDir     = "/srv/ftvirt"         // Options.Bin, read-only
	GuestDir   = "/srv/guest"          // Options.Guest, copied
	ImageDir   = "/srv/images"         // the host's own disks; see Options.SharedImages
	ConsoleDir = "/var/log/libvirt/consoles"

	ServiceBridge = "br-service" // guests' network cards attach here

	configFile = config.DefaultPath
	agentLog   = "/var/log/ftvirt/agent.log"
	agentPID   = "/run/ftvirt-lab-agent.pid"
)

// Addresses in the lab. Its networks are its own, so two labs may use the same
// ones at the same time.
var (
	ServiceNet = netip.MustParsePrefix("10.77.0.0/24")
	LoggingNet = netip.MustParsePrefix("10.78.0.0/24")
	ClientAddr = netip.MustParseAddr("10.77.0.100")
)

// GuestAddr returns the address, with its network, of the lab's n-th guest,
// counting from 0.
func GuestAddr(n int) netip.Prefix {
	return netip.PrefixFrom(hostAddr(ServiceNet, 10+n), ServiceNet.Bits())
}

// Options say what lab to make. The zero value is the two-host lab of the
// command line, without agents and guest.
type Options struct {
	// Name tells labs on one machine apart; "" means DefaultName.
	Name string
	// Hosts is the number of hosts, 2 or 3; 0 means 2. They are called hosta,
	// hostb, hostc.
	Hosts int
	// Bin is the directory with ftvirt, ftvirt-hook and ftvirt.so. Hosts see it
	// as BinDir. An agent runs on each host if Bin holds ftvirt.
	Bin string
	// NoAgent leaves the agents to StartAgent.
	NoAgent bool
	// SharedImages gives all hosts one ImageDir, as on NFS, and has them keep
	// their replicas there too.
	SharedImages bool
	// Guest is copied to GuestDir of each host unless empty.
	Guest guest.Artifacts
	// Configure changes a host's ftvirt.toml before it is written.
	Configure func(*config.Config)
	// Ephemeral ties the lab to the calling process: whatever ends the process,
	// even SIGKILL, ends the lab's.
	Ephemeral bool
}

// Lab is a running lab. Its methods may be called from several goroutines, but
// Down and Boot exclude each other and everything else.
type Lab struct {
	// Client is a machine on the service network without libvirt.
	Client *Node

	dir    string
	state  *state
	sw     *Node // holds both bridges
	hosts  []*Host
	tether *tether // of an ephemeral lab, else nil
	// configure is Options.Configure; a lab that was found has none.
	configure func(*config.Config)
}

var validName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,15}$`)

func (o *Options) validate() error {
	if o.Name == "" {
		o.Name = DefaultName
	}
	if o.Hosts == 0 {
		o.Hosts = 2
	}
	if !validName.MatchString(o.Name) {
		return fmt.Errorf("%w: name %q: want at most 16 lower-case letters, digits and '-'", ErrInvalidOptions, o.Name)
	}
	if o.Hosts < 2 || o.Hosts > 3 {
		return fmt.Errorf("%w: %d hosts: want 2 or 3", ErrInvalidOptions, o.Hosts)
	}
	for _, path := range []*string{&o.Bin, &o.Guest.Kernel, &o.Guest.Initrd, &o.Guest.DiskTemplate} {
		if *path == "" {
			continue
		}
		absolute, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		if _, err := os.Stat(absolute); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalidOptions, err)
		}
		*path = absolute
	}
	return nil
}

// toolPath is where the lab looks for programs, on the machine and in its
// hosts, instead of the caller's PATH: root's often lacks the daemons'
// directories, and what a host runs must not depend on who made the lab.
const toolPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// neededTools are what the lab runs on the machine; all are in packages that
// 'make deps' installs.
var neededTools = []string{
	"awk", "hostname", "ip", "libvirtd", "mount", "nsenter", "qemu-img", "qemu-system-x86_64", "setsid", "unshare", "virsh", "virtlogd",
}

func checkMachine() error {
	if os.Geteuid() != 0 {
		return ErrNotRoot
	}
	var missing []string
	for _, tool := range neededTools {
		if !slices.ContainsFunc(strings.Split(toolPath, ":"), func(dir string) bool {
			_, err := exec.LookPath(filepath.Join(dir, tool))
			return err == nil
		}) {
			missing = append(missing, tool)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: %s", ErrMissingTools, strings.Join(missing, ", "))
	}
	return nil
}

// Up makes a lab and returns once each host's libvirtd and agent answer. It removes what a dead lab left behind. On any error,
// including the end of ctx, nothing of the new lab stays.
func Up(ctx context.Context, o Options) (*Lab, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if err := checkMachine(); err != nil {
		return nil, err
	}
	unlock, err := lockLab(ctx, o.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	dir := filepath.Join(stateRoot, o.Name)
	if old, err := readState(dir); err == nil && old.alive() {
		return nil, fmt.Errorf("lab %s: %w since %s; take it down with 'ftvirt lab down --name %s'",
			o.Name, ErrUp, old.Created.Format(time.DateTime), o.Name)
	}
	// A dead one of this name first: its lock, which removeDead asks for, is
	// ours already.
	if err := removeState(ctx, dir); err != nil {
		return nil, fmt.Errorf("lab %s: %w", o.Name, err)
	}
	if err := removeDead(ctx); err != nil {
		return nil, err
	}

	l := &Lab{dir: dir, state: newState(o), configure: o.Configure}
	if o.Ephemeral {
		l.tether = newTether()
	}
	if err := l.up(ctx, o); err != nil {
		return nil, errors.Join(fmt.Errorf("lab %s: %w", o.Name, err), l.teardown(context.WithoutCancel(ctx)))
	}
	return l, nil
}

func (l *Lab) up(ctx context.Context, o Options) error {
	for _, shared := range []string{filepath.Join(l.dir, "arbiter"), l.sharedImages()} {
		if err := os.MkdirAll(shared, 0o755); err != nil {
			return err
		}
	}
	if err := l.saveState(); err != nil {
		return err
	}
	ca, err := pki.NewCA("ftvirt lab " + l.state.Name)
	if err != nil {
		return err
	}
	if err := ca.Save(l.dir); err != nil {
		return err
	}
	l.attach()
	for _, n := range []*Node{l.sw, l.Client} {
		if err := l.startNode(ctx, n); err != nil {
			return err
		}
	}
	if err := l.makeSwitch(ctx); err != nil {
		return err
	}
	for _, h := range l.hosts {
		if err := h.install(ctx, o); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		if err := h.boot(ctx); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	return nil
}

// attach makes the Go side of the lab from its state.
func (l *Lab) attach() {
	node := func(name string) *Node { return &Node{Name: name, lab: l} }
	l.sw, l.Client = node(switchName), node(clientName)
	l.hosts = nil
	for i, name := range l.state.Hosts {
		l.hosts = append(l.hosts, &Host{Node: node(name), index: i + 1})
	}
}

// Open returns the running lab called name, "" meaning DefaultName.
func Open(_ context.Context, name string) (*Lab, error) {
	if name == "" {
		name = DefaultName
	}
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("%w: name %q", ErrInvalidOptions, name)
	}
	if err := checkMachine(); err != nil {
		return nil, err
	}
	dir := filepath.Join(stateRoot, name)
	s, err := readState(dir)
	if errors.Is(err, os.ErrNotExist) || err == nil && !s.alive() {
		return nil, fmt.Errorf("lab %s: %w; start it with 'ftvirt lab up'", name, ErrNotUp)
	}
	if err != nil {
		return nil, fmt.Errorf("lab %s: %w", name, err)
	}
	l := &Lab{dir: dir, state: s}
	l.attach()
	return l, nil
}

// Down ends the lab: all of its processes, networks, mounts, control groups and
// files. It is no error if parts of it are gone already.
func (l *Lab) Down(ctx context.Context) error {
	unlock, err := lockLab(ctx, l.state.Name)
	if err != nil {
		return err
	}
	defer unlock()
	return l.teardown(ctx)
}

// Remove takes down the lab called name, running or dead, "" meaning
// DefaultName. It returns ErrNotUp if there is nothing of it.
func Remove(ctx context.Context, name string) error {
	if name == "" {
		name = DefaultName
	}
	if !validName.MatchString(name) {
		return fmt.Errorf("%w: name %q", ErrInvalidOptions, name)
	}
	if err := checkMachine(); err != nil {
		return err
	}
	unlock, err := lockLab(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	dir := filepath.Join(stateRoot, name)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lab %s: %w", name, ErrNotUp)
	}
	return removeState(ctx, dir)
}

func (l *Lab) teardown(ctx context.Context) error {
	err := removeState(ctx, l.dir)
	if l.tether != nil {
		l.tether.release()
		l.tether = nil
	}
	return err
}

// Name returns the lab's name.
func (l *Lab) Name() string { return l.state.Name }

// Dir is the lab's state directory on the machine.
func (l *Lab) Dir() string { return l.dir }

// sharedImages is where the machine finds the ImageDir that all hosts share.
func (l *Lab) sharedImages() string { return filepath.Join(l.dir, "images") }

// HasCgroups tells whether the machine lets the lab's hosts have control groups.
func (l *Lab) HasCgroups() bool { return len(l.state.Cgroups) > 0 }

// CA is the authority that made the hosts' certificates.
func (l *Lab) CA() (*pki.CA, error) { return pki.OpenCA(l.dir) }

// Hosts returns the lab's hosts, hosta first.
func (l *Lab) Hosts() []*Host { return slices.Clone(l.hosts) }

// Host returns the host called name.
func (l *Lab) Host(name string) (*Host, error) {
	for _, h := range l.hosts {
		if h.Name == name {
			return h, nil
		}
	}
	return nil, fmt.Errorf("%w: %q; there are %s", ErrUnknownHost, name, strings.Join(l.state.Hosts, ", "))
}

// Node returns the host or the client called name.
func (l *Lab) Node(name string) (*Node, error) {
	if name == clientName {
		return l.Client, nil
	}
	h, err := l.Host(name)
	if err != nil {
		return nil, fmt.Errorf("%w, %s", err, clientName)
	}
	return h.Node, nil
}

// hostAddr returns the n-th address of a network.
func hostAddr(network netip.Prefix, n int) netip.Addr {
	a := network.Addr().As4()
	a[3] += byte(n)
	return netip.AddrFrom4(a)
}
