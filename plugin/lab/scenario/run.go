// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// Options are those of the demo and of the soak runs.
type Options struct {
	// Name of the lab.
	Name string
	// Bin has ftvirt, ftvirt-hook and ftvirt.so, GuestDir the built guest.
	Bin, GuestDir string
	// DebianDir has the built Debian guest, of Real and of the benchmark.
	DebianDir string
	// HostCount is the number of hosts; 0 means two.
	HostCount int
	// SharedImages has all hosts keep their disks and replicas in one directory, in
	// chaos all the time.
	SharedImages bool
	// Keep leaves the lab up at the end.
	Keep bool
	// Evidence is where logs go when something fails, or always with Logs.
	Evidence string
	Logs     bool
	// Rounds is the number of rounds of a soak run.
	Rounds int
	// Only, if not nil, selects the cases of the faults, and the steps of chaos, by
	// the names of faults.
	Only *regexp.Regexp
	// Seed and Length are what chaos is made of and how long it lasts, and for how
	// long the benchmark's guests work; 0 is as long as is usual.
	Seed   uint64
	Length time.Duration
	// Quick, Parts, Sources and Report are of the benchmark: whether it is the
	// short one, which parts of it to run, all if none is named, the C files that
	// its guest compiles, and where tables, JSON and plots go.
	Quick           bool
	Parts           []string
	Sources, Report string
	// COLO has an older QEMU, as unpacked from Debian's packages.
	COLO string
	// Out takes what people read.
	Out io.Writer
}

// run is one run of the demo or of a soak: a lab and what is told of it.
type run struct {
	Options
	*Bed
	configure func(*config.Config)
	guest     *guest.Artifacts // nil is the lab's own
	start     time.Time
	mu        sync.Mutex
}

// Run runs a scenario in a lab of its own and prints its RESULT line, which is
// the last thing that it prints: name=ok with what the scenario returned, or
// name=failed with the reason.
func Run(ctx context.Context, name string, o Options, scenario func(context.Context, *run) (string, error)) error {
	// The scenario says when there is a backup.
	manual := func(c *config.Config) { c.Protect.Auto = false }
	return (&run{Options: o, configure: manual, start: time.Now()}).run(ctx, name, scenario)
}

func (r *run) run(ctx context.Context, name string, scenario func(context.Context, *run) (string, error)) error {
	return r.report(name, func() (string, error) { return r.inLab(ctx, name, scenario) })
}

// report prints the RESULT line of what the scenario returns.
func (r *run) report(name string, scenario func() (string, error)) error {
	figures, err := scenario()
	if err != nil {
		r.say("FAILED: %v", err)
		if figures != "" {
			figures = " " + figures
		}
		_, _ = fmt.Fprintf(r.Out, "RESULT %s=failed%s reason=%q\n", name, figures, oneLine(err))
		return err
	}
	_, err = fmt.Fprintf(r.Out, "RESULT %s=ok %s\n", name, figures)
	return err
}

func (r *run) inLab(ctx context.Context, name string, scenario func(context.Context, *run) (string, error)) (figures string, err error) {
	if r.guest == nil {
		artifacts, err := guest.Build(ctx, r.GuestDir)
		if err != nil {
			return "", err
		}
		r.guest = &artifacts
	}
	r.say("starting lab %s: %d hosts with their own libvirtd and ftvirt agent, and a client", r.Name, max(r.HostCount, 2))
	r.Bed, err = Up(ctx, lab.Options{
		Name: r.Name, Hosts: r.HostCount, Bin: r.Bin, Guest: *r.guest, Ephemeral: !r.Keep, SharedImages: r.SharedImages,
		Configure: func(c *config.Config) {
			c.Replay.LogDir = logDir
			r.configure(c)
		},
	})
	if err != nil {
		return "", err
	}
	defer func() {
		if (err != nil || r.Logs) && ctx.Err() == nil {
			r.keepEvidence(context.WithoutCancel(ctx), name)
		}
		if r.Keep {
			r.say("the lab stays up: 'ftvirt lab exec --name %[1]s HOST COMMAND' works in it, 'ftvirt lab down --name %[1]s' ends it", r.Name)
			return
		}
		r.say("taking the lab down")
		err = errors.Join(err, r.Down(context.WithoutCancel(ctx)))
	}()
	r.say("lab is up")
	figures, err = scenario(ctx, r)
	if ctx.Err() != nil {
		err = fmt.Errorf("interrupted: %w", context.Cause(ctx))
	}
	return figures, err
}

// say prints a step with its time since the start.
func (r *run) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	_, _ = fmt.Fprintf(r.Out, "[%7.2f s] %s\n", time.Since(r.start).Seconds(), strings.ReplaceAll(text, "\n", "\n            "))
}

// sayList shows what libvirt runs on each host.
func (r *run) sayList(ctx context.Context) error {
	for _, h := range r.Hosts() {
		out, err := h.Exec(ctx, "virsh", "-c", "qemu:///system", "list", "--all")
		if err != nil {
			return err
		}
		r.say("%s$ virsh list --all\n%s", h.Name, out)
	}
	return nil
}

// keepEvidence saves the logs of the hosts and says where.
func (r *run) keepEvidence(ctx context.Context, what string) {
	dir, err := r.SaveLogs(ctx, r.Evidence, what)
	if err != nil {
		r.say("cannot keep all logs: %v", err)
	}
	if dir != "" {
		r.say("logs of agents, libvirt, QEMU and guests are kept in %s", dir)
	}
}

// SaveLogs copies what the hosts logged into a new directory below dir.
func (b *Bed) SaveLogs(ctx context.Context, dir, what string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	to := filepath.Join(dir, time.Now().Format("20060102-150405.000")+"-"+what)
	var errs []error
	for _, h := range b.Hosts() {
		own := filepath.Join(to, h.Name)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return "", err
		}
		for _, path := range []string{"/var/log/ftvirt", "/var/log/libvirt", "/etc/ftvirt"} {
			out, err := exec.CommandContext(ctx, "cp", "-a", h.Path(path), own).CombinedOutput()
			if err != nil {
				errs = append(errs, fmt.Errorf("%w: %s", err, out))
			}
		}
		// What the agent keeps of backups that diverged.
		files, _ := filepath.Glob(h.Path("/var/lib/ftvirt") + "/diagnosis-*.json")
		for _, f := range files {
			if text, err := os.ReadFile(f); err == nil {
				errs = append(errs, os.WriteFile(filepath.Join(own, filepath.Base(f)), text, 0o644))
			}
		}
		errs = append(errs, b.saveEvents(ctx, h, filepath.Join(own, "events.json")))
	}
	return to, errors.Join(errs...)
}

func (b *Bed) saveEvents(ctx context.Context, h *lab.Host, path string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var text strings.Builder
	enc := json.NewEncoder(&text)
	err := b.Agent(h).Events(ctx, false, func(e client.Event) error { return enc.Encode(e) })
	if errors.Is(err, client.ErrNoAgent) {
		err = nil // its log tells why
	}
	return errors.Join(err, os.WriteFile(path, []byte(text.String()), 0o644))
}

// oneLine makes an error fit a RESULT line.
func oneLine(err error) string {
	const most = 300
	text := strings.Join(strings.Fields(err.Error()), " ")
	if len(text) > most {
		text = text[:most] + "..."
	}
	return text
}
