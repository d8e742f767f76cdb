// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
)

// Why an old replica is left alone.
var (
	errInUse   = errors.New("it is in use")
	errNotOurs = errors.New("it is not proven that this host made it")
)

// Replicas are the files that this host makes for the disks of backups. Their
// directory may be shared with other hosts, have live disks in it, those of this
// host and of others, and files of operators. So no file is written to, or deleted,
// unless all of this holds:
//
//   - its name has this host in it, and this host noted that it made it: the same
//     file, not one that took its place;
//   - nothing that this host's libvirt knows of uses it: neither a running domain nor
//     a definition, a snapshot or an image that is based on it;
//   - no QEMU of any host has it open, as QEMU's own lock tells.
type Replicas struct {
	Host string
	Dir  string
	// Records is a directory of this host alone, for its notes.
	Records string
	// Described gives all that libvirt on this host has written down of its domains.
	Described func(ctx context.Context) ([]string, error)
	Log       *slog.Logger

	mu   sync.Mutex
	held map[string]bool // paths of replicas that libvirt does not know of yet
}

// record is what is noted of a file, in one of its own.
type record struct {
	Path   string       `json:"path"`
	Inode  uint64       `json:"inode"`
	Domain plugin.UUID  `json:"domain"`
	Target string       `json:"target"`
	Epoch  plugin.Epoch `json:"epoch"` // the last that it was used in
	// Discarded is when its backup was: nobody waits for it from then on but the
	// next one. The disk of one that went live never is.
	Discarded time.Time `json:"discarded,omitzero"`
}

// replicaName begins with the host, which keeps agents of earlier versions, on hosts
// that are not upgraded yet, from taking it for theirs.
var replicaName = regexp.MustCompile(`^ftvirt-(?:(.+)-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-[a-z0-9]+-[0-9]+\.(?:raw|qcow2)(?:\.stale)?$`)

// maxNames bounds the search for a name that is free.
const maxNames = 100

// create makes an empty file for a disk, which is held until release.
func (r *Replicas) create(id plugin.UUID, epoch plugin.Epoch, d Disk) (record, error) {
	var taken error
	// Epochs begin anew when the arbiter is told to forget the domain.
	for n := epoch; n < epoch+maxNames; n++ {
		rec := record{
			Path:   filepath.Join(r.Dir, fmt.Sprintf("ftvirt-%s-%s-%s-%d.%s", r.Host, id, d.Target, n, d.Format)),
			Domain: id, Target: d.Target, Epoch: epoch,
		}
		if _, err := os.Lstat(r.recordPath(rec)); err == nil {
			continue // its file may be back, as on storage that is not mounted
		}
		f, err := os.OpenFile(rec.Path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if errors.Is(err, fs.ErrExist) {
			taken = err
			continue
		}
		if err != nil {
			return record{}, err
		}
		info, err := f.Stat()
		if err == nil {
			rec.Inode = inode(info)
			err = r.save(rec)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return record{}, errors.Join(err, os.Remove(rec.Path))
		}
		r.hold(rec)
		return rec, nil
	}
	return record{}, fmt.Errorf("no name is free: %w", taken)
}

// take finds a replica of an earlier epoch that fits. What is in it is compared before
// it is believed. It is held until release.
func (r *Replicas) take(ctx context.Context, id plugin.UUID, epoch plugin.Epoch, d Disk, u *usage) (record, bool, error) {
	list, err := r.list(id)
	if err != nil || u == nil {
		return record{}, false, err
	}
	for _, rec := range list {
		if rec.Target != d.Target || filepath.Dir(rec.Path) != filepath.Clean(r.Dir) || !fits(ctx, rec.Path, d) {
			continue
		}
		f, err := r.claim(rec, u)
		if err != nil {
			r.Log.Info("an old replica is left alone", "path", rec.Path, "reason", err)
			continue
		}
		rec.Epoch, rec.Discarded = epoch, time.Time{}
		if err = r.save(rec); err == nil {
			r.hold(rec)
		}
		_ = f.Close()
		return rec, err == nil, err
	}
	return record{}, false, ctx.Err()
}

// clear deletes the replicas of a domain's earlier epochs, except those that are
// held, once the primary has told which disks it runs from.
func (r *Replicas) clear(id plugin.UUID, primary string, u *usage) {
	list, err := r.list(id)
	if err != nil || u == nil {
		return
	}
	for _, rec := range list {
		if strings.Contains(primary, filepath.Base(rec.Path)) {
			// An operator moved the domain there with its disk, as on storage
			// that the hosts share. It is not a replica any more.
			r.Log.Info("a replica became the primary's disk; it is never deleted", "path", rec.Path)
			r.forgetRecord(rec)
			continue
		}
		if err := r.remove(rec, u); err != nil {
			r.Log.Debug("an old replica stays", "path", rec.Path, "reason", err)
		}
	}
}

// discard marks a file as one that may be deleted when it is old.
func (r *Replicas) discard(rec record) error {
	rec.Discarded = time.Now()
	return r.save(rec)
}

// Forget deletes the replicas of discarded backups that have been kept for longer
// than age; of one domain, unless id is zero.
func (r *Replicas) Forget(ctx context.Context, id plugin.UUID, age time.Duration) error {
	list, err := r.list(id)
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(rec record) bool { return rec.Discarded.IsZero() || time.Since(rec.Discarded) < age })
	if len(list) == 0 {
		return nil
	}
	u, err := r.usage(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, rec := range list {
		err := r.remove(rec, u)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
			if time.Since(rec.Discarded) > missingAge {
				r.forgetRecord(rec)
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// missingAge is how long the note of a file that is not there is kept: its storage
// may come back.
const missingAge = 30 * 24 * time.Hour

// Strangers are files in the directory that look like replicas and are none that this
// host may touch.
type Strangers struct {
	// Hosts have replicas of their own here: the directory is shared.
	Hosts []string
	// Unproven look like this host's, or have names that earlier versions gave, and
	// nobody is known to use them.
	Unproven []string
}

// Strangers looks for them.
func (r *Replicas) Strangers(ctx context.Context) (Strangers, error) {
	var s Strangers
	entries, err := os.ReadDir(r.Dir)
	if err != nil {
		return s, err
	}
	list, err := r.list(plugin.UUID{})
	if err != nil {
		return s, err
	}
	var u *usage
	for _, e := range entries {
		m := replicaName.FindStringSubmatch(e.Name())
		switch {
		case m == nil:
			continue
		case m[1] != "" && m[1] != r.Host:
			if !slices.Contains(s.Hosts, m[1]) {
				s.Hosts = append(s.Hosts, m[1])
			}
			continue
		}
		path := filepath.Join(r.Dir, e.Name())
		info, err := e.Info()
		if err != nil || slices.ContainsFunc(list, func(known record) bool { return known.Path == path && known.Inode == inode(info) }) {
			continue
		}
		if u == nil {
			if u, err = r.usage(ctx); err != nil {
				return s, err
			}
		}
		if !u.has(path, info) && !locked(path) {
			s.Unproven = append(s.Unproven, path)
		}
	}
	return s, nil
}

// ---- proof -------------------------------------------------------------------

// claim proves that nobody uses a file that this host made, and keeps every QEMU from
// opening it until it is closed.
func (r *Replicas) claim(rec record, u *usage) (*os.File, error) {
	r.mu.Lock()
	held := r.held[rec.Path]
	r.mu.Unlock()
	if held {
		return nil, fmt.Errorf("%s: %w by the backup that is being made", rec.Path, errInUse)
	}
	f, err := os.OpenFile(rec.Path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s: %w", rec.Path, errNotOurs)
	}
	if err != nil {
		return nil, err
	}
	if err := r.prove(rec, f, u); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w", rec.Path, err)
	}
	return f, nil
}

// Where QEMU locks the bytes of an image that stand for what it does with it, and
// for what others may not: RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE of
// block/file-posix.c. On NFS the server has these locks, so that they hold between
// hosts.
const (
	lockStart = 100
	lockLen   = 200
)

func (r *Replicas) prove(rec record, f *os.File, u *usage) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || !info.Mode().IsRegular() || st.Ino != rec.Inode || st.Nlink != 1 {
		return errNotOurs
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: lockStart, Len: lockLen}
	switch err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w by a QEMU, of this host or another", errInUse)
	case err != nil:
		return fmt.Errorf("whether a QEMU uses it cannot be told: lock: %w", err)
	}
	if u.has(rec.Path, info) {
		return fmt.Errorf("%w by a domain of this host, or by its definition", errInUse)
	}
	return nil
}

// locked tells whether a QEMU has a file open, without getting in its way.
func locked(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: lockStart, Len: lockLen}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock) != nil || lock.Type != unix.F_UNLCK
}

// remove deletes a file, if it may.
func (r *Replicas) remove(rec record, u *usage) error {
	f, err := r.claim(rec, u)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := os.Remove(rec.Path); err != nil {
		return err
	}
	r.forgetRecord(rec)
	return nil
}

// usage is what this host's domains use.
type usage struct {
	text  string
	files []os.FileInfo
}

// usageTimeout bounds the look at images: one may lie on storage that hangs.
const usageTimeout = 10 * time.Second

// usage asks libvirt, and looks into the images for those that they are based on. More
// are descriptions to add.
func (r *Replicas) usage(ctx context.Context, more ...string) (*usage, error) {
	ctx, cancel := context.WithTimeout(ctx, usageTimeout)
	defer cancel()
	texts, err := r.Described(ctx)
	if err != nil {
		return nil, fmt.Errorf("which images are in use: %w", err)
	}
	done := make(chan *usage, 1)
	go func() { done <- newUsage(append(texts, more...)) }()
	select {
	case u := <-done:
		return u, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("which images are in use: the image of some domain cannot be looked at: %w", ctx.Err())
	}
}

// quotedPath finds the paths in a description.
var quotedPath = regexp.MustCompile(`["'](/[^"'<>]+)["']`)

var unescape = strings.NewReplacer("&amp;", "&", "&apos;", "'", "&quot;", `"`, "&lt;", "<", "&gt;", ">")

func newUsage(texts []string) *usage {
	u := &usage{}
	seen := map[string]bool{}
	for _, text := range texts {
		u.text += text + "\n"
		for _, m := range quotedPath.FindAllStringSubmatch(text, -1) {
			for path := unescape.Replace(m[1]); path != "" && !seen[path]; path = u.add(path) {
				seen[path] = true
			}
		}
	}
	return u
}

// add notes a file, and returns what it is based on.
func (u *usage) add(path string) (backing string) {
	info, err := os.Stat(path)
	if err != nil {
		return ""
	}
	u.files = append(u.files, info)
	if backing = backingOf(path, info); backing == "" {
		return ""
	}
	u.text += backing + "\n" // it may be the JSON of a node
	backing = strings.TrimPrefix(backing, "file:")
	if !filepath.IsAbs(backing) {
		backing = filepath.Join(filepath.Dir(path), backing)
	}
	return backing
}

func (u *usage) has(path string, info os.FileInfo) bool {
	return strings.Contains(u.text, filepath.Base(path)) ||
		slices.ContainsFunc(u.files, func(f os.FileInfo) bool { return os.SameFile(f, info) })
}

// ---- notes -------------------------------------------------------------------

// hold keeps a file from being taken or deleted while libvirt does not know yet that
// it is in use.
func (r *Replicas) hold(rec record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held == nil {
		r.held = map[string]bool{}
	}
	r.held[rec.Path] = true
}

func (r *Replicas) release(list []replica) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range list {
		delete(r.held, f.Path)
	}
}

const recordSuffix = ".json"

func (r *Replicas) recordPath(rec record) string {
	return filepath.Join(r.Records, filepath.Base(rec.Path)+recordSuffix)
}

// list gives the notes of a domain's replicas, those of the newest epochs first. A
// zero id stands for all domains.
func (r *Replicas) list(id plugin.UUID) ([]record, error) {
	entries, err := os.ReadDir(r.Records)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("notes of replicas: %w", err)
	}
	var list []record
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if m := replicaName.FindStringSubmatch(name); !ok || m == nil || m[1] != r.Host {
			continue
		}
		text, err := os.ReadFile(filepath.Join(r.Records, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("notes of replicas: %w", err)
		}
		var rec record
		if err := json.Unmarshal(text, &rec); err != nil || filepath.Base(rec.Path) != name {
			r.Log.Warn("the note of a replica is damaged; the replica is left alone", "note", e.Name(), "error", err)
			continue
		}
		if id == (plugin.UUID{}) || rec.Domain == id {
			list = append(list, rec)
		}
	}
	slices.SortFunc(list, func(a, b record) int {
		return cmp.Or(cmp.Compare(b.Epoch, a.Epoch), cmp.Compare(a.Path, b.Path))
	})
	return list, nil
}

// save replaces a note in one step.
func (r *Replicas) save(rec record) error {
	text, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(r.Records, 0o700); err != nil {
		return fmt.Errorf("note of a replica: %w", err)
	}
	path := r.recordPath(rec)
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("note of a replica: %w", err)
	}
	_, err = f.Write(append(text, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("note of a replica: %w", err), os.Remove(path+".new"))
	}
	return nil
}

// forgetRecord gives a file up: from now on it is nobody's but the operator's.
func (r *Replicas) forgetRecord(rec record) {
	if err := os.Remove(r.recordPath(rec)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.Log.Warn("the note of a replica stays", "path", rec.Path, "error", err)
	}
}

func inode(info os.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}
