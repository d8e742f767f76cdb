// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// What is expected of the reader of the first document.
const (
	// TypingSpeed is slow, in characters per minute: 40 words of five characters.
	TypingSpeed = 200
	// longestTyping and longestStart are how long the first document may take to
	// be typed, and with all waiting.
	longestTyping = 10 * time.Minute
	longestStart  = 15 * time.Minute
)

// Time limits of a block, of what a block waits for before, and of a console to
// show what the document shows: a reader looks again.
const (
	blockTimeout   = 8 * time.Minute
	protectTimeout = 2 * time.Minute
	lookTimeout    = time.Minute
)

// longestGap is how long a client may be without a reply when a domain fails over,
// and while one host is upgraded.
const longestGap = 5 * time.Second

// ErrWrong is wrapped when a document shows what is not so.
var ErrWrong = errors.New("the document is wrong")

// Options say what is run, and with what.
type Options struct {
	// Documents are run in this order on the same hosts. The first is the one that
	// is timed.
	Documents []string
	// Packages has the packages that lie on each host at the start, Newer those to
	// upgrade to.
	Packages, Newer string
	// Tree is the repository, with bin/, as somebody has it who installs by hand.
	Tree string
	// GuestDir has the built guest.
	GuestDir string
	// Suite and Mirror are the Debian of the hosts.
	Suite, Mirror string
	// Dir is where the hosts are made; a bare Debian stays there for the next run.
	Dir string
	// Evidence is where the hosts' journals go when something fails.
	Evidence string
	Out      io.Writer
}

type run struct {
	Options
	*hosts
	began time.Time
	ranOn string // where the domain ran when that was asked last
	// The client's connection, if there is one, since when, and the longest time
	// that any had to wait.
	traffic   *scenario.Traffic
	connected time.Time
	longest   time.Duration
	replies   int
	stayed    int // restarts and upgrades under a pair
}

// Run runs the documents and prints a RESULT line. The caller's program is run once
// more for that, as process 1 of namespaces of its own, so that nothing of the hosts
// is left when it ends, however it ends: it has to call Run with the same options.
func Run(ctx context.Context, o Options) error {
	var err error
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}
	packages, err := debs(o.Packages)
	if err != nil {
		return err
	}
	// What needs a network is done before there is none.
	artifacts, err := guest.Build(ctx, o.GuestDir)
	if err != nil {
		return err
	}
	base, err := makeBase(ctx, o, packages)
	if err != nil {
		return err
	}
	if !inOwnNamespaces() {
		return enterNamespaces()
	}
	figures, err := (&run{Options: o, began: time.Now()}).all(ctx, base, artifacts)
	if err != nil {
		_, _ = fmt.Fprintf(o.Out, "RESULT docs=failed %s reason=%q\n", figures, oneLine(err))
		return err
	}
	_, err = fmt.Fprintf(o.Out, "RESULT docs=ok %s\n", figures)
	return err
}

// oneLine keeps an error fit for the RESULT line: what a command printed was told
// above.
func oneLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

func (r *run) say(format string, args ...any) {
	_, _ = fmt.Fprintf(r.Out, "[%5.0f s] %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

func (r *run) all(ctx context.Context, base string, artifacts guest.Artifacts) (figures string, err error) {
	var documents [][]Block
	for _, file := range r.Documents {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		blocks, err := Blocks(file, string(text))
		if err != nil {
			return "", err
		}
		documents = append(documents, blocks)
	}
	r.say("booting %s, each with a systemd of its own", strings.Join(hostNames, ", "))
	r.hosts, err = start(ctx, filepath.Join(r.Dir, "run"), base)
	if r.hosts != nil {
		defer func() {
			if err != nil {
				r.keep()
			}
			err = errors.Join(err, r.stop())
		}()
	}
	if err != nil {
		return "", err
	}
	if err := r.prepare(artifacts); err != nil {
		return "", err
	}
	var ran, marked, commands int
	for i, blocks := range documents {
		began, typed := time.Now(), 0
		r.say("== %s", r.Documents[i])
		for _, b := range blocks {
			switch {
			case !b.IsCommands() && b.Lang != "toml":
				continue
			case b.NotRun != "":
				marked++
				r.say("%s:%d not run: %s", b.File, b.Line, b.NotRun)
				continue
			}
			n, err := r.block(ctx, b)
			if err != nil {
				return fmt.Sprintf("run=%d marked=%d", ran, marked), fmt.Errorf("%s:%d (%s): %w", b.File, b.Line, b.Section, err)
			}
			ran++
			commands += n
			typed += b.Typed()
		}
		if i == 0 {
			typing, waiting := time.Duration(typed)*time.Minute/TypingSpeed, time.Since(began)
			figures = fmt.Sprintf("start_characters=%d minutes_of_typing=%.1f minutes_of_waiting=%.1f",
				typed, typing.Minutes(), waiting.Minutes())
			if typing >= longestTyping || typing+waiting >= longestStart {
				return figures, fmt.Errorf("%w: %s promises less", ErrWrong, r.Documents[0])
			}
		}
	}
	figures = fmt.Sprintf("blocks=%d run=%d marked=%d commands=%d %s", ran+marked, ran, marked, commands, figures)
	if err := r.disconnect(); err != nil {
		return figures, err
	}
	if r.replies == 0 {
		return figures, fmt.Errorf("%w: no domain %s that a client could reach", ErrWrong, domainName)
	}
	return figures + fmt.Sprintf(" pairs_stayed=%d replies=%d longest_gap_ms=%d lost=0", r.stayed, r.replies, r.longest.Milliseconds()), nil
}

// debs lists the packages in dir.
func debs(dir string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("no packages in %s", dir)
	}
	return found, err
}

// prepare puts on the hosts what the first document takes for granted.
func (r *run) prepare(a guest.Artifacts) error {
	const images = "var/lib/libvirt/images"
	xml, err := guest.DomainXML(guest.Domain{
		Name: domainName, Kernel: "/" + images + "/vmlinuz", Initrd: "/" + images + "/initrd.gz", Disk: "/" + images + "/web.img",
		Bridge: "br0", MAC: "52:54:00:f7:00:0a", Address: netip.MustParsePrefix(guestAddress),
	})
	if err != nil {
		return err
	}
	for _, h := range r.list {
		at := func(p string) string { return filepath.Join(h.root, p) }
		if err := errors.Join(
			r.putPackages(h, r.Packages), os.MkdirAll(at(images), 0o711), //nolint:gosec // as libvirt's package makes it
			r.putTree(h), copyFile(a.Kernel, at(images+"/vmlinuz")), copyFile(a.Initrd, at(images+"/initrd.gz")),
		); err != nil {
			return err
		}
	}
	first := r.list[0].root
	return errors.Join(copyFile(a.DiskTemplate, filepath.Join(first, images, "web.img")),
		os.WriteFile(filepath.Join(first, "root/web.xml"), []byte(xml), 0o600))
}

// fromTree is what of the repository is there to install by hand.
var fromTree = []string{
	"bin/ftvirt", "bin/ftvirt.so", "bin/ftvirt-hook", "ftvirt.toml.example",
	"contrib/ftvirt-agent.service", "contrib/ftvirt-handover.service", "contrib/ftvirt-witness.service", "contrib/apparmor-libvirt-qemu",
}

func (r *run) putTree(h *host) error {
	for _, name := range fromTree {
		to := filepath.Join(h.root, "root", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o700), copyFile(filepath.Join(r.Tree, name), to)); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) putPackages(h *host, from string) error {
	home := filepath.Join(h.root, "root")
	old, err := filepath.Glob(filepath.Join(home, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range old {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	packages, err := debs(from)
	if err != nil {
		return err
	}
	for _, p := range packages {
		if err := copyFile(p, filepath.Join(home, filepath.Base(p))); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644) //nolint:gosec // QEMU's user is to read it
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// block runs a block and returns how many commands that were.
func (r *run) block(ctx context.Context, b Block) (int, error) {
	if b.Lang == "toml" {
		return 1, r.toml(ctx, b)
	}
	var epoch string
	if b.Protected != "" {
		var err error
		if epoch, err = r.awaitProtected(ctx, b.Protected); err != nil {
			return 0, err
		}
	}
	names := b.Hosts
	if b.Running != "" {
		name, err := r.runsOn(ctx, b.Running)
		if err != nil {
			return 0, err
		}
		names, r.ranOn = []string{name}, name
	}
	if b.Was {
		names = []string{r.ranOn}
	}
	if b.Newer {
		for _, name := range names {
			if err := r.putPackages(r.host(name), r.Newer); err != nil {
				return 0, err
			}
		}
	}
	if b.Down {
		if err := r.disconnect(); err != nil {
			return 0, err
		}
	}
	var (
		n   int
		err error
	)
	if b.Lang == "console" {
		n, err = r.console(ctx, b)
	} else {
		n, err = r.shell(ctx, b, names)
	}
	if err != nil || b.Down {
		return n, err
	}
	if b.Stays {
		now, err := r.awaitProtected(ctx, b.Protected)
		if err == nil && now != epoch {
			err = fmt.Errorf("%w: the pair of %s did not stay: epoch %s became %s", ErrWrong, b.Protected, epoch, now)
		}
		if err != nil {
			return n, err
		}
		r.stayed++
	}
	return n, r.client(ctx)
}

// shell runs a block on its hosts at the same time.
func (r *run) shell(ctx context.Context, b Block, names []string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, blockTimeout)
	defer cancel()
	var wg sync.WaitGroup
	problems := make([]error, len(names))
	began := time.Now()
	for i, name := range names {
		wg.Go(func() {
			out, exit, err := r.host(name).run(ctx, b.Text, b.For)
			ended := b.For > 0 && slices.Contains([]int{124, 130}, exit)
			switch {
			case err != nil:
				problems[i] = fmt.Errorf("%s# %s: %w; it printed:\n%s", name, b.Text, err, out)
			case exit != b.Exit && !ended:
				problems[i] = fmt.Errorf("%w: %s# %s ended with %d instead of %d; it printed:\n%s", ErrWrong, name, b.Text, exit, b.Exit, out)
			case b.For > 0 && strings.TrimSpace(out) == "":
				problems[i] = fmt.Errorf("%w: %s# %s printed nothing", ErrWrong, name, b.Text)
			}
		})
	}
	wg.Wait()
	r.say("%s:%d on %s, %.1f s: %s", b.File, b.Line, strings.Join(names, " and "), time.Since(began).Seconds(), firstLine(b.Text))
	n := 0
	for line := range strings.Lines(b.Text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			n++
		}
	}
	return n, errors.Join(problems...)
}

func firstLine(text string) string {
	line, rest, _ := strings.Cut(strings.TrimSpace(text), "\n")
	if rest != "" {
		line += " ..."
	}
	return line
}

// console types at prompts and compares what is printed.
func (r *run) console(ctx context.Context, b Block) (int, error) {
	commands, err := b.Commands()
	if err != nil {
		return 0, err
	}
	for _, c := range commands {
		began := time.Now()
		if err := r.look(ctx, c); err != nil {
			return 0, err
		}
		r.say("%s:%d on %s, %.1f s: %s", b.File, b.Line, c.Host, time.Since(began).Seconds(), c.Text)
	}
	return len(commands), nil
}

// look runs a command until it prints what it should. One that changes something
// is run once.
func (r *run) look(ctx context.Context, c Command) error {
	limit, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	again := slices.ContainsFunc([]string{"ftvirt status", "ftvirt events", "virsh list"}, func(p string) bool { return strings.HasPrefix(c.Text, p) })
	for {
		out, exit, err := r.host(c.Host).run(ctx, c.Text, 0)
		if err != nil {
			return fmt.Errorf("%s# %s: %w; it printed:\n%s", c.Host, c.Text, err, out)
		}
		if exit == 0 && sameShape(c.Want, out) {
			return nil
		}
		if !again || pause(limit) != nil {
			return fmt.Errorf("%w: %s# %s ended with %d and printed\n%s\ninstead of\n%s", ErrWrong, c.Host, c.Text, exit, out, strings.Join(c.Want, "\n"))
		}
	}
}

// toml holds a piece of ftvirt.toml against what the agent knows, together with
// what is there already unless the piece is a whole file.
func (r *run) toml(ctx context.Context, b Block) error {
	script := "cat >/tmp/doctest.toml <<'EOF'\n" + b.Text + "EOF\n"
	if !strings.Contains(b.Text, "[arbiter]") {
		script = strings.Replace(script, ">", ">>", 1)
		script = "cp /etc/ftvirt/ftvirt.toml /tmp/doctest.toml\n" + script
	}
	out, exit, err := r.list[0].run(ctx, script+"ftvirt config check /tmp/doctest.toml", 0)
	if err == nil && exit != 0 {
		err = fmt.Errorf("%w: %s", ErrWrong, out)
	}
	r.say("%s:%d: a piece of ftvirt.toml", b.File, b.Line)
	return err
}

const stateOf = `ftvirt status %s --format '{{.role}} {{.state}} {{.epoch}}' 2>/dev/null || :`

// state asks a host what a domain is there; all empty if it does not say.
func (r *run) state(ctx context.Context, h *host, domain string) (role, state, epoch string) {
	out, _, err := h.run(ctx, fmt.Sprintf(stateOf, domain), 0)
	if words := strings.Fields(out); err == nil && len(words) == 3 {
		return words[0], words[1], words[2]
	}
	return "", "", ""
}

// runsOn finds the host that is the primary's.
func (r *run) runsOn(ctx context.Context, domain string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, protectTimeout)
	defer cancel()
	for {
		for _, h := range r.list {
			if role, state, _ := r.state(ctx, h, domain); role == "primary" && state != "failed" {
				return h.name, nil
			}
		}
		if pause(ctx) != nil {
			return "", fmt.Errorf("%s runs nowhere", domain)
		}
	}
}

// awaitProtected waits until the pair is whole, as an operator would who does one
// thing after the other, and tells its epoch.
func (r *run) awaitProtected(ctx context.Context, domain string) (epoch string, err error) {
	limit, cancel := context.WithTimeout(ctx, protectTimeout)
	defer cancel()
	for {
		whole := map[string]string{}
		var all []string
		for _, h := range r.list {
			role, state, epoch := r.state(ctx, h, domain)
			if state == "protected" {
				whole[role] = epoch
			}
			all = append(all, fmt.Sprintf("%s: %s %s %s", h.name, role, state, epoch))
		}
		if epoch := whole["primary"]; epoch != "" && epoch == whole["backup"] {
			return epoch, nil
		}
		if pause(limit) != nil {
			return "", fmt.Errorf("%s is not protected within %v: %s", domain, protectTimeout, strings.Join(all, "; "))
		}
	}
}

// client connects to the guest as soon as it can, and sees to it that the
// connection stays.
func (r *run) client(ctx context.Context) error {
	if r.traffic != nil {
		if _, err := r.traffic.WaitReply(ctx, time.Now(), longestGap); err != nil {
			return fmt.Errorf("the client: %w", err)
		}
		return nil
	}
	addr := netip.MustParsePrefix(guestAddress).Addr()
	dial := func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
	}
	limit, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if (guest.Client{Dial: dial, Address: addr}).WaitReady(limit) != nil {
		return nil // not yet
	}
	t, err := scenario.StartTraffic(ctx, dial, addr)
	if err != nil {
		return err
	}
	r.traffic, r.connected = t, time.Now()
	r.say("a client is connected to the guest")
	return nil
}

// disconnect ends the client's connection and judges it.
func (r *run) disconnect() error {
	if r.traffic == nil {
		return nil
	}
	gap := r.traffic.LongestGap(r.connected)
	err := r.traffic.Stop()
	replies, _, _ := r.traffic.Counts()
	r.say("the client had %d replies, the longest gap was %d ms", replies, gap.Milliseconds())
	r.longest = max(r.longest, gap)
	r.replies += replies
	r.traffic = nil
	switch {
	case err != nil:
		return fmt.Errorf("the client: %w", err)
	case gap > longestGap:
		return fmt.Errorf("the client had no reply for %v", gap)
	}
	return nil
}

// keep saves the hosts' journals.
func (r *run) keep() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := os.MkdirAll(r.Evidence, 0o755); err != nil {
		return
	}
	for _, h := range r.list {
		out, _, _ := h.run(ctx, "journalctl --no-pager -o short-precise; ftvirt status -o yaml || :; ftvirt events || :; tail -n 50 /var/log/libvirt/qemu/*.log || :", 0)
		file := filepath.Join(r.Evidence, "docs-"+h.name+".log")
		if err := os.WriteFile(file, []byte(out), 0o600); err == nil {
			r.say("%s", file)
		}
	}
}
