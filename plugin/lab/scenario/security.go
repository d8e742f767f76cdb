// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/pki"
)

// flood is how many connections or datagrams of garbage each port gets.
const flood = 10_000

// ErrSecurity is wrapped when an attack had an effect.
var ErrSecurity = errors.New("an attack had an effect")

// Security attacks a protected pair from a third host, which the authority knows,
// and from a local user, and demands that nothing changes.
func Security(ctx context.Context, o Options) error {
	o.HostCount = 3
	return Run(ctx, "security", o, security)
}

// breach tells that an attack had an effect, and what was seen beside it, if
// anything.
func breach(seen error, format string, args ...any) error {
	return errors.Join(fmt.Errorf("%w: %s", ErrSecurity, fmt.Sprintf(format, args...)), seen)
}

// siege is the state of the run: a protected guest and the attacker.
type siege struct {
	*run
	vm       *VM
	a, b, c  *lab.Host // primary, backup, attacker
	epoch    plugin.Epoch
	ca       *pki.CA
	traffic  *Traffic
	captured *heartbeats
	sources  int // addresses that the attacker has used
}

// attack is one thing that is tried. What it returns is told; its error ends the
// run.
type attack struct {
	name string
	try  func(context.Context) (string, error)
}

func security(ctx context.Context, r *run) (string, error) {
	hosts := r.Hosts()
	s := &siege{run: r, a: hosts[0], b: hosts[1], c: hosts[2]}
	if err := s.prepare(ctx); err != nil {
		return "", err
	}
	defer s.traffic.Close()
	defer s.captured.stop()
	cases := 0
	for _, list := range [][]attack{s.strangers(), s.liars(), s.floods(), s.locals(), s.last()} {
		for _, try := range list {
			limited, cancel := context.WithTimeout(ctx, protectTimeout)
			told, err := try.try(limited)
			if err == nil && s.captured.running() {
				err = s.unchanged(limited)
			}
			cancel()
			if err != nil {
				return fmt.Sprintf("cases=%d", cases), fmt.Errorf("%s: %w", try.name, err)
			}
			cases++
			r.say("ok: %s: %s", try.name, told)
		}
	}
	if err := s.traffic.Stop(); err != nil {
		return "", err
	}
	replies, lost, duplicated := s.traffic.Counts()
	if lost+duplicated != 0 {
		return "", fmt.Errorf("%w: the client lost %d replies and had %d twice", ErrSecurity, lost, duplicated)
	}
	return fmt.Sprintf("cases=%d replies=%d", cases, replies), nil
}

func (s *siege) prepare(ctx context.Context) error {
	var err error
	if s.ca, err = s.CA(); err != nil {
		return err
	}
	if s.vm, err = s.StartVM(ctx, s.a, s.b, 0, "guest"); err != nil {
		return err
	}
	if s.traffic, err = s.vm.Traffic(ctx); err != nil {
		return err
	}
	status, err := s.vm.Protect(ctx, s.a, s.b)
	if err != nil {
		return err
	}
	s.epoch = status.Epoch
	s.captured, err = captureHeartbeats(s.b, s.a.LoggingAddr())
	s.say("a guest is protected: primary on %s, backup on %s; %s attacks", s.a.Name, s.b.Name, s.c.Name)
	return err
}

// unchanged demands that the pair is as it was, and that its client is served.
func (s *siege) unchanged(ctx context.Context) error {
	for _, h := range []*lab.Host{s.a, s.b} {
		st, err := s.Agent(h).StatusOf(ctx, s.vm.Name)
		if err != nil {
			return err
		}
		if st.State != stateProtected || st.Epoch != s.epoch {
			return fmt.Errorf("%w: %s", ErrSecurity, st)
		}
	}
	_, err := s.traffic.WaitReply(ctx, time.Now(), liveTimeout)
	return err
}

// certificate issues one of the lab's authority for the attacker.
func (s *siege) certificate(r pki.Request) (*pki.Host, error) { return s.ca.Issue(r) }

// strangers have no certificate of the host that they say they are.
func (s *siege) strangers() []attack {
	now := time.Now()
	list := []attack{
		s.impostor("certificate of a foreign authority", func() (*pki.Host, error) {
			foreign, err := pki.NewCA("a foreign authority")
			if err != nil {
				return nil, err
			}
			return foreign.Issue(pki.Request{Host: s.a.Name})
		}),
		s.impostor("expired certificate", func() (*pki.Host, error) {
			return s.certificate(pki.Request{Host: s.a.Name, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(-time.Minute)})
		}),
		s.impostor("certificate that is not yet valid", func() (*pki.Host, error) {
			return s.certificate(pki.Request{Host: s.a.Name, NotBefore: now.Add(24 * time.Hour)})
		}),
		s.impostor("certificate of another host of the authority", func() (*pki.Host, error) {
			return s.certificate(pki.Request{Host: s.c.Name})
		}),
		s.impostor("certificate to serve with, used to call", func() (*pki.Host, error) {
			h, err := s.certificate(pki.Request{Host: s.a.Name})
			if err == nil {
				h.ClientCert, h.ClientKey = h.ServerCert, h.ServerKey
			}
			return h, err
		}),
		{"revoked certificate", s.revoked},
		{"no certificate", func(ctx context.Context) (string, error) {
			return s.mustFail(ctx, s.bare(noCertificate), s.session(s.a, s.b))
		}},
		{"TLS 1.2", func(ctx context.Context) (string, error) {
			h, err := s.certificate(pki.Request{Host: s.a.Name})
			if err != nil {
				return "", err
			}
			i, err := s.intruder(h)
			if err != nil {
				return "", err
			}
			return s.mustFail(ctx, i.outdated(), s.session(s.a, s.b))
		}},
		{"plaintext", func(ctx context.Context) (string, error) {
			return s.mustFail(ctx, s.bare(plaintext), s.session(s.a, s.b))
		}},
		{"agent whose certificate is of a foreign authority, taken up and given up without a restart", s.falseServer},
	}
	return list
}

// impostor says that it is the primary's host.
func (s *siege) impostor(name string, certificate func() (*pki.Host, error)) attack {
	return attack{name, func(ctx context.Context) (string, error) {
		h, err := certificate()
		if err != nil {
			return "", err
		}
		i, err := s.intruder(h)
		if err != nil {
			return "", err
		}
		return s.mustFail(ctx, i, s.session(s.a, s.b))
	}}
}

func (s *siege) session(from, to *lab.Host) channel.Hello {
	return channel.Hello{Purpose: channel.PurposeSession, From: from.Name, To: to.Name, Domain: s.vm.UUID, Epoch: s.epoch, Target: "resume"}
}

// mustFail demands that the backup's agent refuses the connection, quickly, and
// says so in its log once, though it is tried three times.
func (s *siege) mustFail(ctx context.Context, i *intruder, h channel.Hello) (string, error) {
	return s.mustFailWith(ctx, i, h, 0)
}

// mustFailWith demands a certain answer, if code is not zero.
func (s *siege) mustFailWith(ctx context.Context, i *intruder, h channel.Hello, code channel.RefuseCode) (string, error) {
	cfg := channel.DefaultConfig()
	var last error
	for range 3 {
		began := time.Now()
		conn, _, err := channel.Dial(ctx, i, s.channelOf(s.b), h, cfg)
		if err == nil {
			_ = conn.Close()
			return "", fmt.Errorf("%w: the connection was welcomed", ErrSecurity)
		}
		if d := time.Since(began); d > cfg.HandshakeTimeout/2 {
			return "", fmt.Errorf("%w: it was refused after %v only: %w", ErrSecurity, d, err)
		}
		var refused *channel.RefusedError
		if code != 0 && (!errors.As(err, &refused) || refused.Code != code) {
			return "", fmt.Errorf("%w: refused with %w, want code %d", ErrSecurity, err, code)
		}
		last = err
	}
	return last.Error(), s.loggedOnce(ctx, i)
}

// loggedOnce demands one line about the intruder in the log of the backup's agent.
func (s *siege) loggedOnce(ctx context.Context, i *intruder) error {
	var lines int
	err := poll(ctx, agentTimeout, func(context.Context) (bool, error) {
		text, err := s.b.AgentLog()
		lines = strings.Count(text, fmt.Sprintf("peer=%s:", i.from))
		return lines > 0, err
	})
	if err != nil || lines != 1 {
		return breach(err, "%d lines about it in the log, want one", lines)
	}
	return nil
}

func (s *siege) revoked(ctx context.Context) (string, error) {
	h, err := s.certificate(pki.Request{Host: s.a.Name})
	if err != nil {
		return "", err
	}
	list, err := s.ca.Revoke(h)
	if err != nil {
		return "", err
	}
	path := s.b.Path(config.Default().Channel.CRL)
	if err := os.WriteFile(path, list, 0o644); err != nil {
		return "", err
	}
	defer func() { _ = os.Remove(path) }()
	i, err := s.intruder(h)
	if err != nil {
		return "", err
	}
	return s.mustFail(ctx, i, s.session(s.a, s.b))
}

// falseServer makes the backup's host show a certificate that nobody trusts, and
// asks the attacker's own agent, which is an honest one, to call it.
func (s *siege) falseServer(ctx context.Context) (string, error) {
	if err := s.defineHostile(ctx, s.c, "caller"); err != nil {
		return "", err
	}
	call := func() (string, error) {
		out, err := s.c.Exec(ctx, filepath.Join(lab.BinDir, "ftvirt"), "check", "caller", "--peer", s.b.Name)
		if err != nil {
			out += err.Error()
		}
		return out, ctx.Err()
	}
	before, err := call()
	if err != nil || strings.Contains(before, "certificate") {
		return "", breach(err, "before: %s", before)
	}
	foreign, err := pki.NewCA("a foreign authority")
	if err != nil {
		return "", err
	}
	impostor, err := foreign.Issue(pki.Request{Host: s.b.Name})
	if err != nil {
		return "", err
	}
	if err := s.b.InstallPKI(s.ca.PEM(), impostor); err != nil {
		return "", err
	}
	told, err := call()
	if err := errors.Join(err, s.b.Certify()); err != nil {
		return "", err
	}
	if !strings.Contains(told, "certificate") {
		return "", fmt.Errorf("%w: the false agent was believed: %s", ErrSecurity, told)
	}
	after, err := call()
	if err != nil || strings.Contains(after, "certificate") {
		return "", breach(err, "with its own certificate again: %s", after)
	}
	for line := range strings.Lines(told) {
		if strings.Contains(line, "certificate") {
			return strings.TrimSpace(line), nil
		}
	}
	return "", nil
}

// liars are known to the authority, but say what is not so.
func (s *siege) liars() []attack {
	own := func(host string) (*intruder, error) {
		h, err := s.certificate(pki.Request{Host: host})
		if err != nil {
			return nil, err
		}
		return s.intruder(h)
	}
	lie := func(name, host string, code channel.RefuseCode, h func() channel.Hello) attack {
		return attack{name, func(ctx context.Context) (string, error) {
			i, err := own(host)
			if err != nil {
				return "", err
			}
			return s.mustFailWith(ctx, i, h(), code)
		}}
	}
	return []attack{
		lie("HELLO for another host", s.c.Name, channel.RefuseHost, func() channel.Hello {
			h := s.session(s.c, s.b)
			h.To = s.a.Name
			return h
		}),
		lie("host that the configuration does not name", "hostx", channel.RefuseHost, func() channel.Hello {
			h := s.session(s.c, s.b)
			h.From = "hostx"
			return h
		}),
		{"session of a pair that is another host's", func(ctx context.Context) (string, error) {
			return s.refusedBy(ctx, own, s.session(s.c, s.b))
		}},
		{"tunnel into a backup that is another host's", func(ctx context.Context) (string, error) {
			h := s.session(s.c, s.b)
			h.Purpose, h.Target = channel.PurposeMigrate, ""
			return s.refusedBy(ctx, own, h)
		}},
		{"new epoch that the arbiter does not know", func(ctx context.Context) (string, error) {
			h := s.session(s.c, s.b)
			h.Epoch, h.Target = s.epoch+1, ""
			return s.refusedBy(ctx, own, h)
		}},
		{"old protocol version", func(ctx context.Context) (string, error) {
			i, err := own(s.c.Name)
			if err != nil {
				return "", err
			}
			if err := i.oldVersion(ctx, s.channelOf(s.b), s.b.Name); err != nil {
				return "", err
			}
			return "REFUSE with the code of versions", s.loggedOnce(ctx, i)
		}},
	}
}

// refusedBy demands a refusal that is for honest hosts too, so the log need not
// tell of it.
func (s *siege) refusedBy(ctx context.Context, own func(string) (*intruder, error), h channel.Hello) (string, error) {
	i, err := own(s.c.Name)
	if err != nil {
		return "", err
	}
	conn, _, err := channel.Dial(ctx, i, s.channelOf(s.b), h, channel.DefaultConfig())
	if err == nil {
		_ = conn.Close()
	}
	var refused *channel.RefusedError
	if !errors.As(err, &refused) || refused.Code != channel.RefuseEpoch {
		return "", breach(err, "want a refusal of the epoch")
	}
	return err.Error(), nil
}

// channelOf is where a host's agent accepts others.
func (s *siege) channelOf(h *lab.Host) string {
	return h.LoggingAddr().String() + config.Default().Channel.Listen
}

// locals are users of the backup's host, and what they can make libvirt say.
func (s *siege) locals() []attack {
	run := config.Default().Agent
	return []attack{
		{"admin socket, as another user", func(ctx context.Context) (string, error) {
			info, err := os.Stat(s.b.Path(run.AdminSocket))
			if err != nil {
				return "", err
			}
			if info.Mode().Perm() != 0o600 {
				return "", fmt.Errorf("%w: its mode is %v", ErrSecurity, info.Mode())
			}
			_, err = s.b.Exec(ctx, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
				filepath.Join(lab.BinDir, "ftvirt"), "status")
			if err == nil || !strings.Contains(err.Error(), "permission denied") {
				return "", breach(err, "want that permission is denied")
			}
			return "permission denied", nil
		}},
		{"private files and directories", s.modes},
		{"plugin socket, as a process that is no QEMU", s.falsePlugin},
		{fmt.Sprintf("%d connections with garbage to the plugin socket", flood), func(ctx context.Context) (string, error) {
			before, err := s.b.AgentLog()
			if err != nil {
				return "", err
			}
			told, err := floodUnix(ctx, s.b.Path(run.PluginSocket), flood)
			if err != nil {
				return "", err
			}
			after, err := s.b.AgentLog()
			if n := strings.Count(after[len(before):], "a plugin was refused"); err == nil && n > 1 {
				err = fmt.Errorf("%w: %d lines in the log", ErrSecurity, n)
			}
			return told, err
		}},
		{"commands in the names of domains", s.names},
		{"a QEMU that its guest has taken over", s.confined},
	}
}

// modes looks at what the agent leaves on its host's disks and in /run.
func (s *siege) modes(_ context.Context) (string, error) {
	c := config.Default().Agent
	seen := 0
	for _, h := range []*lab.Host{s.a, s.b} {
		for _, root := range []string{c.RunDir, c.StateDir, logDir} {
			err := filepath.Walk(h.Path(root), func(path string, info os.FileInfo, err error) error {
				if err != nil {
					return err
				}
				seen++
				mode, allowed := info.Mode().Perm(), os.FileMode(0o700)
				switch path {
				case h.Path(c.RunDir):
					allowed = 0o711 // QEMU's user passes through
				case h.Path(c.PluginSocket):
					allowed = 0o666 // the process at the other end is looked at
				}
				if mode&^allowed != 0 {
					return fmt.Errorf("%w: %s is %v on %s", ErrSecurity, path, info.Mode(), h.Name)
				}
				return nil
			})
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return "", err
			}
		}
	}
	return fmt.Sprintf("%d are their owner's alone", seen), nil
}

// hostile are names that a shell, a format or a path might take for more.
var hostile = []string{
	"$(touch pwned)", "`touch pwned`", "a;touch pwned", "a|touch pwned", "a'\"b", "--help", "-rf", "%s%n%d", "..", "<x>&amp;", "a\\b", "*", "ä☃",
}

// started is how many of them are started as well, which takes a second each.
const started = 4

// names uses domains that are called like commands, through libvirt's hook, the
// agent and the command line.
func (s *siege) names(ctx context.Context) (string, error) {
	accepted := 0
	for i, name := range hostile {
		if err := s.defineHostile(ctx, s.c, name); err != nil {
			s.say("libvirt itself refuses %q", name)
			continue
		}
		accepted++
		ftvirt := func(args ...string) (string, error) {
			return s.c.Exec(ctx, append([]string{filepath.Join(lab.BinDir, "ftvirt")}, args...)...)
		}
		if out, err := ftvirt("enable", "--peer", s.a.Name, "--", name); err != nil {
			return "", fmt.Errorf("enable %q: %s: %w", name, out, err)
		}
		out, err := ftvirt("status", "-o", "json", "--", name)
		if err != nil || !strings.Contains(out, `"domain"`) {
			return "", fmt.Errorf("status of %q: %s: %w", name, out, err)
		}
		if i >= started {
			continue
		}
		// The hook reads it, libvirt and the agent start and end it.
		if _, err := s.c.Virsh(ctx, "start", "--paused", "--domain", name); err != nil {
			return "", fmt.Errorf("start %q: %w", name, err)
		}
		if _, err := s.c.Virsh(ctx, "destroy", "--domain", name); err != nil {
			return "", fmt.Errorf("destroy %q: %w", name, err)
		}
	}
	if out, err := s.c.Exec(ctx, "find", "/", "-xdev", "-name", "pwned", "-not", "-path", "/proc/*"); err != nil || out != "" {
		return "", breach(err, "a command was run: %s", out)
	}
	return fmt.Sprintf("%d of %d names were defined and made ready as names, %d started and ended", accepted, len(hostile), started), nil
}

// defineHostile defines a domain without disks.
func (s *siege) defineHostile(ctx context.Context, h *lab.Host, name string) error {
	text, err := guest.DomainXML(guest.Domain{
		Name: name, Kernel: filepath.Join(lab.GuestDir, "vmlinuz"), Initrd: filepath.Join(lab.GuestDir, "initrd.gz"), MemoryMiB: 128,
	})
	if err != nil {
		return err
	}
	return h.Define(ctx, text)
}

// last is what ends the pair.
func (s *siege) last() []attack {
	return []attack{{"heartbeats of a dead host, said again", func(ctx context.Context) (string, error) {
		lines := func() (int, error) {
			text, err := s.b.AgentLog()
			return strings.Count(text, `msg="a heartbeat was refused" from=`+s.c.LoggingAddr().String()+" "), err
		}
		earlier, err := lines()
		if err != nil {
			return "", err
		}
		replay, err := s.captured.replay(ctx, s.c, s.b)
		if err != nil {
			return "", err
		}
		defer replay.stop()
		s.captured.stop() // which tells that the pair is to change now
		killed := time.Now()
		if err := s.a.Crash(ctx); err != nil {
			return "", err
		}
		before := client.Status{Epoch: s.epoch}
		live, err := s.vm.waitLive(ctx, s.b, before, killed)
		if err != nil {
			return "", fmt.Errorf("%w: the dead host counts as alive: %w", ErrSecurity, err)
		}
		if _, err := s.traffic.WaitReply(ctx, killed, liveTimeout); err != nil {
			return "", err
		}
		if live > longestGap {
			return "", fmt.Errorf("%w: the backup went live after %v only", ErrSecurity, live)
		}
		if told, err := lines(); err != nil || told == 0 || told > earlier+1 {
			return "", breach(err, "%d lines about it in the log, %d of them from before, want one", told, earlier)
		}
		return fmt.Sprintf("%d were captured and said %d times; the backup went live %s ms after the crash", s.captured.count(), replay.count(), ms(live)), nil
	}}}
}
