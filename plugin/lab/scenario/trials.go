// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/pki"
)

type undoing = func(context.Context) error

// full are file systems without room.
func (o *ordeal) full() []trial {
	c := config.Default().Agent
	fill := func(path string, files bool) func(context.Context, *lab.Host, couple) (undoing, error) {
		return func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) { return h.Fill(ctx, path, files) }
	}
	list := both(trial{
		name: "no byte left in the state directory", keeps: true, begin: fill(c.StateDir, false),
		during: func(ctx context.Context, h *lab.Host, _ couple) (string, error) {
			err := o.Agent(h).Diagnose(ctx, o.vm.Name, io.Discard)
			if err == nil || !strings.Contains(err.Error(), "no space left") {
				return "", fmt.Errorf("%w: diagnosis without room: %w", ErrFault, err)
			}
			return "a diagnosis is refused for want of room", nil
		},
	})
	list = append(list, both(trial{
		name: "no byte left in the run directory", keeps: true, lasts: 2 * time.Second, begin: fill(c.RunDir, false),
	})...)
	list = append(list, trial{
		name: "no byte left in the run directory when the agent ends", part: Backup, lasts: 2 * time.Second,
		begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
			undo, err := h.Fill(ctx, c.RunDir, false)
			if err != nil {
				return undo, err
			}
			if err := h.KillAgent(ctx); err != nil {
				return undo, err
			}
			return undo, o.StartAgent(ctx, h)
		},
	})
	return append(list, both(trial{
		name: "no file left in the run directory when a backup is to be made", lasts: 3 * time.Second,
		begin: func(ctx context.Context, h *lab.Host, p couple) (undoing, error) {
			undo, err := h.Fill(ctx, c.RunDir, true)
			if err != nil {
				return undo, err
			}
			_, err = o.vm.KillQEMU(ctx, p.backup)
			return undo, err
		},
		during: func(ctx context.Context, _ *lab.Host, p couple) (string, error) {
			status, err := o.Wait(ctx, p.primary, o.vm.Name, "the reason why there is no backup", servedLimit,
				func(s client.Status) (bool, error) { return s.Failure != "", nil })
			return fmt.Sprintf("%s says %q", p.primary.Name, status.Failure), err
		},
	})...)
}

// starved are agents without descriptors, memory and names.
func (o *ordeal) starved() []trial {
	list := both(trial{
		name: "no file descriptor left to the agent", keeps: true, lasts: 5 * time.Second,
		begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
			return h.ExhaustFiles(ctx, lab.AgentProcess)
		},
	})
	list = append(list, both(trial{
		name: "no file descriptor left to the agent when the network breaks", lasts: 3 * time.Second,
		begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
			undo, err := h.ExhaustFiles(ctx, lab.AgentProcess)
			if err == nil {
				err = o.cut(ctx, h)
			}
			return undo, err
		},
	})...)
	list = append(list, both(trial{
		name: "64 MiB of memory left to the agent", keeps: true, lasts: 5 * time.Second,
		begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
			return h.LimitMemory(ctx, lab.AgentProcess, 64<<20)
		},
	})...)
	list = append(list, both(trial{
		name: "no memory left to the agent, which the kernel kills", lasts: time.Second,
		begin: o.starve,
	})...)
	for _, late := range []time.Duration{4 * time.Second, 0} {
		name := fmt.Sprintf("names are told after %v when a backup is to be made", late)
		if late == 0 {
			name = "names are not told when a backup is to be made"
		}
		list = append(list, trial{
			name: name, part: Primary, lasts: 10 * time.Second,
			begin: func(ctx context.Context, h *lab.Host, p couple) (undoing, error) {
				undo, err := o.resolveSlowly(ctx, h, late)
				if err == nil {
					_, err = o.vm.KillQEMU(ctx, p.backup)
				}
				return undo, err
			},
		})
	}
	return list
}

// starve gives the agent so little memory that the kernel kills it, and then
// starts it again.
func (o *ordeal) starve(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
	pid, err := h.AgentPID()
	if err != nil {
		return nil, err
	}
	undo, err := h.LimitMemory(ctx, lab.AgentProcess, 64<<10)
	if err != nil {
		return undo, err
	}
	err = poll(ctx, servedLimit, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		_, _ = o.Agent(h).Domains(ctx) // which takes memory
		_, err := h.Exec(ctx, "test", "-d", fmt.Sprintf("/proc/%d", pid))
		return err != nil, nil
	})
	err = errors.Join(err, undo(context.WithoutCancel(ctx)))
	if err != nil {
		return nil, err
	}
	return nil, o.StartAgent(ctx, h)
}

// clocks are hosts whose clock is an hour off, by what that means to others: the
// certificates of the one are not valid for the other.
func (o *ordeal) clocks() []trial {
	off := func(name string, by time.Duration) []trial {
		return both(trial{
			name: name, lasts: 3 * time.Second,
			begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
				ca, err := o.CA()
				if err != nil {
					return nil, err
				}
				from := time.Now().Add(by)
				own, err := ca.Issue(pki.Request{
					Host: h.Name, Names: []string{h.LoggingAddr().String()}, NotBefore: from, NotAfter: from.Add(by.Abs() / 2),
				})
				if err != nil {
					return nil, err
				}
				undo := func(context.Context) error { return h.Certify() }
				if err := h.InstallPKI(ca.PEM(), own); err != nil {
					return undo, err
				}
				return undo, o.cut(ctx, h)
			},
			during: func(ctx context.Context, h *lab.Host, _ couple) (string, error) {
				// It lasts, so that nobody may make a pair meanwhile.
				if err := Pause(ctx, 3*time.Second); err != nil {
					return "", err
				}
				if c, ok := o.whole(o.ask(ctx)); ok {
					return "", fmt.Errorf("%w: %s and %s are a pair, though one believes the other's certificates no more",
						ErrFault, c.primary.Name, c.backup.Name)
				}
				return "no pair while the certificates of " + h.Name + " do not count", nil
			},
		})
	}
	return append(off("certificates that are valid in an hour, by a clock that is fast", time.Hour),
		off("certificates that ended, by a clock that is slow", -2*time.Hour)...)
}

// crowds come to each port, with garbage.
func (o *ordeal) crowds() []trial {
	c := config.Default()
	var list []trial
	tcp := func(name, listen string) {
		list = append(list, both(trial{
			name: fmt.Sprintf("%d connections with garbage to %s", flood, name), keeps: true,
			begin: func(ctx context.Context, h *lab.Host, p couple) (undoing, error) {
				from, to := p.other(h), o.address(h, listen)
				_, err := floodWith(ctx, flood, func(ctx context.Context) (net.Conn, error) { return from.Dial(ctx, to) })
				return nil, err
			},
		})...)
	}
	local := func(name, path string) {
		list = append(list, both(trial{
			name: fmt.Sprintf("%d connections with garbage to %s", flood, name), keeps: true,
			begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
				_, err := floodUnix(ctx, h.Path(path), flood)
				return nil, err
			},
		})...)
	}
	tcp("the channel", c.Channel.Listen)
	tcp("the metrics", metricsPort)
	tcp("the page", webPort)
	local("the plugins' socket", c.Agent.PluginSocket)
	local("the command line's socket", c.Agent.AdminSocket)
	return append(list, both(trial{
		name: fmt.Sprintf("%d datagrams of garbage to the heartbeats", flood), keeps: true,
		begin: func(ctx context.Context, h *lab.Host, p couple) (undoing, error) {
			conn, err := dialUDP(p.other(h), h)
			if err != nil {
				return nil, err
			}
			defer func() { _ = conn.Close() }()
			for i := range flood {
				_, _ = conn.Write(garbage()) // the queue may be full
				if i%100 == 99 {
					if err := Pause(ctx, time.Millisecond); err != nil {
						return nil, err
					}
				}
			}
			return nil, nil
		},
	})...)
}

// paths carry heartbeats, and nothing of the channel: a firewall that lost its
// state, and a smaller MTU than both ends believe.
func (o *ordeal) paths() []trial {
	var list []trial
	for _, p := range []struct {
		name    string
		weather lab.Weather
	}{
		{"TCP is lost on the logging network", lab.Weather{NoTCP: true}},
		{"packets of more than 300 bytes are lost on the logging network", lab.Weather{Largest: 300}},
	} {
		var began time.Time
		list = append(list, both(trial{
			name: p.name, lasts: 15 * time.Second,
			begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
				began = time.Now()
				wire, err := h.Disturb(ctx, lab.Logging, p.weather, p.weather)
				if err != nil {
					return nil, err
				}
				return wire.Close, nil
			},
			during: func(ctx context.Context, _ *lab.Host, c couple) (string, error) {
				decided, err := o.Wait(ctx, c.primary, o.vm.Name, "the end of a pair whose channel carries nothing", pathLimit,
					func(s client.Status) (bool, error) { return s.State != "protected", nil })
				if err != nil {
					return "", err
				}
				told := fmt.Sprintf("%s is %s after %s ms", c.primary.Name, decided.State, ms(time.Since(began)))
				_, err = o.traffic.WaitReply(ctx, time.Now(), pathLimit)
				return told, err
			},
		})...)
	}
	return list
}

// pathLimit is how soon a pair must end whose channel carries nothing, and the
// guest must answer then.
const pathLimit = 6 * time.Second

// stops are processes that do not run for a while.
func (o *ordeal) stops() []trial {
	var list []trial
	for _, p := range []struct {
		name    string
		process lab.Process
		keeps   bool
	}{
		{"the agent", lab.AgentProcess, false},
		{"libvirtd", lab.LibvirtProcess, true},
		{"QEMU", lab.QEMUProcess(o.vm.Name), false},
	} {
		list = append(list, both(trial{
			name: fmt.Sprintf("%s does not run for %v", p.name, stopped), lasts: stopped, keeps: p.keeps,
			begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
				_, undo, err := o.stop(ctx, h, p.process)
				return undo, err
			},
		})...)
	}
	for i := range list {
		t := &list[i]
		if !strings.HasPrefix(t.name, "QEMU") {
			continue
		}
		// A guest that does not run does not answer; nobody is dead, so nobody
		// takes its place. A backup that does not run is replaced.
		t.silent, t.keeps = t.part == Primary, t.part == Primary
		begin, from := t.begin, 0
		t.begin = func(ctx context.Context, h *lab.Host, c couple) (undoing, error) {
			from = logSize(h)
			return begin(ctx, h, c)
		}
		t.during = func(ctx context.Context, h *lab.Host, _ couple) (string, error) {
			return o.says(ctx, h, from, "QEMU does not run")
		}
	}
	return list
}

// damage is done to files that the agent keeps.
func (o *ordeal) damage() []trial {
	c := config.Default()
	spool := func(h *lab.Host, file string) ([]string, error) {
		found, err := filepath.Glob(h.Path(filepath.Join(c.Agent.RunDir, "log-"+o.vm.UUID.String()+"-*", file)))
		if err == nil && len(found) == 0 {
			err = fmt.Errorf("%w: no log is kept on %s", ErrFault, h.Name)
		}
		return found, err
	}
	var list []trial
	// restart damages something while the agent is down, in order, as for an
	// upgrade.
	restart := func(name string, harm func(h *lab.Host) error) trial {
		return trial{name: name, part: Backup, begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
			if err := h.StopAgent(ctx); err != nil {
				return nil, err
			}
			return nil, errors.Join(harm(h), o.StartAgent(ctx, h))
		}}
	}
	last := func(h *lab.Host, harm func(path string) error) error {
		segments, err := spool(h, "*.rrlog")
		if err != nil {
			return err
		}
		return harm(slices.Max(segments))
	}
	unharmed := restart("the log of the backup as it was", func(*lab.Host) error { return nil })
	unharmed.keeps = true
	list = append(list, unharmed,
		restart("the log of the backup is cut short", func(h *lab.Host) error { return last(h, halve) }),
		restart("the log of the backup is altered", func(h *lab.Host) error { return last(h, scramble) }),
		restart("the log of the backup is empty", func(h *lab.Host) error {
			return last(h, func(path string) error { return os.Truncate(path, 0) })
		}),
		restart("the log of the backup is gone", func(h *lab.Host) error { return last(h, os.Remove) }),
		restart("a foreign file in the log of the backup", func(h *lab.Host) error {
			dirs, err := spool(h, "")
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dirs[0], "00000000000000000007.rrlog"), garbage(), 0o600)
		}),
		restart("files in the place of sockets", func(h *lab.Host) error {
			return errors.Join(os.WriteFile(h.Path(c.Agent.PluginSocket), garbage(), 0o666), os.WriteFile(h.Path(c.Agent.AdminSocket), garbage(), 0o600))
		}))
	list[len(list)-1].keeps = true

	// At a start, files that cannot be understood are refused by name.
	for _, f := range []struct{ name, path string }{
		{"ftvirt.toml", config.DefaultPath}, {"the authority's certificate", c.Channel.CACert}, {"the certificate", c.Channel.ServerCert}, {"the key", c.Channel.ServerKey},
	} {
		list = append(list, trial{
			name: f.name + " is cut short when the agent starts", part: Backup,
			begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
				return o.refusesToStart(ctx, h, f.path)
			},
		})
	}
	for _, f := range []struct{ name, path string }{
		{"the authority's certificate", c.Channel.CACert}, {"the certificate", c.Channel.ServerCert}, {"the key", c.Channel.ServerKey},
	} {
		list = append(list, both(trial{
			name: f.name + " is cut short under the agent", keeps: true, lasts: 2 * time.Second,
			begin: func(_ context.Context, h *lab.Host, _ couple) (undoing, error) {
				undo := func(context.Context) error { return h.Certify() }
				return undo, halve(h.Path(f.path))
			},
		})...)
	}
	list = append(list, both(trial{
		name: "garbage among the diagnoses", keeps: true,
		begin: func(ctx context.Context, h *lab.Host, _ couple) (undoing, error) {
			dir := h.Path(filepath.Join(c.Agent.StateDir, "diagnosis"))
			undo := func(context.Context) error { return os.RemoveAll(dir) }
			for epoch := range 3 {
				own := filepath.Join(dir, fmt.Sprintf("%s-%020d", o.vm.UUID, epoch))
				if err := errors.Join(os.MkdirAll(own, 0o700), os.WriteFile(filepath.Join(own, "report.json"), garbage(), 0o600)); err != nil {
					return undo, err
				}
			}
			var archive bytes.Buffer
			return undo, o.Agent(h).Diagnose(ctx, o.vm.Name, &archive)
		},
	})...)
	for _, what := range []struct {
		name string
		harm func(path string) error
	}{{"cut short", halve}, {"altered", scramble}, {"empty", func(path string) error { return os.Truncate(path, 0) }}} {
		list = append(list, o.misread("the arbiter's record is "+what.name+" for the backup", what.harm, func(e plugin.Epoch) string {
			return filepath.Join(o.vm.UUID.String(), fmt.Sprintf("epoch-%08d.open", e))
		}), o.misread("the mark of the arbiter's storage is "+what.name+" for the backup", what.harm, func(plugin.Epoch) string {
			return "ftvirt-arbiter.json"
		}))
	}
	return list
}

// refusesToStart demands that the agent does not start with half a file, and says
// which. Undoing it starts the agent with all of it.
func (o *ordeal) refusesToStart(ctx context.Context, h *lab.Host, path string) (undoing, error) {
	before, err := os.ReadFile(h.Path(path))
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(h.Path(path))
	if err != nil {
		return nil, err
	}
	if err := h.StopAgent(ctx); err != nil {
		return nil, err
	}
	undo := func(ctx context.Context) error {
		return errors.Join(os.WriteFile(h.Path(path), before, info.Mode().Perm()), o.StartAgent(ctx, h))
	}
	if err := halve(h.Path(path)); err != nil {
		return undo, err
	}
	err = h.StartAgent(ctx)
	switch {
	case err == nil:
		_ = h.StopAgent(ctx)
		return undo, fmt.Errorf("%w: the agent started with half of %s", ErrFault, path)
	case !strings.Contains(err.Error(), path):
		return undo, fmt.Errorf("%w: the agent does not say that %s is bad: %w", ErrFault, path, err)
	}
	return undo, nil
}

// misread lets the backup's host see a damaged file of the arbiter when the
// primary dies. Nobody may go on with the guest before it is whole again: it is
// not known who may.
func (o *ordeal) misread(name string, harm func(string) error, file func(plugin.Epoch) string) trial {
	var from int
	return trial{
		name: name, part: Backup, silent: true, lasts: 3 * time.Second,
		begin: func(ctx context.Context, h *lab.Host, c couple) (undoing, error) {
			const own = "/tmp/ftvirt-lab-arbiter"
			if _, err := h.Exec(ctx, "/bin/sh", "-euc", `rm -rf "$2"; cp -a "$1" "$2"`, "sh", lab.ArbiterDir, own); err != nil {
				return nil, err
			}
			if err := harm(filepath.Join(h.Path(own), file(c.epoch))); err != nil {
				return nil, err
			}
			if _, err := h.Exec(ctx, "mount", "--bind", own, lab.ArbiterDir); err != nil {
				return nil, err
			}
			undo := func(ctx context.Context) error {
				_, err := h.Exec(ctx, "umount", "-l", lab.ArbiterDir)
				return err
			}
			from = logSize(h)
			_, err := o.vm.KillQEMU(ctx, c.primary)
			return undo, err
		},
		during: func(ctx context.Context, h *lab.Host, _ couple) (string, error) {
			told, err := o.says(ctx, h, from, "msg=arbiter")
			if err != nil {
				return "", err
			}
			if err := Pause(ctx, 2*time.Second); err != nil {
				return "", err
			}
			status, err := o.Agent(h).StatusOf(ctx, o.vm.Name)
			if err != nil {
				return "", err
			}
			if status.State == stateLive || status.State == stateUnprotected {
				return "", fmt.Errorf("%w: it went on without knowing whether it may: %s", ErrFault, status)
			}
			return told + ", and waits", nil
		},
	}
}

// halve takes the second half of a file away.
func halve(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.Truncate(path, info.Size()/2)
}

// scramble turns bits all over a file.
func scramble(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for i := len(text) / 3; i < len(text); i += 7 {
		text[i] ^= 0x55
	}
	return os.WriteFile(path, text, 0o600)
}
