// SPDX-License-Identifier: Apache-2.0

// Package config reads ftvirt.toml, the one configuration file of a host.
//
// Reading is strict: a key that ftvirt does not know is an error that names the
// key and its line, since a misspelt timeout that is silently ignored is found
// out during a failover. ftvirt.toml.example, beside this file, explains every
// key.
package config

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// DefaultPath is where Path looks unless the environment says otherwise.
	DefaultPath = "/etc/ftvirt/ftvirt.toml"
	// PathEnv names the environment variable that overrides DefaultPath.
	PathEnv = "FTVIRT_CONFIG"
)

// Path gives the file that Load should read on this host.
func Path() string {
	if p := os.Getenv(PathEnv); p != "" {
		return p
	}
	return DefaultPath
}

// Config is the content of ftvirt.toml.
type Config struct {
	// Host is this host's name, as the other hosts' [peers.NAME] call it.
	Host string `toml:"host"`
	// LibvirtURI is the libvirt connection of the agent.
	LibvirtURI string `toml:"libvirt_uri"`

	Agent     Agent           `toml:"agent"`
	Channel   Channel         `toml:"channel"`
	Heartbeat Heartbeat       `toml:"heartbeat"`
	Service   Service         `toml:"service"`
	Arbiter   Arbiter         `toml:"arbiter"`
	Clone     Clone           `toml:"clone"`
	Protect   Protect         `toml:"protect"`
	Replay    Replay          `toml:"replay"`
	Metrics   Metrics         `toml:"metrics"`
	Web       Web             `toml:"web"`
	Peers     map[string]Peer `toml:"peers"`
}

// Agent configures the process that serves this host.
type Agent struct {
	// RunDir holds sockets, StateDir what must survive a reboot.
	RunDir   string `toml:"run_dir"`
	StateDir string `toml:"state_dir"`
	// AdminSocket serves the command line; PluginSocket serves the plugins
	// inside QEMU, so QEMU's user must reach it. Load derives both from
	// RunDir if the file does not name them.
	AdminSocket  string `toml:"admin_socket"`
	PluginSocket string `toml:"plugin_socket"`
	// PluginFile is the QEMU plugin, at the same path on all hosts.
	PluginFile string     `toml:"plugin_file"`
	LogLevel   slog.Level `toml:"log_level"`
}

// KeptDefinition is where the agent keeps the definition of a domain, by its UUID,
// of which libvirt here may have an old one.
func (a Agent) KeptDefinition(domain string) string {
	return filepath.Join(a.StateDir, "definitions", domain+".json")
}

// Channel configures the logging channel between agents.
type Channel struct {
	Listen string `toml:"listen"`
	// SendBuffer bounds what waits in the primary's agent to be sent, and
	// ReceiveBuffer what the backup's host holds unreplayed.
	SendBuffer    Size `toml:"send_buffer"`
	ReceiveBuffer Size `toml:"receive_buffer"`
	// Plaintext makes the channel run without TLS. It is never implied.
	Plaintext bool `toml:"plaintext"`
	// The files of TLS, PEM, in libvirt's places unless the file says otherwise.
	CACert     string `toml:"ca_cert"`
	CRL        string `toml:"crl"` // may be missing
	ServerCert string `toml:"server_cert"`
	ServerKey  string `toml:"server_key"`
	ClientCert string `toml:"client_cert"`
	ClientKey  string `toml:"client_key"`
	// ReconnectGrace is how long a broken connection may take to come back
	// before it counts as the loss of the other side.
	ReconnectGrace time.Duration `toml:"reconnect_grace"`
	// AckTimeout is how long log may wait for an ack before the connection
	// counts as broken, whatever heartbeats say. A longer heartbeat.timeout
	// counts instead.
	AckTimeout time.Duration `toml:"ack_timeout"`
}

// Heartbeat configures failure detection.
type Heartbeat struct {
	Listen   string        `toml:"listen"`
	Interval time.Duration `toml:"interval"`
	Timeout  time.Duration `toml:"timeout"`
}

// Service configures how a host that clients cannot reach is told from one that
// they can.
type Service struct {
	// Links are the bridges or cards by which clients reach the guests; if empty,
	// those that the domain's network cards are connected to.
	Links []string `toml:"links"`
	// Yield is how long a host of which one is down lets the other host of a pair
	// ask the arbiter first; 0 is not at all.
	Yield time.Duration `toml:"yield"`
}

// Between the moment at which a backup acknowledges and that at which a packet
// leaves for it, a primary may stand still three times: its agent, the plugin
// before it reads the ack, and the plugin before it sends. What takes longer each
// time lets nothing leave. The limits, and SendGap for what lies between the last
// look at the clock and the packet, add up to heartbeat.timeout, before which no
// backup goes live that has acknowledged something.
const (
	// PluginSilence is the limit for the plugin, each time: FT_SILENCE_NS.
	PluginSilence = 100 * time.Millisecond
	// SendGap is from the last look at the clock to the packet's way.
	SendGap = 50 * time.Millisecond

	releaseLimits = 2*PluginSilence + SendGap
)

// AckSilence is how long a primary's agent may have heard no ack and believe the
// next one all the same.
func (c Config) AckSilence() time.Duration { return c.Heartbeat.Timeout - releaseLimits }

// The kinds of arbiter.
const (
	// ArbiterDirectory keeps its records in a directory on shared storage.
	ArbiterDirectory = "directory"
	// ArbiterLUN keeps them on a SCSI logical unit that all hosts reach.
	ArbiterLUN = "lun"
	// ArbiterMajority is a majority of witnesses, without shared storage.
	ArbiterMajority = "majority"
)

// Arbiter configures the test-and-set of the paper, section 2.3.
type Arbiter struct {
	Kind string `toml:"kind"`
	// Path is the directory, Device the block device of the LUN.
	Path   string `toml:"path"`
	Device string `toml:"device"`
	// ID is the identity that the directory or the LUN must have; if empty,
	// the first one that is seen is taken.
	ID string `toml:"id"`
	// Witnesses are all voters of a majority, each ID@HOST:PORT, and KeyFile
	// holds the secret that they share with the hosts.
	Witnesses []string `toml:"witnesses"`
	KeyFile   string   `toml:"key_file"`
	// Retry is the pause between tries while the storage does not answer.
	Retry time.Duration `toml:"retry"`
}

// Clone configures FT VMotion, the paper's section 3.1.
type Clone struct {
	// DowntimeLimit is the longest final stop that the precopy may plan.
	DowntimeLimit time.Duration `toml:"downtime_limit"`
	// Bandwidth is in bytes per second; 0 is unlimited.
	Bandwidth Size          `toml:"bandwidth"`
	Timeout   time.Duration `toml:"timeout"`
	// DiskDir is where this host keeps the disk replicas of backups.
	DiskDir string `toml:"disk_dir"`
	// KeepReplicas is how long this host keeps the replicas of a backup that it
	// discarded: the next one begins with them. 0 keeps none.
	KeepReplicas time.Duration `toml:"keep_replicas"`
}

// Protect configures how redundancy comes about and comes back.
type Protect struct {
	// Auto lets the agent give each domain the backup that its annotation asks
	// for whenever it has none. Without it only commands do.
	Auto bool `toml:"auto"`
	// RetryMin is the pause before the first try and between the first tries;
	// it doubles with each that fails, up to RetryMax.
	RetryMin time.Duration `toml:"retry_min"`
	RetryMax time.Duration `toml:"retry_max"`
}

// Replay configures record and replay in QEMU.
type Replay struct {
	// ICountShift makes one guest instruction last 2^ICountShift ns.
	ICountShift int `toml:"icount_shift"`
	// DivergenceTimeout is how long a backup may consume nothing of a log
	// that is there before it is discarded.
	DivergenceTimeout time.Duration `toml:"divergence_timeout"`
	// TickInterval is the longest time that a primary logs nothing.
	TickInterval time.Duration `toml:"tick_interval"`
	// LogDir is where a primary's host keeps the event logs of its epochs, for
	// diagnosis; empty keeps none.
	LogDir string `toml:"log_dir"`
}

// Metrics configures what the agent shows to Prometheus.
type Metrics struct {
	// Listen is where /metrics is served; empty serves it nowhere.
	Listen string `toml:"listen"`
}

// Web configures the page on which the agent shows its pairs to people.
type Web struct {
	// Listen is where the page is served; empty serves it nowhere.
	Listen string `toml:"listen"`
}

// Peer says where another host's agent listens.
type Peer struct {
	Channel   string `toml:"channel"`
	Heartbeat string `toml:"heartbeat"`
	// CertificateName is the DNS name or IP address that the peer's certificates
	// are for; empty means the peer's name.
	CertificateName string `toml:"certificate_name"`
}

const (
	adminSocket  = "agent.sock"
	pluginSocket = "plugin.sock"
)

// Default gives the values that hold where the file says nothing. Host is the
// machine's name. One field has no default and fails Validate until it is set:
// Arbiter.Path, because a directory that is by accident not shared would let
// both hosts win. The other kinds' Device and Witnesses have none either.
func Default() Config {
	host, err := os.Hostname()
	if err != nil {
		host = "" // Validate asks for a name then.
	}
	c := Config{
		Host:       host,
		LibvirtURI: "qemu:///system",
		Agent: Agent{
			RunDir:     "/run/ftvirt",
			StateDir:   "/var/lib/ftvirt",
			PluginFile: "/usr/lib/ftvirt/ftvirt.so",
			LogLevel:   slog.LevelInfo,
		},
		Channel: Channel{
			Listen:         ":7700",
			SendBuffer:     16 * MiB,
			ReceiveBuffer:  64 * MiB,
			CACert:         "/etc/pki/CA/cacert.pem",
			CRL:            "/etc/pki/CA/cacrl.pem",
			ServerCert:     "/etc/pki/libvirt/servercert.pem",
			ServerKey:      "/etc/pki/libvirt/private/serverkey.pem",
			ClientCert:     "/etc/pki/libvirt/clientcert.pem",
			ClientKey:      "/etc/pki/libvirt/private/clientkey.pem",
			ReconnectGrace: 200 * time.Millisecond,
			AckTimeout:     2 * time.Second,
		},
		Heartbeat: Heartbeat{
			Listen:   ":7701",
			Interval: 50 * time.Millisecond,
			Timeout:  500 * time.Millisecond,
		},
		Service: Service{
			Links: []string{},
			Yield: time.Second,
		},
		Arbiter: Arbiter{
			Kind:      ArbiterDirectory,
			Witnesses: []string{},
			KeyFile:   "/etc/ftvirt/witness.key",
			Retry:     500 * time.Millisecond,
		},
		Clone: Clone{
			DowntimeLimit: 100 * time.Millisecond,
			Bandwidth:     100 * MiB,
			Timeout:       10 * time.Minute,
			DiskDir:       "/var/lib/libvirt/images",
			KeepReplicas:  7 * 24 * time.Hour,
		},
		Protect: Protect{
			Auto:     true,
			RetryMin: time.Second,
			RetryMax: 20 * time.Second,
		},
		Replay: Replay{
			ICountShift:       2,
			DivergenceTimeout: 3 * time.Second,
			TickInterval:      50 * time.Millisecond,
		},
		Peers: map[string]Peer{},
	}
	c.deriveSockets()
	return c
}

func (c *Config) deriveSockets() {
	if c.Agent.AdminSocket == "" {
		c.Agent.AdminSocket = filepath.Join(c.Agent.RunDir, adminSocket)
	}
	if c.Agent.PluginSocket == "" {
		c.Agent.PluginSocket = filepath.Join(c.Agent.RunDir, pluginSocket)
	}
}

// ErrUnknownPeer is returned for a host that the configuration does not name.
var ErrUnknownPeer = errors.New("unknown peer")

// Peer finds the host called name. It never finds this host itself, so that
// one file can be installed on all hosts.
func (c Config) Peer(name string) (Peer, error) {
	if name == c.Host {
		return Peer{}, fmt.Errorf("%w %q: it is this host", ErrUnknownPeer, name)
	}
	p, ok := c.Peers[name]
	if !ok {
		known := slices.DeleteFunc(slices.Sorted(maps.Keys(c.Peers)), func(n string) bool { return n == c.Host })
		if len(known) == 0 {
			known = []string{"none"}
		}
		return Peer{}, fmt.Errorf("%w %q: configured are %s; add a [peers.%s] table",
			ErrUnknownPeer, name, strings.Join(known, ", "), tomlKey(name))
	}
	return p, nil
}

// CertificateName is what a host's certificates are to be for.
func (c Config) CertificateName(host string) string {
	if name := c.Peers[host].CertificateName; name != "" {
		return name
	}
	return host
}
