// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/pki"
)

// daemonTimeout bounds the start of one daemon on a busy machine.
const daemonTimeout = 60 * time.Second

// Host is a node that runs libvirt and ftvirt.
type Host struct {
	*Node

	index int // 1 for hosta
	own   []ownMount
	// imageBytes is the size of what MountImages made, and images that itself
	// while the host is down.
	imageBytes int
	images     []*os.File
}

// ServiceAddr is the host's address on the service network.
func (h *Host) ServiceAddr() netip.Addr { return hostAddr(ServiceNet, h.index) }

// LoggingAddr is the host's address on the logging network.
func (h *Host) LoggingAddr() netip.Addr { return hostAddr(LoggingNet, h.index) }

// dir holds the host's files on the machine.
func (h *Host) dir() string { return filepath.Join(h.lab.dir, h.Name) }

// Path returns where the machine finds a file of the host, given the host's
// absolute path. Outside of /etc, /run, /var, /srv and /tmp both have the same
// files.
func (h *Host) Path(path string) string {
	path = filepath.Clean(path)
	for _, m := range h.own {
		if inside, ok := m.inside(path); ok {
			return inside
		}
	}
	mounts := [][2]string{
		{ArbiterDir, filepath.Join(h.lab.dir, "arbiter")},
		{BinDir, h.lab.state.Bin},
	}
	if h.lab.state.Shared {
		mounts = append(mounts, [2]string{ImageDir, h.lab.sharedImages()})
	}
	for _, mount := range mounts {
		if rest, ok := strings.CutPrefix(path, mount[0]); ok && (rest == "" || rest[0] == '/') {
			return mount[1] + rest
		}
	}
	for _, own := range []string{"/etc", "/run", "/var", "/srv", "/tmp"} {
		if path == own || strings.HasPrefix(path, own+"/") {
			return filepath.Join(h.dir(), path)
		}
	}
	return path
}

// LibvirtURI reaches the host's libvirtd from the machine. On the host itself
// qemu:///system does.
func (h *Host) LibvirtURI() string {
	return "qemu+unix:///system?socket=" + h.Path("/run/libvirt/libvirt-sock")
}

// Virsh runs virsh on the host and returns its standard output.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	return h.Exec(ctx, append([]string{"virsh", "-q", "-c", "qemu:///system"}, args...)...)
}

// ---- installation ----------------------------------------------------------

// install makes the host's directories, as a fresh installation has them.
func (h *Host) install(ctx context.Context, o Options) error {
	for _, d := range []struct {
		path string
		mode fs.FileMode
	}{
		{"/run", 0o755},
		{"/tmp", 0o777 | fs.ModeSticky},
		{"/srv/guest", 0o755},
		{ImageDir, 0o755},
		{"/var/cache/libvirt", 0o755},
		{"/var/lib/ftvirt", 0o755},
		{"/var/lib/libvirt/images", 0o755},
		{"/var/log/ftvirt", 0o755},
		{ConsoleDir, 0o755},
		{"/var/tmp", 0o777 | fs.ModeSticky},
	} {
		path := filepath.Join(h.dir(), d.path)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(path, d.mode); err != nil { // whatever the umask
			return err
		}
	}
	if err := os.Symlink("/run", filepath.Join(h.dir(), "var/run")); err != nil {
		return err
	}
	// All of /etc, so that whatever runs here finds users, certificates and its
	// own configuration, and whatever it changes stays here.
	if err := h.lab.sh(ctx, `cp -a /etc "$1" && rm -rf "$1/etc/libvirt/qemu" "$1/etc/libvirt/hooks" "$1/etc/libvirt/storage" "$1/etc/ftvirt"`, h.dir()); err != nil {
		return err
	}
	if o.Guest.Kernel != "" {
		if err := h.lab.sh(ctx, `cp --sparse=always "$2" "$1/vmlinuz" && cp "$3" "$1/initrd.gz" && cp --sparse=always "$4" "$1/disk.raw"`,
			filepath.Join(h.dir(), GuestDir), o.Guest.Kernel, o.Guest.Initrd, o.Guest.DiskTemplate); err != nil {
			return err
		}
	}
	files := map[string]string{
		"/etc/hostname":                 h.Name + "\n",
		"/etc/hosts":                    h.lab.hostsFile(),
		"/etc/libvirt/libvirt.conf":     "remote_mode = \"legacy\"\n",
		"/etc/libvirt/libvirtd.conf":    h.libvirtdConf(),
		"/etc/libvirt/qemu.conf":        h.qemuConf(),
		"/etc/libvirt/virtlogd.conf":    "log_level = 3\nlog_outputs = \"3:file:/var/log/libvirt/virtlogd.log\"\n",
		"/etc/libvirt/qemu/.keep":       "",
		"/etc/libvirt/hooks/qemu.d/.no": "",
	}
	for path, text := range files {
		if err := h.writeFile(path, text); err != nil {
			return err
		}
	}
	if err := h.Certify(); err != nil {
		return err
	}
	if h.has("ftvirt-hook") {
		if err := os.Symlink(filepath.Join(BinDir, "ftvirt-hook"), h.Path("/etc/libvirt/hooks/qemu.d/ftvirt")); err != nil {
			return err
		}
	}
	return h.WriteConfig(nil)
}

// Certify gives the host certificates, where libvirt has them.
func (h *Host) Certify() error {
	ca, err := h.lab.CA()
	if err != nil {
		return err
	}
	own, err := ca.Issue(pki.Request{Host: h.Name, Names: []string{h.LoggingAddr().String()}})
	if err != nil {
		return err
	}
	return h.InstallPKI(ca.PEM(), own)
}

// InstallPKI replaces the host's certificates and those of its authority.
func (h *Host) InstallPKI(ca []byte, own *pki.Host) error {
	c := config.Default().Channel
	for _, f := range []struct {
		path string
		text []byte
		mode fs.FileMode
	}{
		{c.CACert, ca, 0o644},
		{c.ServerKey, own.ServerKey, 0o600}, {c.ServerCert, own.ServerCert, 0o644},
		{c.ClientKey, own.ClientKey, 0o600}, {c.ClientCert, own.ClientCert, 0o644},
	} {
		path := h.Path(f.path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path+".new", f.text, f.mode); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	return nil
}

// has tells whether the lab's programs include name.
func (h *Host) has(name string) bool {
	if h.lab.state.Bin == "" {
		return false
	}
	_, err := os.Stat(filepath.Join(h.lab.state.Bin, name))
	return err == nil
}

func (h *Host) writeFile(path, text string) error {
	path = h.Path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

func (l *Lab) hostsFile() string {
	var b strings.Builder
	b.WriteString("127.0.0.1 localhost\n")
	for _, h := range l.hosts {
		fmt.Fprintf(&b, "%s %s\n", h.LoggingAddr(), h.Name)
	}
	return b.String()
}

func (h *Host) libvirtdConf() string {
	// The machine has one DMI UUID for all hosts; libvirt refuses to migrate
	// between hosts that seem to be the same.
	return fmt.Sprintf(`host_uuid = "f7000000-0000-4000-8000-0000000000%02x"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
`, 0xa0+h.index)
}

// qemuConf keeps libvirt's defaults, so QEMU runs as Debian's libvirt-qemu, in a
// mount namespace and with seccomp, wherever the machine has what they need.
func (h *Host) qemuConf() string {
	var b strings.Builder
	b.WriteString("stdio_handler = \"logd\"\n")
	if _, err := os.Stat("/sys/kernel/security/apparmor"); err != nil {
		// libvirt would do the same; written down so that nobody wonders.
		b.WriteString("security_driver = \"none\"\n")
	}
	if !h.lab.HasCgroups() {
		b.WriteString("cgroup_controllers = []\n")
	}
	return b.String()
}

// WriteConfig writes the host's ftvirt.toml. change, if not nil, alters what the
// lab would write, after its Options.Configure; a running agent reads the file
// only when it is restarted.
func (h *Host) WriteConfig(change func(*config.Config)) error {
	c := config.Default()
	c.Host = h.Name
	c.Agent.PluginFile = filepath.Join(BinDir, "ftvirt.so")
	channel, heartbeat := addPort(h.LoggingAddr(), c.Channel.Listen), addPort(h.LoggingAddr(), c.Heartbeat.Listen)
	c.Arbiter.Path = ArbiterDir
	if h.lab.state.Shared {
		c.Clone.DiskDir = ImageDir
	}
	for _, peer := range h.lab.hosts {
		if peer.Name != h.Name {
			c.Peers[peer.Name] = config.Peer{
				Channel:   addPort(peer.LoggingAddr(), c.Channel.Listen),
				Heartbeat: addPort(peer.LoggingAddr(), c.Heartbeat.Listen),
			}
		}
	}
	c.Channel.Listen, c.Heartbeat.Listen = channel, heartbeat
	for _, f := range []func(*config.Config){h.lab.configure, change} {
		if f != nil {
			f(&c)
		}
	}
	if err := c.Validate(); err != nil {
		return fmt.Errorf("%s: %w", h.Name, err)
	}
	var text bytes.Buffer
	if err := toml.NewEncoder(&text).Encode(c); err != nil {
		return fmt.Errorf("%s: %s: %w", h.Name, configFile, err)
	}
	return h.writeFile(configFile, text.String())
}

// addPort gives addr the port of a listen address such as ":7700".
func addPort(addr netip.Addr, listen string) string {
	return addr.String() + listen[strings.LastIndexByte(listen, ':'):]
}

// ---- power -----------------------------------------------------------------

// Boot starts a host that has crashed. Its disks are as they were, /run and
// /tmp are empty, domains are off.
func (h *Host) Boot(ctx context.Context) error {
	if h.Up() {
		return fmt.Errorf("%s is up already", h.Name)
	}
	for _, dir := range []string{"/run", "/tmp"} {
		entries, err := os.ReadDir(h.Path(dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(h.Path(dir), e.Name())); err != nil {
				return err
			}
		}
	}
	return h.boot(ctx)
}

func (h *Host) boot(ctx context.Context) error {
	join, err := h.lab.state.makeCgroups(h.Name)
	if err != nil {
		return err
	}
	args := []string{h.Name, filepath.Join(h.lab.dir, "arbiter"), h.lab.state.Bin, ""}
	if h.lab.state.Shared {
		args[3] = h.lab.sharedImages()
	}
	if len(join) > 0 {
		args = append(args, "cgroup")
	}
	const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC
	if err := h.lab.startProcess1(ctx, h.Node, hostScript, h.dir(), join, namespaces, args...); err != nil {
		return err
	}
	if err := h.restoreImages(ctx); err != nil {
		return err
	}
	if err := h.connect(ctx); err != nil {
		return err
	}
	if err := h.StartLibvirt(ctx); err != nil {
		return err
	}
	if h.lab.state.NoAgent || !h.has("ftvirt") {
		return nil
	}
	return h.StartAgent(ctx)
}

// StartLibvirt starts virtlogd and libvirtd and returns when libvirtd answers.
func (h *Host) StartLibvirt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	for _, daemon := range []string{"virtlogd", "libvirtd"} {
		if _, err := h.Exec(ctx, daemon, "--daemon"); err != nil {
			return h.withLog(err, "/var/log/libvirt/"+daemon+".log")
		}
	}
	var last error
	err := poll(ctx, func() (bool, error) {
		_, last = h.Virsh(ctx, "list", "--all")
		return last == nil, nil
	}, "libvirtd on %s", h.Name)
	if err != nil {
		return h.withLog(errors.Join(err, last), "/var/log/libvirt/libvirtd.log")
	}
	return nil
}

// KillLibvirt kills libvirtd alone; domains go on running, as after a crash of
// the daemon.
func (h *Host) KillLibvirt(ctx context.Context) error {
	return h.killByFile(ctx, "/run/libvirtd.pid")
}

// Crash cuts the host's power: its network is gone at once, so that no closing
// connection tells the others, and then all of its processes are killed.
func (h *Host) Crash(ctx context.Context) error {
	p, err := h.process()
	if err != nil {
		return err
	}
	service, logging := port(h.Name, Service), port(h.Name, Logging)
	if err := h.holdImages(p); err != nil {
		return fmt.Errorf("crash %s: %w", h.Name, err)
	}
	// Removing one end of a link removes the other.
	if err := h.lab.switchBatch(ctx, "link del "+service, "link del "+logging); err != nil {
		return err
	}
	if err := p.kill(ctx); err != nil {
		return fmt.Errorf("crash %s: %w", h.Name, err)
	}
	for _, dir := range h.lab.state.Cgroups {
		if err := removeCgroup(ctx, filepath.Join(dir, h.Name)); err != nil {
			return fmt.Errorf("crash %s: %w", h.Name, err)
		}
	}
	return nil
}

// powerOffLimit is how long a host that ends waits for its processes.
const powerOffLimit = 5 * time.Second

// PowerOff ends the host as systemd does: it stops ftvirt-handover.service first,
// asks each process to end, kills what is left, and cuts the power. No
// libvirt-guests shuts domains down.
func (h *Host) PowerOff(ctx context.Context) error {
	if h.has("ftvirt") && !h.lab.state.NoAgent {
		// The host stops whatever comes of it.
		_, _ = h.Exec(ctx, filepath.Join(BinDir, "ftvirt"), "handover", "--config", configFile, "--timeout", "20s")
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// The shell asks itself and process 1 not.
	if _, err := h.kill(ctx, unix.SIGTERM, everything); err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, powerOffLimit)
	defer cancel()
	_ = poll(limit, func() (bool, error) {
		// Left are process 1, what that waits for, and the shell.
		out, err := h.Exec(limit, "/bin/sh", "-euc", `set -- /proc/[0-9]*; [ $# -gt 3 ] || echo alone`)
		return err == nil && strings.TrimSpace(out) == "alone", nil
	}, "the end of all processes on %s", h.Name)
	if err := ctx.Err(); err != nil {
		return err
	}
	return h.Crash(ctx)
}

// ---- agent and QEMU --------------------------------------------------------

// agentNice is what contrib/ftvirt-agent.service gives the agent.
const agentNice = "-10"

// StartAgent starts the host's ftvirt agent and returns when the agent's admin
// socket is there. Its log is /var/log/ftvirt/agent.log on the host.
func (h *Host) StartAgent(ctx context.Context) error {
	if !h.has("ftvirt") {
		return fmt.Errorf("%s: start agent: no ftvirt in the lab's programs (%q): run 'make build'", h.Name, h.lab.state.Bin)
	}
	if pid, err := h.AgentPID(); err == nil && h.runs(ctx, pid) {
		return fmt.Errorf("%s: start agent: it runs already, as process %d", h.Name, pid)
	}
	c, err := config.Load(h.Path(configFile))
	if err != nil {
		return fmt.Errorf("%s: start agent: %w", h.Name, err)
	}
	socket := h.Path(c.Agent.AdminSocket)
	// One that a killed agent left would look like readiness.
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: start agent: %w", h.Name, err)
	}
	if _, err := h.Exec(ctx, "/bin/sh", "-euc",
		`setsid nice -n "$5" "$1" agent --config "$2" >>"$3" 2>&1 </dev/null & echo $! >"$4"`,
		"sh", filepath.Join(BinDir, "ftvirt"), configFile, agentLog, agentPID, agentNice); err != nil {
		return err
	}
	pid, err := h.AgentPID()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	err = poll(ctx, func() (bool, error) {
		if _, err := os.Stat(socket); err == nil {
			return true, nil
		}
		if !h.runs(ctx, pid) && ctx.Err() == nil {
			return false, fmt.Errorf("%s: %w", h.Name, ErrAgentEnded)
		}
		return false, nil
	}, "%s of the agent on %s", c.Agent.AdminSocket, h.Name)
	if err != nil {
		return h.withLog(err, agentLog)
	}
	return nil
}

// StopAgent asks the agent to end, as systemd would, and waits for it.
func (h *Host) StopAgent(ctx context.Context) error {
	pid, err := h.AgentPID()
	if err != nil {
		return err
	}
	if _, err := h.Exec(ctx, "kill", "-TERM", strconv.Itoa(pid)); err != nil {
		return err
	}
	return h.waitEnd(ctx, pid)
}

// KillAgent kills the agent without warning and waits until it is gone.
func (h *Host) KillAgent(ctx context.Context) error { return h.killByFile(ctx, agentPID) }

// AgentPID returns the agent's process number on the host.
func (h *Host) AgentPID() (int, error) { return h.readPID(agentPID) }

// AgentLog returns what the host's agents have logged since the lab came up.
func (h *Host) AgentLog() (string, error) {
	text, err := os.ReadFile(h.Path(agentLog))
	return string(text), err
}

// KillQEMU kills the QEMU of a domain without warning, the paper's fail-stop
// failure of a virtual machine, and waits until it is gone.
func (h *Host) KillQEMU(ctx context.Context, domain string) error {
	return h.killByFile(ctx, filepath.Join("/run/libvirt/qemu", domain+".pid"))
}

// QEMUPID returns the process number, on the host, of a domain's QEMU.
func (h *Host) QEMUPID(domain string) (int, error) {
	return h.readPID(filepath.Join("/run/libvirt/qemu", domain+".pid"))
}

// Process is a process of a host that faults can be put to.
type Process string

// The processes.
const (
	AgentProcess   Process = agentPID
	LibvirtProcess Process = "/run/libvirtd.pid"
)

// QEMUProcess is the QEMU of a domain.
func QEMUProcess(domain string) Process {
	return Process(filepath.Join("/run/libvirt/qemu", domain+".pid"))
}

// PID returns the process's number on the host.
func (h *Host) PID(p Process) (int, error) { return h.readPID(string(p)) }

// Signal sends a process of the host a signal, and returns when it was sent.
func (h *Host) Signal(ctx context.Context, p Process, signal unix.Signal) (time.Time, error) {
	pid, err := h.readPID(string(p))
	if err != nil {
		return time.Time{}, err
	}
	// The host tells the time itself: starting a command there takes longer
	// than a failover may.
	return h.kill(ctx, signal, strconv.Itoa(pid))
}

func (h *Host) kill(ctx context.Context, signal unix.Signal, target string) (time.Time, error) {
	out, err := h.Exec(ctx, "/bin/sh", "-euc", `date +%s%N; kill "-$1" "$2"`, "sh", strconv.Itoa(int(signal)), target)
	if err != nil {
		return time.Time{}, err
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	return time.Unix(0, ns), err
}

// everything is all processes of a host but its process 1 and the caller.
const everything = "-1"

// Freeze stops all of the host's processes at once, as when the machine below
// it hangs, and returns when. Its network stays up.
func (h *Host) Freeze(ctx context.Context) (time.Time, error) {
	return h.kill(ctx, unix.SIGSTOP, everything)
}

// Thaw undoes Freeze. It is no error if the host has crashed meanwhile.
func (h *Host) Thaw(ctx context.Context) error {
	if !h.Up() {
		return nil
	}
	_, err := h.kill(ctx, unix.SIGCONT, everything)
	return err
}

// Start starts libvirtd or the agent again after its end.
func (h *Host) Start(ctx context.Context, p Process) error {
	switch p {
	case AgentProcess:
		return h.StartAgent(ctx)
	case LibvirtProcess:
		if _, err := h.Exec(ctx, "libvirtd", "--daemon"); err != nil {
			return h.withLog(err, "/var/log/libvirt/libvirtd.log")
		}
		return nil
	}
	return fmt.Errorf("%s: %s starts by other means", h.Name, p)
}

func (h *Host) killByFile(ctx context.Context, path string) error {
	pid, err := h.readPID(path)
	if err != nil {
		return err
	}
	if _, err := h.Exec(ctx, "kill", "-KILL", strconv.Itoa(pid)); err != nil {
		return err
	}
	return h.waitEnd(ctx, pid)
}

func (h *Host) readPID(path string) (int, error) {
	text, err := os.ReadFile(h.Path(path))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", h.Name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid < 2 {
		return 0, fmt.Errorf("%s: %s: no process number in %q", h.Name, path, text)
	}
	return pid, nil
}

func (h *Host) waitEnd(ctx context.Context, pid int) error {
	return poll(ctx, func() (bool, error) { return !h.runs(ctx, pid), nil }, "end of process %d on %s", pid, h.Name)
}

// runs tells whether the host has a process with that number.
func (h *Host) runs(ctx context.Context, pid int) bool {
	_, err := h.Exec(ctx, "test", "-d", fmt.Sprintf("/proc/%d", pid))
	return err == nil
}

// withLog adds the end of a log on the host to an error.
func (h *Host) withLog(err error, path string) error {
	text, readErr := os.ReadFile(h.Path(path))
	if readErr != nil || len(text) == 0 {
		return err
	}
	const most = 2000
	return fmt.Errorf("%w\n%s of %s ends:\n%s", err, path, h.Name, text[max(0, len(text)-most):])
}

// GuestDomain describes the lab's n-th guest, counting from 0, as it would be
// defined on this host: the copied kernel, a new disk in ImageDir of the given
// format, its address on the service network and a console log. It makes the
// disk; the caller changes the description as it likes and passes it to
// guest.DomainXML.
func (h *Host) GuestDomain(ctx context.Context, n int, name, diskFormat string) (guest.Domain, error) {
	d := DescribeGuest(n, name, diskFormat)
	template := guest.Artifacts{DiskTemplate: h.Path(filepath.Join(GuestDir, "disk.raw"))}
	if err := template.NewDisk(ctx, h.Path(d.Disk), diskFormat); err != nil {
		return guest.Domain{}, fmt.Errorf("%s: %w", h.Name, err)
	}
	return d, nil
}

// DescribeGuest describes the n-th guest without making its disk.
func DescribeGuest(n int, name, diskFormat string) guest.Domain {
	return guest.Domain{
		Name:       name,
		Kernel:     filepath.Join(GuestDir, "vmlinuz"),
		Initrd:     filepath.Join(GuestDir, "initrd.gz"),
		Disk:       filepath.Join(ImageDir, name+"."+diskFormat),
		DiskFormat: diskFormat,
		Bridge:     ServiceBridge,
		MAC:        fmt.Sprintf("52:54:00:77:01:%02x", n),
		Address:    GuestAddr(n),
		ConsoleLog: ConsolePath(name),
	}
}

// ConsolePath is where a host logs the console of the guest called name.
func ConsolePath(name string) string { return filepath.Join(ConsoleDir, name+".log") }

// Define has the host's virsh define a domain.
func (h *Host) Define(ctx context.Context, xml string) error {
	_, err := h.execInput(ctx, xml, "virsh", "-q", "-c", "qemu:///system", "define", "/dev/stdin")
	return err
}
