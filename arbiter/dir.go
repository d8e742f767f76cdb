// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// markerName is the file that tells an arbiter directory from the empty mount
// point of storage that is not mounted. Without it a host could "win" epochs,
// or find a domain unprotected, in a directory that no other host sees.
const markerName = "ftvirt-arbiter.json"

// tempPrefix starts the names of files that are not published yet.
const tempPrefix = ".tmp-"

// staleTemp is the age at which a temporary file must be left over from a
// crash. Ages are differences between times of the same file server.
const staleTemp = time.Hour

// keepEpochs is how many past epochs stay readable for diagnosis.
const keepEpochs = 4

// DirConfig configures a directory backend.
type DirConfig struct {
	// Path is the shared directory, made ready by InitDir. Required.
	Path string
	// ID is the directory's identity as InitDir gave it. If empty, the first
	// one that is seen is taken, and must not change afterwards.
	ID string
	// Timeout bounds each operation whose context sets no earlier deadline.
	// Default 5 s.
	Timeout time.Duration
	// MaxStuck is how many operations may hang in the kernel before further
	// ones fail at once. Default 8.
	MaxStuck int
	// Seen, if set, is what this host remembers, against which all that is read
	// is held.
	Seen *Seen
	// Fault interferes with the storage. For tests only.
	Fault FaultFunc
	// Clock tells the times that are kept for people to read. Default time.Now.
	Clock func() time.Time
}

// Dir is the arbiter on a directory that both hosts share, such as an NFS
// export, version 3 or 4. It takes no locks, so "nolock" does no harm; do not
// mount with "nocto", which lets a client answer from a stale cache. Each
// domain has a sub-directory named by its UUID, holding one file for each fact:
//
//	epoch-00000007.open       the epoch exists, with these two hosts
//	epoch-00000007.owner      it was acquired by this host
//	epoch-00000007.closed     the owner ended it on purpose
//	epoch-00000007.forgotten  it and all before it are void
//
// A file is written under a temporary name, synced, and given its name by
// link(2), which fails if the name exists: the file server decides races. It
// never changes afterwards. NFS may repeat a request whose answer was lost, and
// report EEXIST for a link that it made; so what link returns is never
// believed, the file under the final name is read instead.
type Dir struct {
	path  string
	guard *guard
	seen  *Seen
	fault FaultFunc
	clock func() time.Time

	mu sync.Mutex
	id string // the directory's identity, empty until known
}

var _ Arbiter = (*Dir)(nil)

// NewDir gives the arbiter in the directory cfg.Path. It does not touch the
// storage, which may well be unreachable when an agent starts.
func NewDir(cfg DirConfig) (*Dir, error) {
	if !filepath.IsAbs(cfg.Path) {
		return nil, fmt.Errorf("%w: arbiter directory %q is not an absolute path", ErrInvalid, cfg.Path)
	}
	if cfg.Timeout < 0 || cfg.MaxStuck < 0 {
		return nil, fmt.Errorf("%w: negative limit for arbiter directory %s", ErrInvalid, cfg.Path)
	}
	d := &Dir{
		path: filepath.Clean(cfg.Path),
		id:   cfg.ID,
		guard: &guard{
			limit:   cmp.Or(cfg.MaxStuck, 8),
			timeout: cmp.Or(cfg.Timeout, 5*time.Second),
		},
		seen:  cfg.Seen,
		fault: cfg.Fault,
		clock: cfg.Clock,
	}
	if d.clock == nil {
		d.clock = time.Now
	}
	return d, nil
}

// InitDir makes an existing directory an arbiter's, once, and returns its
// identity. Repeating it, from any host, changes nothing and returns the same.
func InitDir(ctx context.Context, cfg DirConfig) (id string, err error) {
	d, err := NewDir(cfg)
	if err != nil {
		return "", err
	}
	return do(ctx, d.guard, "initialising arbiter directory "+d.path, func(ctx context.Context) (string, error) {
		marker, err := d.publish(ctx, d.path, markerName, contents{Kind: kindMarker})
		if err != nil {
			return "", err
		}
		if cfg.ID != "" && cfg.ID != marker.Token {
			return "", fmt.Errorf("%w: arbiter directory %s has identity %s, expected %s", ErrInvalid, d.path, marker.Token, cfg.ID)
		}
		return marker.Token, nil
	})
}

// ID gives the directory's identity, for hosts to make sure that they look at
// the same storage.
func (d *Dir) ID(ctx context.Context) (string, error) {
	return do(ctx, d.guard, "reading identity of arbiter directory", d.checkMarker)
}

// Open implements Arbiter.
func (d *Dir) Open(ctx context.Context, domain plugin.UUID, primary, backup string) (plugin.Epoch, error) {
	if err := checkHosts(primary, backup); err != nil {
		return 0, err
	}
	what := fmt.Sprintf("opening an epoch of domain %s", domain)
	return do(ctx, d.guard, what, func(ctx context.Context) (plugin.Epoch, error) {
		return d.open(ctx, domain, primary, backup)
	})
}

func (d *Dir) open(ctx context.Context, domain plugin.UUID, primary, backup string) (plugin.Epoch, error) {
	s, err := d.load(ctx, domain)
	if err != nil {
		return 0, err
	}
	if err := s.refuseOpen(primary); err != nil {
		return 0, err
	}
	epoch := s.newest() + 1
	if err := d.makeDomainDir(ctx, domain); err != nil {
		return 0, err
	}
	mine := contents{
		Kind: kindOpen, Domain: domain.String(), Epoch: epoch,
		Primary: primary, Backup: backup, Host: primary, Token: newToken(),
	}
	got, err := d.publish(ctx, d.domainDir(domain), fileName(epoch, kindOpen), mine)
	if err != nil {
		return 0, err
	}
	// Whether the epoch is ours or somebody was faster, Forget may have
	// passed in between: only what is there now counts.
	s, err = d.load(ctx, domain)
	switch {
	case err != nil:
		return 0, err
	case s.rec.Epoch == epoch && got.Token == mine.Token:
		d.tidy(ctx, domain, epoch)
		return epoch, nil
	case s.rec.Epoch != 0:
		if err := s.refuseOpen(primary); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("%w: domain %s is being opened or forgotten by another host", ErrUnavailable, domain)
}

// Acquire implements Arbiter.
func (d *Dir) Acquire(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error {
	if err := checkHost(host); err != nil {
		return err
	}
	what := fmt.Sprintf("acquiring epoch %d of domain %s for host %s", epoch, domain, host)
	_, err := do(ctx, d.guard, what, func(ctx context.Context) (Record, error) {
		return d.acquire(ctx, domain, epoch, host)
	})
	return err
}

func (d *Dir) acquire(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) (Record, error) {
	rec, decided, err := d.owned(ctx, domain, epoch, host)
	if decided || err != nil {
		return rec, err
	}
	_, err = d.publish(ctx, d.domainDir(domain), fileName(epoch, kindOwner), contents{
		Kind: kindOwner, Domain: domain.String(), Epoch: epoch, Host: host, Token: newToken(),
	})
	if err != nil {
		return Record{}, err
	}
	// The epoch may have been overtaken, or forgotten, between the look and
	// the link. An owner file of such an epoch is worth nothing.
	rec, decided, err = d.owned(ctx, domain, epoch, host)
	if err == nil && !decided {
		err = fmt.Errorf("%w: the storage does not show the owner file that it has", ErrUnavailable)
	}
	return rec, err
}

// owned tells whether epoch is decided, and for whom: without an error host is
// the owner, of an epoch that is still the newest and not closed.
func (d *Dir) owned(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) (Record, bool, error) {
	s, err := d.load(ctx, domain)
	if err != nil {
		return Record{}, false, err
	}
	rec, err := s.member(domain, epoch, host)
	if err != nil || rec.Owner == "" {
		return rec, false, err
	}
	// The winner may have crashed between its link and its sync of the
	// directory; nobody acts on a decision that is not durable.
	if err := d.syncDir(ctx, d.domainDir(domain)); err != nil {
		return rec, false, err
	}
	if rec.Owner != host || rec.Closed {
		return rec, true, &LostError{Domain: domain, Epoch: epoch, Winner: rec.Owner, Closed: rec.Closed}
	}
	return rec, true, nil
}

// Lookup implements Arbiter.
func (d *Dir) Lookup(ctx context.Context, domain plugin.UUID) (Record, error) {
	what := fmt.Sprintf("looking up domain %s", domain)
	return do(ctx, d.guard, what, func(ctx context.Context) (Record, error) {
		s, err := d.load(ctx, domain)
		if err != nil {
			return Record{}, err
		}
		if s.rec.Epoch == 0 {
			return Record{}, fmt.Errorf("%w: domain %s", ErrNoRecord, domain)
		}
		return s.rec, nil
	})
}

// Close implements Arbiter.
func (d *Dir) Close(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) error {
	if err := checkHost(host); err != nil {
		return err
	}
	what := fmt.Sprintf("closing epoch %d of domain %s for host %s", epoch, domain, host)
	_, err := do(ctx, d.guard, what, func(ctx context.Context) (Record, error) {
		return d.close(ctx, domain, epoch, host)
	})
	return err
}

func (d *Dir) close(ctx context.Context, domain plugin.UUID, epoch plugin.Epoch, host string) (Record, error) {
	rec, err := d.acquire(ctx, domain, epoch, host)
	if errors.Is(err, ErrClosed) {
		return rec, nil
	}
	if err != nil {
		return rec, err
	}
	_, err = d.publish(ctx, d.domainDir(domain), fileName(epoch, kindClosed), contents{
		Kind: kindClosed, Domain: domain.String(), Epoch: epoch, Host: host, Token: newToken(),
	})
	return rec, err
}

// Probe implements Arbiter. What it writes has no name that counts.
func (d *Dir) Probe(ctx context.Context, domain plugin.UUID) error {
	what := fmt.Sprintf("probing the arbiter of domain %s", domain)
	_, err := do(ctx, d.guard, what, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, d.probe(ctx, domain)
	})
	return err
}

func (d *Dir) probe(ctx context.Context, domain plugin.UUID) error {
	if _, err := d.load(ctx, domain); err != nil {
		return err
	}
	if err := d.makeDomainDir(ctx, domain); err != nil {
		return err
	}
	c := contents{Kind: kindOpen, Domain: domain.String(), Token: newToken(), Time: d.clock()}
	text, err := c.encode()
	if err != nil {
		return err
	}
	temp := filepath.Join(d.domainDir(domain), tempPrefix+c.Token)
	return errors.Join(d.writeTemp(ctx, temp, text), d.removeTemp(ctx, temp))
}

// Forget implements Arbiter. One small file stays behind for the domain: it
// keeps a host that was away from acquiring an epoch of the past, whose number
// would otherwise come again.
func (d *Dir) Forget(ctx context.Context, domain plugin.UUID) error {
	what := fmt.Sprintf("forgetting domain %s", domain)
	_, err := do(ctx, d.guard, what, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, d.forget(ctx, domain)
	})
	return err
}

func (d *Dir) forget(ctx context.Context, domain plugin.UUID) error {
	if _, err := d.checkMarker(ctx); err != nil {
		return err
	}
	// Corrupt files must not keep a domain from being forgotten, so this
	// goes by names alone.
	names, err := d.list(ctx, d.domainDir(domain))
	if err != nil {
		return err
	}
	var newest plugin.Epoch
	for _, name := range names {
		if epoch, _, ok := parseName(name); ok {
			newest = max(newest, epoch)
		}
	}
	if newest == 0 {
		return nil
	}
	// The void comes before the removals: whoever sees some of the files
	// gone sees the void as well.
	_, err = d.publish(ctx, d.domainDir(domain), fileName(newest, kindForgotten), contents{
		Kind: kindForgotten, Domain: domain.String(), Epoch: newest, Token: newToken(),
	})
	if err != nil {
		return err
	}
	return d.removeUpTo(ctx, domain, newest, true)
}

// tidy removes what no decision needs any more: epochs long past, and
// temporary files that a crash left. Failing to is no failure of Open.
func (d *Dir) tidy(ctx context.Context, domain plugin.UUID, newest plugin.Epoch) {
	if newest > keepEpochs {
		_ = d.removeUpTo(ctx, domain, newest-keepEpochs, false)
	}
}

// removeUpTo removes the files of all epochs up to last, and old temporary
// files. The void of last itself stays; that of an earlier epoch goes only if
// a later one is there to stand for it, which is what voidsToo says.
func (d *Dir) removeUpTo(ctx context.Context, domain plugin.UUID, last plugin.Epoch, voidsToo bool) error {
	dir := d.domainDir(domain)
	names, err := d.list(ctx, dir)
	if err != nil {
		return err
	}
	var latest time.Time
	times := make(map[string]time.Time)
	for _, name := range names {
		if info, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			times[name] = info.ModTime()
			if info.ModTime().After(latest) {
				latest = info.ModTime()
			}
		}
	}
	remove := func(name string) error {
		path := filepath.Join(dir, name)
		return d.step(ctx, OpRemove, path, func() error {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		})
	}
	// An epoch exists by its "open" file. Removing that first keeps a reader
	// between two removals from taking a decided epoch for an undecided one.
	for _, k := range []kind{kindOpen, kindOwner, kindClosed, kindForgotten} {
		for _, name := range names {
			epoch, is, ok := parseName(name)
			if !ok || is != k || epoch > last || k == kindForgotten && (!voidsToo || epoch == last) {
				continue
			}
			if err := remove(name); err != nil {
				return err
			}
		}
	}
	for _, name := range names {
		if strings.HasPrefix(name, tempPrefix) && latest.Sub(times[name]) > staleTemp {
			if err := remove(name); err != nil {
				return err
			}
		}
	}
	return d.syncDir(ctx, dir)
}

// errChanging: files vanished between the listing and the reading.
var errChanging = errors.New("directory is changing")

// load reads a domain's directory.
func (d *Dir) load(ctx context.Context, domain plugin.UUID) (state, error) {
	known, err := d.seen.recall()
	if err != nil {
		return state{}, err
	}
	id, err := d.checkMarker(ctx)
	if err != nil {
		return state{}, err
	}
	for range 3 {
		s, err := d.read(ctx, domain)
		if errors.Is(err, errChanging) {
			continue
		}
		s.from = id
		if err == nil {
			err = known.check(domain, s)
		}
		if err != nil {
			return state{}, err
		}
		d.seen.note(domain, s)
		return s, nil
	}
	// Forget does not leave that behind.
	return state{}, &CorruptError{Path: d.domainDir(domain), Reason: "files of the newest epoch are missing"}
}

func (d *Dir) read(ctx context.Context, domain plugin.UUID) (state, error) {
	dir := d.domainDir(domain)
	names, err := d.list(ctx, dir)
	if err != nil {
		return state{}, err
	}
	var s state
	var newest plugin.Epoch
	for _, name := range names {
		switch epoch, k, ok := parseName(name); {
		case !ok:
		case k == kindForgotten:
			s.floor = max(s.floor, epoch)
		default:
			newest = max(newest, epoch)
		}
	}
	if newest <= s.floor {
		return s, nil
	}
	get := func(k kind) (contents, bool, error) {
		c, err := d.readFile(ctx, filepath.Join(dir, fileName(newest, k)), k, domain.String(), newest)
		if errors.Is(err, fs.ErrNotExist) {
			return contents{}, false, nil
		}
		return c, err == nil, err
	}
	// Each is opened by name rather than trusted to the listing, which an NFS
	// client may serve from its cache. "closed" and "owner" are read before
	// "open", since removal goes the other way round: if "open" is still
	// there at the end, nothing was missed.
	closed, isClosed, err := get(kindClosed)
	if err != nil {
		return state{}, err
	}
	owner, isOwned, err := get(kindOwner)
	if err != nil {
		return state{}, err
	}
	open, isOpen, err := get(kindOpen)
	if err != nil {
		return state{}, err
	}
	if !isOpen {
		return state{}, errChanging
	}
	s.token = open.Token
	s.rec = Record{
		Domain: domain, Epoch: newest, Primary: open.Primary, Backup: open.Backup,
		OpenedAt: open.Time, Owner: owner.Host, DecidedAt: owner.Time,
		Closed: isClosed, ClosedAt: closed.Time,
	}
	path := filepath.Join(dir, fileName(newest, kindOwner))
	if isOwned && !s.rec.Member(owner.Host) {
		return state{}, &CorruptError{Path: path, Reason: fmt.Sprintf("owner %q is not one of the epoch's hosts", owner.Host)}
	}
	if isClosed && !isOwned {
		// Owner and closing may just have come about between two reads.
		return state{}, errChanging
	}
	return s, nil
}

func (d *Dir) domainDir(domain plugin.UUID) string { return filepath.Join(d.path, domain.String()) }

// checkMarker makes sure that the directory is the arbiter's, and still the
// same one.
func (d *Dir) checkMarker(ctx context.Context) (string, error) {
	path := filepath.Join(d.path, markerName)
	marker, err := d.readMarker(ctx, path)
	if err != nil {
		return "", err
	}
	d.mu.Lock()
	if d.seen == nil { // else that knows better
		d.id = cmp.Or(d.id, marker.Token)
	}
	known := d.id
	d.mu.Unlock()
	if known != "" && known != marker.Token {
		return "", fmt.Errorf("%w: directory %s has identity %s, it had %s before; is other storage mounted there?",
			ErrUnavailable, d.path, marker.Token, known)
	}
	return marker.Token, nil
}

func (d *Dir) readMarker(ctx context.Context, path string) (contents, error) {
	marker, err := d.readAs(ctx, OpReadMarker, path, kindMarker, "", 0)
	if errors.Is(err, fs.ErrNotExist) {
		return contents{}, fmt.Errorf("%w: %s: %w", ErrUnavailable, d.path, ErrNotInitialised)
	}
	return marker, err
}

func (d *Dir) readFile(ctx context.Context, path string, k kind, domain string, epoch plugin.Epoch) (contents, error) {
	return d.readAs(ctx, OpRead, path, k, domain, epoch)
}

func (d *Dir) readAs(ctx context.Context, op Op, path string, k kind, domain string, epoch plugin.Epoch) (contents, error) {
	var text []byte
	err := d.step(ctx, op, path, func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		text, err = io.ReadAll(io.LimitReader(f, maxFile+1))
		return err
	})
	if err != nil {
		return contents{}, err
	}
	return decode(text, path, k, domain, epoch)
}

// list gives the names in dir; a directory that does not exist is empty.
func (d *Dir) list(ctx context.Context, dir string) ([]string, error) {
	var names []string
	err := d.step(ctx, OpList, dir, func() error {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return err
	})
	return names, err
}

func (d *Dir) makeDomainDir(ctx context.Context, domain plugin.UUID) error {
	dir := d.domainDir(domain)
	err := d.step(ctx, OpMkdir, dir, func() error {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return nil
	})
	if err != nil {
		return err
	}
	// Also when it existed: its maker may have crashed before the sync.
	return d.syncDir(ctx, d.path)
}

// publish gives c the name in dir if nothing has it yet, durably, and returns
// what has the name now: c itself, told by its token, or what was there first.
func (d *Dir) publish(ctx context.Context, dir, name string, c contents) (contents, error) {
	if c.Token == "" {
		c.Token = newToken()
	}
	c.Time = d.clock()
	text, err := c.encode()
	if err != nil {
		return contents{}, err
	}
	temp, final := filepath.Join(dir, tempPrefix+c.Token), filepath.Join(dir, name)
	if err := d.writeTemp(ctx, temp, text); err != nil {
		return contents{}, errors.Join(err, d.removeTemp(ctx, temp))
	}
	linkErr := d.step(ctx, OpLink, final, func() error { return os.Link(temp, final) })
	got, err := d.linked(ctx, temp, final, c, linkErr)
	if err != nil {
		return contents{}, errors.Join(err, d.removeTemp(ctx, temp))
	}
	if err := d.syncDir(ctx, dir); err != nil {
		return contents{}, err
	}
	// The fact is published; a temporary file that stays is only litter.
	_ = d.removeTemp(ctx, temp)
	return got, nil
}

// linked finds out what has the final name after link(2) returned linkErr.
func (d *Dir) linked(ctx context.Context, temp, final string, c contents, linkErr error) (contents, error) {
	if ctx.Err() != nil {
		return contents{}, gone(ctx, "link")
	}
	// Two links mean that ours was made, whatever link(2) returned: see
	// open(2) on O_EXCL and NFS. One link means nothing, it may be cached.
	var links uint64
	if err := d.step(ctx, OpStat, temp, func() error {
		info, err := os.Lstat(temp)
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			links = uint64(st.Nlink) //nolint:unconvert // narrower on other architectures
		}
		return nil
	}); err == nil && links == 2 {
		return c, nil
	}
	got, err := d.readFile(ctx, final, c.Kind, c.Domain, c.Epoch)
	if errors.Is(err, fs.ErrNotExist) {
		// No such file: the link failed for another reason than a race.
		if linkErr == nil {
			linkErr = err
		}
		return contents{}, fmt.Errorf("%w: %w", ErrUnavailable, linkErr)
	}
	return got, err
}

func (d *Dir) writeTemp(ctx context.Context, temp string, text []byte) (err error) {
	var f *os.File
	if err := d.step(ctx, OpCreate, temp, func() (err error) {
		f, err = os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		return err
	}); err != nil {
		if f != nil {
			_ = f.Close()
		}
		return err
	}
	// NFS reports a full disk as late as at close.
	defer func() {
		if closeErr := f.Close(); closeErr != nil && err == nil {
			err = fmt.Errorf("%w: %w", ErrUnavailable, closeErr)
		}
	}()
	if err := d.step(ctx, OpWrite, temp, func() error {
		_, err := f.Write(text)
		return err
	}); err != nil {
		return err
	}
	return d.step(ctx, OpSync, temp, f.Sync)
}

// removeTemp tries to remove a temporary file, also for a caller who has gone.
func (d *Dir) removeTemp(ctx context.Context, temp string) error {
	err := d.step(context.WithoutCancel(ctx), OpRemove, temp, func() error { return os.Remove(temp) })
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// syncDir makes the names in dir durable.
func (d *Dir) syncDir(ctx context.Context, dir string) error {
	return d.step(ctx, OpSyncDir, dir, func() error {
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		err = f.Sync()
		// Some file systems have no such thing because their directory
		// operations are synchronous.
		if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
			return nil
		}
		return err
	})
}

// step takes one step on the storage unless the caller has gone. Whatever the
// file system reports is ErrUnavailable to the caller, except that a file does
// not exist, which the callers here tell apart by its cause.
func (d *Dir) step(ctx context.Context, op Op, path string, fn func() error) error {
	if ctx.Err() != nil {
		return gone(ctx, string(op))
	}
	err := func() error {
		if d.fault == nil {
			return fn()
		}
		if err := d.fault(Fault{Op: op, Path: path}); err != nil {
			return err
		}
		if ctx.Err() != nil { // The fault may have taken long, as storage does.
			return context.Cause(ctx)
		}
		if err := fn(); err != nil {
			return err
		}
		return d.fault(Fault{Op: op, Path: path, After: true})
	}()
	if err != nil {
		return fmt.Errorf("%w: %s %s: %w", ErrUnavailable, op, path, err)
	}
	return nil
}

func newToken() string { return rand.Text() }
