// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrInvalid is wrapped by a FieldError.
var ErrInvalid = errors.New("invalid configuration")

// FieldError names a field whose value cannot be used.
type FieldError struct {
	// Field is the key as the file spells it, such as "heartbeat.timeout".
	Field  string
	Reason string
	Remedy string
}

func (e *FieldError) Error() string {
	return e.Field + ": " + e.Reason + "; " + e.Remedy
}

// Is makes errors.Is find ErrInvalid.
func (e *FieldError) Is(target error) bool { return target == ErrInvalid }

const (
	// minPeriod keeps a forgotten unit (100 is 100 ns in TOML terms) and a
	// busy loop out of every interval.
	minPeriod = time.Millisecond
	// minBuffer holds any single event of a log: a full-size packet with
	// offloads, with room to spare.
	minBuffer = 1 * MiB
	// maxYield bounds how long a domain is held for a host that may be dead.
	maxYield = 3 * time.Second
	// minAckTimeout lets TCP send a segment again more than once.
	minAckTimeout = time.Second
	// maxAckTimeout is longer than any client should wait for a guest.
	maxAckTimeout = 10 * time.Second
	// maxShift is QEMU's own limit for icount.
	maxShift = 10
	// maxSocketPath is sizeof(sun_path) less the final zero byte.
	maxSocketPath = 107
)

var hostName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,62})$`)

// interfaceName is what Linux allows, but for what no path may have in it.
var interfaceName = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._@-]{0,14}$`)

var certName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})$`)

// ValidCertificateName tells whether a certificate can be for that name.
func ValidCertificateName(name string) bool {
	return net.ParseIP(name) != nil || certName.MatchString(name)
}

// Validate checks each value and how values relate. It returns all that is
// wrong, each a *FieldError, joined.
func (c Config) Validate() error {
	var v validation
	v.check(hostName.MatchString(c.Host), "host", fmt.Sprintf("%q is not a host name", c.Host),
		"use 1 to 63 letters, digits, dots, underscores and dashes")
	v.check(c.LibvirtURI != "", "libvirt_uri", "it is empty", `use "qemu:///system"`)

	v.path("agent.run_dir", c.Agent.RunDir)
	v.path("agent.state_dir", c.Agent.StateDir)
	v.path("agent.plugin_file", c.Agent.PluginFile)
	// QEMU splits plugin arguments at commas, with no way to quote them.
	v.check(!strings.Contains(c.Agent.PluginFile, ","), "agent.plugin_file", "it has a comma, where QEMU splits arguments",
		"use a path without commas")
	v.check(!strings.Contains(c.Agent.PluginSocket, ","), "agent.plugin_socket", "it has a comma, where QEMU splits arguments",
		"use a path without commas")
	v.socket("agent.admin_socket", c.Agent.AdminSocket)
	v.socket("agent.plugin_socket", c.Agent.PluginSocket)
	if c.Agent.RunDir != "" {
		v.socketLength("agent.run_dir", filepath.Join(c.Agent.RunDir, longestSocket))
	}
	v.check(c.Agent.AdminSocket != c.Agent.PluginSocket, "agent.plugin_socket", "it is the same as agent.admin_socket",
		"give each its own path: QEMU must never reach the admin socket")

	v.listen("channel.listen", c.Channel.Listen)
	v.check(c.Channel.SendBuffer >= minBuffer, "channel.send_buffer", c.Channel.SendBuffer.String()+" may not hold one event",
		"use at least "+minBuffer.String())
	v.check(c.Channel.ReceiveBuffer >= c.Channel.SendBuffer, "channel.receive_buffer",
		fmt.Sprintf("%s is less than channel.send_buffer (%s)", c.Channel.ReceiveBuffer, c.Channel.SendBuffer),
		"after a reconnect it must take all that was not acknowledged: make it at least as large")
	for _, f := range []struct{ field, path string }{
		{"channel.ca_cert", c.Channel.CACert},
		{"channel.crl", c.Channel.CRL},
		{"channel.server_cert", c.Channel.ServerCert},
		{"channel.server_key", c.Channel.ServerKey},
		{"channel.client_cert", c.Channel.ClientCert},
		{"channel.client_key", c.Channel.ClientKey},
	} {
		v.path(f.field, f.path)
	}
	v.period("channel.reconnect_grace", c.Channel.ReconnectGrace)
	v.check(c.Channel.ReconnectGrace < c.Heartbeat.Timeout, "channel.reconnect_grace",
		fmt.Sprintf("%s is not less than heartbeat.timeout (%s)", c.Channel.ReconnectGrace, c.Heartbeat.Timeout),
		"a broken connection must be judged before a silent host is: lower it")
	v.check(c.Channel.ReconnectGrace >= 2*PluginSilence, "channel.reconnect_grace",
		fmt.Sprintf("%s is less than %s, for which a primary's QEMU may still let packets go", c.Channel.ReconnectGrace, 2*PluginSilence),
		"raise it")
	v.check(c.Channel.AckTimeout >= minAckTimeout && c.Channel.AckTimeout <= maxAckTimeout, "channel.ack_timeout",
		fmt.Sprintf("%s is not between %s and %s", c.Channel.AckTimeout, minAckTimeout, maxAckTimeout),
		"a segment that TCP sends again must not end the pair, and a guest whose outputs wait must not hang for long: use two or three seconds")

	v.listen("heartbeat.listen", c.Heartbeat.Listen)
	v.period("heartbeat.interval", c.Heartbeat.Interval)
	v.check(c.Heartbeat.Timeout >= 4*c.Heartbeat.Interval, "heartbeat.timeout",
		fmt.Sprintf("%s is less than four times heartbeat.interval (%s)", c.Heartbeat.Timeout, c.Heartbeat.Interval),
		"a few lost datagrams would start a failover: raise it, or lower the interval")
	v.check(c.AckSilence() >= 2*c.Replay.TickInterval, "heartbeat.timeout",
		fmt.Sprintf("%s is less than %s: a primary that stood still must stop its packets before the backup may be live, and two times "+
			"replay.tick_interval without an ack are nothing unusual", c.Heartbeat.Timeout, releaseLimits+2*c.Replay.TickInterval),
		"raise it, or lower replay.tick_interval")

	for _, name := range c.Service.Links {
		v.check(interfaceName.MatchString(name), "service.links", fmt.Sprintf("%q is not the name of a network interface", name),
			"use names that 'ip link' shows")
	}
	v.check(c.Service.Yield >= 0 && c.Service.Yield <= maxYield, "service.yield", fmt.Sprintf("%s is out of range", c.Service.Yield),
		fmt.Sprintf("use 0 to %s: the domain stands still meanwhile", maxYield))

	v.arbiter(c.Arbiter)

	v.period("clone.downtime_limit", c.Clone.DowntimeLimit)
	v.check(c.Clone.DowntimeLimit <= time.Second, "clone.downtime_limit",
		fmt.Sprintf("%s is more than the second that a guest may pause", c.Clone.DowntimeLimit), "use at most 1s")
	v.check(c.Clone.Bandwidth == 0 || c.Clone.Bandwidth >= minBuffer, "clone.bandwidth",
		c.Clone.Bandwidth.String()+" per second never finishes", "use at least "+minBuffer.String()+", or 0 for no limit")
	v.check(c.Clone.Timeout > c.Clone.DowntimeLimit && c.Clone.Timeout >= time.Second, "clone.timeout",
		fmt.Sprintf("%s is too short for a clone", c.Clone.Timeout), `use minutes, such as "10m"`)
	v.path("clone.disk_dir", c.Clone.DiskDir)
	v.check(c.Clone.KeepReplicas >= 0, "clone.keep_replicas", fmt.Sprintf("%s is negative", c.Clone.KeepReplicas), "use 0 to keep none")

	v.period("protect.retry_min", c.Protect.RetryMin)
	v.check(c.Protect.RetryMax >= c.Protect.RetryMin, "protect.retry_max",
		fmt.Sprintf("%s is less than protect.retry_min (%s)", c.Protect.RetryMax, c.Protect.RetryMin), "make it at least as long")

	v.check(c.Replay.ICountShift >= 0 && c.Replay.ICountShift <= maxShift, "replay.icount_shift",
		strconv.Itoa(c.Replay.ICountShift)+" is out of range", fmt.Sprintf("use 0 to %d", maxShift))
	v.period("replay.tick_interval", c.Replay.TickInterval)
	v.check(c.Replay.DivergenceTimeout > 3*c.Replay.TickInterval, "replay.divergence_timeout",
		fmt.Sprintf("%s is not more than three times replay.tick_interval (%s)", c.Replay.DivergenceTimeout, c.Replay.TickInterval),
		"an idle primary would look like a diverged backup: raise it, or lower the interval")

	if c.Replay.LogDir != "" {
		v.path("replay.log_dir", c.Replay.LogDir)
	}

	if c.Metrics.Listen != "" {
		v.listen("metrics.listen", c.Metrics.Listen)
	}
	if c.Web.Listen != "" {
		v.listen("web.listen", c.Web.Listen)
		v.check(c.Web.Listen != c.Metrics.Listen, "web.listen", "it is the same as metrics.listen", "give each an address of its own")
	}

	for _, name := range slices.Sorted(maps.Keys(c.Peers)) {
		key := "peers." + tomlKey(name)
		v.check(hostName.MatchString(name), key, "it is not a host name",
			"use 1 to 63 letters, digits, dots, underscores and dashes")
		v.dial(key+".channel", c.Peers[name].Channel)
		v.dial(key+".heartbeat", c.Peers[name].Heartbeat)
		cert := c.Peers[name].CertificateName
		v.check(cert == "" || ValidCertificateName(cert), key+".certificate_name",
			fmt.Sprintf("%q is neither a DNS name nor an IP address", cert), "use one that is among the alternative names of its certificates")
	}
	return errors.Join(v.errs...)
}

type validation struct{ errs []error }

func (v *validation) add(field, reason, remedy string) {
	v.errs = append(v.errs, &FieldError{Field: field, Reason: reason, Remedy: remedy})
}

func (v *validation) check(ok bool, field, reason, remedy string) {
	if !ok {
		v.add(field, reason, remedy)
	}
}

// kernelDisk is the name of a disk that another one may have after the next
// boot.
var kernelDisk = regexp.MustCompile(`^/dev/(sd[a-z]+|dm-[0-9]+)$`)

// arbiter checks what the kind needs, and that nothing is set that only another
// kind uses: whoever set it expects another arbiter than there would be.
func (v *validation) arbiter(a Arbiter) {
	known := slices.Contains([]string{ArbiterDirectory, ArbiterLUN, ArbiterMajority}, a.Kind)
	for _, k := range []struct {
		field string
		set   bool
		kinds []string
	}{
		{"arbiter.path", a.Path != "", []string{ArbiterDirectory}},
		{"arbiter.device", a.Device != "", []string{ArbiterLUN}},
		{"arbiter.id", a.ID != "", []string{ArbiterDirectory, ArbiterLUN}},
		{"arbiter.witnesses", len(a.Witnesses) > 0, []string{ArbiterMajority}},
	} {
		v.check(!k.set || slices.Contains(k.kinds, a.Kind) || !known, k.field, fmt.Sprintf("it has no meaning for arbiter.kind = %q", a.Kind),
			fmt.Sprintf("remove it, or use kind = %q", k.kinds[0]))
	}
	switch a.Kind {
	case ArbiterDirectory:
		if a.Path == "" {
			v.add("arbiter.path", "it is not set", "name a directory on storage that all hosts share")
		} else {
			v.path("arbiter.path", a.Path)
		}
	case ArbiterLUN:
		if a.Device == "" {
			v.add("arbiter.device", "it is not set", "name a LUN that all hosts reach, below /dev/disk/by-id")
		} else {
			v.path("arbiter.device", a.Device)
		}
		v.check(a.ID != "" || !kernelDisk.MatchString(a.Device), "arbiter.device", a.Device+" may be another disk after the next boot",
			"use its name below /dev/disk/by-id, or set arbiter.id as well")
	case ArbiterMajority:
		v.witnesses(a.Witnesses)
		v.path("arbiter.key_file", a.KeyFile)
	default:
		v.add("arbiter.kind", fmt.Sprintf("%q is not known", a.Kind),
			fmt.Sprintf("use %q, %q or %q", ArbiterDirectory, ArbiterLUN, ArbiterMajority))
	}
	v.period("arbiter.retry", a.Retry)
}

func (v *validation) witnesses(list []string) {
	const field = "arbiter.witnesses"
	v.check(len(list) >= 3 && len(list)%2 == 1, field, fmt.Sprintf("%d are not a number of which there always is a majority", len(list)),
		"name 3 or 5")
	by := make(map[string]string) // the witness that has an ID or a host
	for _, w := range list {
		id, address, _ := strings.Cut(w, "@")
		host, port, err := net.SplitHostPort(address)
		if id == "" || err != nil || host == "" || !validPort(port) {
			v.add(field, fmt.Sprintf("%q is not a witness", w), `write "ID@HOST:PORT", with the ID that 'ftvirt witness init' prints`)
			continue
		}
		if other, twice := by["id "+id]; twice {
			v.add(field, fmt.Sprintf("%q and %q are the same witness", other, w), "two votes of one would be no majority: name each once")
		} else if other, twice := by["host "+host]; twice {
			v.add(field, fmt.Sprintf("%q and %q are on one host", other, w), "they would be lost together: put each on a host of its own")
		}
		by["id "+id], by["host "+host] = w, w
	}
}

func (v *validation) path(field, p string) {
	v.check(filepath.IsAbs(p), field, fmt.Sprintf("%q is not an absolute path", p), "start it with a slash")
}

func (v *validation) socket(field, p string) {
	v.path(field, p)
	v.socketLength(field, p)
}

func (v *validation) socketLength(field, p string) {
	v.check(len(p) <= maxSocketPath, field, fmt.Sprintf("the socket path %s has %d bytes, and Unix allows %d", p, len(p), maxSocketPath),
		"use a shorter directory")
}

func (v *validation) period(field string, d time.Duration) {
	v.check(d >= minPeriod, field, fmt.Sprintf("%s is too short", d), `write it with a unit, such as "200ms"`)
}

// listen accepts an empty host, which means every address.
func (v *validation) listen(field, addr string) {
	if _, port, err := net.SplitHostPort(addr); err != nil || !validPort(port) {
		v.add(field, fmt.Sprintf("%q is not an address to listen on", addr), `write "host:port", or ":port" for every address`)
	}
}

func (v *validation) dial(field, addr string) {
	if host, port, err := net.SplitHostPort(addr); err != nil || host == "" || !validPort(port) {
		v.add(field, fmt.Sprintf("%q is not the address of a host", addr), `write "host:port"`)
	}
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0
}

// longestSocket is the longest name below run_dir: of a clone's socket, in a
// directory that is named after the domain.
const longestSocket = "clone-00000000-0000-0000-0000-000000000000/migrate.sock"
