// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/virt"
)

const (
	// diagnosisLimit bounds each file of an archive, of which the end counts.
	diagnosisLimit = 64 << 20
	// diagnosisKept is how many diverged backups of a domain are kept.
	diagnosisKept = 3
	// qemuLogDir is where libvirt has the logs of its QEMUs, see qemu_conf.c.
	qemuLogDir = "/var/log/libvirt/qemu"
)

// diagnosisDir holds what is kept of a backup that diverged.
func (d *domain) diagnosisDir(epoch plugin.Epoch) string {
	return filepath.Join(d.diagnosesDir(), fmt.Sprintf("%s-%020d", d.id, epoch))
}

func (d *domain) diagnosesDir() string { return filepath.Join(d.a.cfg.Agent.StateDir, "diagnosis") }

// diagnose keeps what is known of a backup that is about to be discarded: what
// its plugin said, and the log from before the place where it stopped. That log
// holds what the guest received, so only root can read it. The machine does not wait
// for that: the peer is to be told first.
func (d *domain) diagnose(epoch plugin.Epoch, v *vm, b *backup) {
	report := map[string]any{"domain": d.id, "epoch": epoch, "host": d.a.cfg.Host, "time": time.Now()}
	if v != nil {
		r := v.reports()
		report["state"], report["consumed"], report["diverged"] = r.State, r.consumed, r.diverged
		report["qemu"] = v.Hello().QEMU
	}
	if b != nil && b.log() != nil {
		report["log"] = b.log().Stats()
	}
	if b != nil {
		report["registers_equal"], report["registers_differ"] = b.comparison.result()
		b.mu.Lock()
		report["verified"] = b.verdict
		b.mu.Unlock()
	}
	if b != nil {
		b.holding.Add(1)
	}
	// Nobody waits for it, the end of the agent neither: the disk may hang.
	go func() {
		if err := d.keepDiagnosis(epoch, report, b); err != nil {
			d.a.log.Error("cannot keep the diagnosis", "domain", d.label(), "error", err)
			return
		}
		d.a.log.Warn("diagnosis kept; 'ftvirt diagnose' puts it into an archive", "domain", d.label(), "directory", d.diagnosisDir(epoch))
	}()
}

var errDiagnosing = errors.New("the one of before is still being written")

// keepTimeout bounds the copy of a log, of which there is no more than
// channel.receive_buffer.
const keepTimeout = time.Minute

func (d *domain) keepDiagnosis(epoch plugin.Epoch, report map[string]any, b *backup) error {
	ctx, cancel := context.WithTimeout(d.a.ctx, keepTimeout)
	defer cancel()
	held := ""
	if !d.diagnosing.TryLock() {
		if b != nil {
			b.holding.Done()
		}
		return errDiagnosing
	}
	defer d.diagnosing.Unlock()
	if b != nil {
		held = filepath.Join(d.a.cfg.Agent.RunDir, "diagnosis-"+d.id.String())
		err := linkAll(held, b.spoolDir())
		b.holding.Done()
		defer func() { _ = os.RemoveAll(held) }()
		if err != nil {
			return err
		}
	}
	dir := d.diagnosisDir(epoch)
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = writeJSON(filepath.Join(dir, "report.json"), report)
	}
	if err == nil && b != nil {
		err = copyAll(ctx, filepath.Join(dir, "log"), held)
	}
	d.forgetDiagnoses()
	return err
}

// linkAll gives the files of a directory a second name each, in a new one, so that
// they outlive the first.
func linkAll(to, from string) error {
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	// What an agent that died was about to copy goes.
	if err := errors.Join(os.RemoveAll(to), os.Mkdir(to, 0o700)); err != nil {
		return err
	}
	for _, f := range files {
		// One may have been consumed meanwhile.
		if err := os.Link(filepath.Join(from, f.Name()), filepath.Join(to, f.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func copyAll(ctx context.Context, to, from string) error {
	files, err := os.ReadDir(from)
	if err == nil {
		err = os.MkdirAll(to, 0o700)
	}
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := copyFile(ctx, filepath.Join(to, f.Name()), filepath.Join(from, f.Name())); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(ctx context.Context, to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, whileReader{ctx, in})
	return errors.Join(err, out.Close())
}

// whileReader ends with a context.
type whileReader struct {
	context.Context
	io.Reader
}

func (r whileReader) Read(b []byte) (int, error) {
	if err := r.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}

// forgetDiagnoses removes all but the newest.
func (d *domain) forgetDiagnoses() {
	kept, err := filepath.Glob(filepath.Join(d.diagnosesDir(), d.id.String()+"-*"))
	if err != nil {
		return
	}
	slices.Sort(kept)
	for _, dir := range kept[:max(0, len(kept)-diagnosisKept)] {
		if err := os.RemoveAll(dir); err != nil {
			d.a.log.Warn("an old diagnosis stays", "domain", d.label(), "error", err)
		}
	}
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o600)
}

// archive writes a tar archive, compressed by gzip, of all that this host knows
// of a domain. What cannot be had is named in it instead.
type archive struct {
	tar  *tar.Writer
	root string
	err  error // of writing
}

// add puts a file into the archive, or the reason why there is none.
func (a *archive) add(name string, content []byte, err error) {
	if err != nil {
		name, content = name+".missing", []byte(err.Error()+"\n")
	}
	content = content[max(0, len(content)-diagnosisLimit):]
	if a.err == nil {
		a.err = a.tar.WriteHeader(&tar.Header{
			Name: a.root + "/" + name, Mode: 0o600, Size: int64(len(content)), ModTime: time.Now(), Format: tar.FormatPAX,
		})
	}
	if a.err == nil {
		_, a.err = a.tar.Write(content)
	}
}

func (a *archive) json(name string, v any, err error) {
	text, merr := json.MarshalIndent(v, "", "  ")
	a.add(name, append(text, '\n'), errors.Join(err, merr))
}

// tree adds the files below a directory.
func (a *archive) tree(name, dir string) {
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rest, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		a.add(filepath.Join(name, rest), text, err)
		return nil
	})
	if err != nil {
		a.add(name, nil, err)
	}
}

// Diagnose writes an archive of all that helps to find out what became of a
// domain here. Logs of the guest's input are in it if a backup diverged;
// passwords of displays are not.
func (a *Agent) Diagnose(ctx context.Context, name string, w io.Writer) error {
	info, err := a.virt.Find(ctx, name)
	var d *domain
	switch {
	case err == nil:
		d = a.domain(info.UUID)
	case errors.Is(err, virt.ErrNoDomain):
		// A backup that was removed is no domain any more.
		if d = a.knownAs(name); d == nil {
			return err
		}
	default:
		return err
	}
	zip := gzip.NewWriter(w)
	out := archive{tar: tar.NewWriter(zip), root: fmt.Sprintf("ftvirt-%s-%s", d.id, a.cfg.Host)}
	out.json("status.json", d.report(), nil)
	events, _, _ := a.events.since(0)
	out.json("events.json", slices.DeleteFunc(events, func(e Entry) bool { return e.UUID != d.id }), nil)
	out.json("config.json", a.cfg, nil)
	host, err := a.hostInfo(ctx)
	out.json("host.json", host, err)
	rec, err := a.lookupOnce(ctx, d.id)
	out.json("arbiter.json", rec, err)
	for file, inactive := range map[string]bool{"domain.xml": false, "definition.xml": true} {
		text, err := a.virt.PublicXML(ctx, d.id, inactive)
		out.add(file, []byte(text), err)
	}
	if _, v, _, b := d.snapshot(); v != nil {
		r := v.reports()
		out.json("plugin.json", map[string]any{
			"hello": v.Hello(), "state": r.State, "consumed": r.consumed, "stats": r.stats, "diverged": r.diverged,
		}, nil)
		if b != nil && b.log() != nil {
			out.json("store.json", b.log().Stats(), nil)
		}
	}
	text, err := os.ReadFile(filepath.Join(qemuLogDir, d.label()+".log"))
	out.add("qemu.log", text, err)
	kept, err := filepath.Glob(filepath.Join(d.diagnosesDir(), d.id.String()+"-*"))
	if err != nil {
		out.add("diverged", nil, err)
	}
	for _, dir := range kept {
		out.tree(filepath.Join("diverged", strings.TrimPrefix(filepath.Base(dir), d.id.String()+"-")), dir)
	}
	return errors.Join(out.err, out.tar.Close(), zip.Close())
}

func (a *Agent) lookupOnce(ctx context.Context, id plugin.UUID) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, arbiterTimeout)
	defer cancel()
	return a.arbiter.Lookup(ctx, id)
}

// knownAs finds a domain by what this agent remembers.
func (a *Agent) knownAs(name string) *domain {
	for _, d := range a.known() {
		if d.label() == name || d.id.String() == name {
			return d
		}
	}
	return nil
}

// serveDiagnosis answers GET /v1/diagnosis/{domain} with the archive.
func (a *Agent) serveDiagnosis(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), diagnosisTimeout)
	defer cancel()
	// In a file first: an error must not look like a short archive.
	f, err := os.CreateTemp(a.cfg.Agent.StateDir, ".diagnosis-*")
	if err != nil {
		reply(w, nil, err)
		return
	}
	defer func() {
		_ = f.Close()
		_ = os.Remove(f.Name())
	}()
	if err := a.Diagnose(ctx, r.PathValue("domain"), f); err != nil {
		reply(w, nil, err)
		return
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		reply(w, nil, err)
		return
	}
	w.Header().Set("Content-Type", "application/gzip")
	_, _ = io.Copy(w, f) // the client hung up, else
}

// diagnosisTimeout bounds the collection; each question has limits of its own.
const diagnosisTimeout = 30 * time.Second
