// SPDX-License-Identifier: Apache-2.0

package arbiter_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/arbitertest"
	"ftvirt.org/ftvirt/plugin"
)

var dirBackend = arbitertest.Backend{
	Name: "directory",
	New:  initDir,
	Connect: func(target string) (arbiter.Arbiter, error) {
		return arbiter.NewDir(arbiter.DirConfig{Path: target, Timeout: time.Minute, Fault: hindered(target)})
	},
	Slow:     hinder("slow"),
	ReadOnly: hinder("read-only"),
	Full:     hinder("full"),
	Break: func(t testing.TB, target string) func() {
		// What a host sees whose mount went away: an empty directory.
		away := target + ".away"
		if err := errors.Join(os.Rename(target, away), os.Mkdir(target, 0o755)); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := errors.Join(os.Remove(target), os.Rename(away, target)); err != nil {
				t.Error(err)
			}
		}
	},
	Damage: map[string]func(testing.TB, string, plugin.UUID, plugin.Epoch){
		"empty": damage(func([]byte) []byte { return nil }),
		"cut":   damage(func(text []byte) []byte { return text[:len(text)/2] }),
		"bit flip": damage(func(text []byte) []byte {
			return []byte(strings.Replace(string(text), "host-a", "host-b", 1))
		}),
		"zeroes":        damage(func(text []byte) []byte { return make([]byte, len(text)) }),
		"huge":          damage(func([]byte) []byte { return make([]byte, 1<<20) }),
		"newer version": damage(func([]byte) []byte { return []byte(`{"version":2,"quorum":3}`) }),
		"other epoch's": func(t testing.TB, target string, domain plugin.UUID, epoch plugin.Epoch) {
			dir := filepath.Join(target, domain.String())
			text, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("epoch-%08d.open", epoch)))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("epoch-%08d.owner", epoch)), text, 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		"hosts missing": func(t testing.TB, target string, domain plugin.UUID, epoch plugin.Epoch) {
			if err := os.Remove(filepath.Join(target, domain.String(), fmt.Sprintf("epoch-%08d.open", epoch))); err != nil {
				t.Fatal(err)
			}
		},
	},
	CrashPoints: []string{"before write", "before sync", "before link", "after link", "before sync-dir", "before remove"},
	Crashing: func(target, point string) (arbiter.Arbiter, error) {
		when, op, _ := strings.Cut(point, " ")
		return arbiter.NewDir(arbiter.DirConfig{Path: target, Fault: func(f arbiter.Fault) error {
			if f.Op == arbiter.Op(op) && f.After == (when == "after") {
				// Nothing deferred runs, as in a real crash.
				return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), context.Canceled)
			}
			return nil
		}})
	},
	Processes: true,
}

func TestMain(m *testing.M) {
	os.Exit(arbitertest.Main(m, dirBackend, quorumBackend, lunBackend, cachedBackend, reservedBackend))
}

// hinder tells clients of a target, in whatever process, what ails it.
func hinder(how string) func(testing.TB, string) func() {
	return func(t testing.TB, target string) func() {
		path := target + ".hindered"
		if err := os.WriteFile(path, []byte(how), 0o644); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		}
	}
}

// hindered behaves as hinder told for path.
func hindered(path string) arbiter.FaultFunc {
	return func(f arbiter.Fault) error {
		how, err := os.ReadFile(path + ".hindered")
		if err != nil || f.After {
			return nil
		}
		switch f.Op {
		case arbiter.OpReadMarker:
			if string(how) == "slow" {
				<-time.After(arbitertest.SlowBy)
			}
		case arbiter.OpCreate, arbiter.OpMkdir, arbiter.OpRename:
			switch string(how) {
			case "full":
				return syscall.ENOSPC
			case "read-only":
				return syscall.EROFS
			}
		}
		return nil
	}
}

func TestDir(t *testing.T) { arbitertest.Run(t, dirBackend) }

func initDir(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "shared")
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: path}); err != nil {
		t.Fatal(err)
	}
	return path
}

func damage(change func([]byte) []byte) func(testing.TB, string, plugin.UUID, plugin.Epoch) {
	return func(t testing.TB, target string, domain plugin.UUID, epoch plugin.Epoch) {
		path := filepath.Join(target, domain.String(), fmt.Sprintf("epoch-%08d.owner", epoch))
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, change(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

var testDomain = plugin.UUID{0xf7, 1}

// opened gives a directory with one undecided epoch of testDomain, and a
// client of it whose storage fault interferes with.
func opened(t *testing.T, cfg arbiter.DirConfig) (*arbiter.Dir, string, plugin.Epoch) {
	t.Helper()
	path := initDir(t)
	plain := newDir(t, arbiter.DirConfig{Path: path})
	epoch, err := plain.Open(t.Context(), testDomain, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Path = path
	return newDir(t, cfg), path, epoch
}

func newDir(t *testing.T, cfg arbiter.DirConfig) *arbiter.Dir {
	t.Helper()
	d, err := arbiter.NewDir(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestNewDirRefusesBadConfig(t *testing.T) {
	for _, cfg := range []arbiter.DirConfig{
		{}, {Path: "relative"}, {Path: "/x", Timeout: -1}, {Path: "/x", MaxStuck: -1},
	} {
		if _, err := arbiter.NewDir(cfg); !errors.Is(err, arbiter.ErrInvalid) {
			t.Errorf("NewDir(%+v): %v, want ErrInvalid", cfg, err)
		}
	}
}

func TestInitDir(t *testing.T) {
	path := t.TempDir()
	d := newDir(t, arbiter.DirConfig{Path: path})
	if _, err := d.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrNotInitialised) || !errors.Is(err, arbiter.ErrUnavailable) {
		t.Fatalf("Lookup in a bare directory: %v", err)
	}
	first, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	again, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: path, ID: first})
	if err != nil || again != first {
		t.Fatalf("identity %q, then %q (%v)", first, again, err)
	}
	if id, err := d.ID(t.Context()); err != nil || id != first {
		t.Fatalf("ID gives %q, %v", id, err)
	}
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: path, ID: "other"}); !errors.Is(err, arbiter.ErrInvalid) {
		t.Fatalf("InitDir with another identity: %v", err)
	}
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: path + "/none"}); !errors.Is(err, arbiter.ErrUnavailable) {
		t.Fatalf("InitDir of no directory: %v", err)
	}
}

// TestOtherStorage: a directory that was an arbiter's before must not become
// another one under a running agent.
func TestOtherStorage(t *testing.T) {
	d, path, epoch := opened(t, arbiter.DirConfig{})
	if _, err := d.ID(t.Context()); err != nil {
		t.Fatal(err)
	}
	other := initDir(t)
	if err := errors.Join(os.Rename(path, path+".old"), os.Rename(other, path)); err != nil {
		t.Fatal(err)
	}
	if err := d.Acquire(t.Context(), testDomain, epoch, "a"); !errors.Is(err, arbiter.ErrUnavailable) {
		t.Fatalf("Acquire on other storage: %v", err)
	}
	if _, err := d.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrUnavailable) || errors.Is(err, arbiter.ErrNoRecord) {
		t.Fatalf("Lookup on other storage: %v", err)
	}
}

// TestStepsFail lets each step of Acquire fail in turn, as on a full, read-only
// or broken disk. Nothing may be claimed, and a retry must come through.
func TestStepsFail(t *testing.T) {
	steps := []arbiter.Op{
		arbiter.OpReadMarker, arbiter.OpList, arbiter.OpRead, arbiter.OpCreate,
		arbiter.OpWrite, arbiter.OpSync, arbiter.OpLink, arbiter.OpSyncDir,
	}
	for _, cause := range []error{syscall.ENOSPC, syscall.EROFS, syscall.EIO, syscall.ESTALE, syscall.EDQUOT} {
		for _, op := range steps {
			t.Run(fmt.Sprintf("%s/%v", op, cause), func(t *testing.T) {
				broken, hits := true, 0
				d, path, epoch := opened(t, arbiter.DirConfig{Fault: func(f arbiter.Fault) error {
					if broken && f.Op == op && !f.After {
						hits++
						return cause
					}
					return nil
				}})
				err := d.Acquire(t.Context(), testDomain, epoch, "a")
				if !errors.Is(err, arbiter.ErrUnavailable) || !errors.Is(err, cause) {
					t.Fatalf("Acquire: %v, want ErrUnavailable and %v", err, cause)
				}
				if hits == 0 {
					t.Fatalf("Acquire takes no step %s", op)
				}
				broken = false
				if err := d.Acquire(t.Context(), testDomain, epoch, "a"); err != nil {
					t.Fatalf("Acquire after repair: %v", err)
				}
				if left := temporaries(t, path); op != arbiter.OpSyncDir && len(left) > 0 {
					t.Errorf("temporary files stay behind: %v", left)
				}
			})
		}
	}
}

func temporaries(t *testing.T, path string) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(path, "*", ".tmp-*"))
	if err != nil {
		t.Fatal(err)
	}
	return left
}

// TestLyingLink: the file server made the link, its answer was lost, and the
// repeated request found the name taken (NFS without a reply cache).
func TestLyingLink(t *testing.T) {
	lie := func(f arbiter.Fault) error {
		if f.Op == arbiter.OpLink && f.After {
			return syscall.EEXIST
		}
		return nil
	}
	t.Run("two links", func(t *testing.T) {
		d, _, epoch := opened(t, arbiter.DirConfig{Fault: lie})
		if err := d.Acquire(t.Context(), testDomain, epoch, "a"); err != nil {
			t.Fatalf("Acquire: %v", err)
		}
	})
	t.Run("link count not to be had", func(t *testing.T) {
		d, _, epoch := opened(t, arbiter.DirConfig{Fault: func(f arbiter.Fault) error {
			if f.Op == arbiter.OpStat {
				return syscall.ESTALE
			}
			return lie(f)
		}})
		if err := d.Acquire(t.Context(), testDomain, epoch, "a"); err != nil {
			t.Fatalf("Acquire: %v", err)
		}
		if err := d.Close(t.Context(), testDomain, epoch, "a"); err != nil {
			t.Fatal(err)
		}
		if next, err := d.Open(t.Context(), testDomain, "b", "a"); err != nil || next != epoch+1 {
			t.Fatalf("Open gives %d, %v", next, err)
		}
	})
}

// TestWinnerBeforeSync: what the first host linked but did not sync is made
// durable by whoever reports it.
func TestWinnerBeforeSync(t *testing.T) {
	noSync := true
	synced := 0
	d, _, epoch := opened(t, arbiter.DirConfig{Fault: func(f arbiter.Fault) error {
		switch {
		case f.Op != arbiter.OpSyncDir:
		case noSync:
			return syscall.EIO
		case f.After:
			synced++
		}
		return nil
	}})
	if err := d.Acquire(t.Context(), testDomain, epoch, "a"); !errors.Is(err, arbiter.ErrUnavailable) {
		t.Fatalf("Acquire: %v", err)
	}
	noSync = false
	if err := d.Acquire(t.Context(), testDomain, epoch, "b"); !errors.Is(err, arbiter.ErrLost) {
		t.Fatalf("Acquire by the other: %v, want ErrLost", err)
	}
	if synced == 0 {
		t.Fatal("a decision was reported that may not be durable")
	}
}

// TestOvertaken: between a host's look and its link, the epoch is forgotten.
func TestOvertaken(t *testing.T) {
	var overtake func()
	d, path, epoch := opened(t, arbiter.DirConfig{Fault: func(f arbiter.Fault) error {
		if f.Op == arbiter.OpLink && !f.After && overtake != nil {
			overtake()
			overtake = nil
		}
		return nil
	}})
	other := newDir(t, arbiter.DirConfig{Path: path})
	overtake = func() {
		if err := other.Forget(t.Context(), testDomain); err != nil {
			t.Error(err)
		}
	}
	if err := d.Acquire(t.Context(), testDomain, epoch, "b"); !errors.Is(err, arbiter.ErrStale) {
		t.Fatalf("Acquire: %v, want ErrStale", err)
	}
	if _, err := other.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrNoRecord) {
		t.Fatalf("Lookup: %v, want ErrNoRecord", err)
	}
}

// hanging is storage that does not answer until it is let go.
func hanging() (fault arbiter.FaultFunc, hang chan bool, letGo func()) {
	release := make(chan struct{})
	hang = make(chan bool, 1)
	hang <- false
	return func(f arbiter.Fault) error {
		on := <-hang
		hang <- on
		if on {
			<-release
		}
		return nil
	}, hang, func() { close(release) }
}

// hungTimeout leaves a busy machine time to do, on storage that answers, what
// the storage that hangs does not do.
const hungTimeout = 500 * time.Millisecond

func TestHungStorage(t *testing.T) {
	fault, hang, letGo := hanging()
	d, _, epoch := opened(t, arbiter.DirConfig{Fault: fault, MaxStuck: 2, Timeout: hungTimeout})
	<-hang
	hang <- true
	for i := range 2 {
		err := d.Acquire(t.Context(), testDomain, epoch, "a")
		if !errors.Is(err, arbiter.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Acquire %d: %v", i, err)
		}
	}
	start := time.Now()
	for range 100 {
		_, err := d.Lookup(t.Context(), testDomain)
		if !errors.Is(err, arbiter.ErrUnavailable) || !strings.Contains(err.Error(), "not answering since") {
			t.Fatalf("Lookup: %v", err)
		}
	}
	// Waiting for each would take 100 times the limit.
	if took := time.Since(start); took > 10*hungTimeout {
		t.Errorf("100 calls took %v on storage known to hang", took)
	}
	<-hang
	hang <- false
	letGo()
	// Calls whose hosts gave up must not decide anything afterwards.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		rec, err := d.Lookup(ctx, testDomain)
		if err == nil {
			if !rec.Undecided() {
				t.Fatalf("decided by a call that was given up: %+v", rec)
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("Lookup after the storage came back: %v", err)
		}
	}
	if err := d.Acquire(ctx, testDomain, epoch, "b"); err != nil {
		t.Fatal(err)
	}
}

func TestHungStorageHonoursContext(t *testing.T) {
	fault, hang, letGo := hanging()
	defer letGo()
	d, _, epoch := opened(t, arbiter.DirConfig{Fault: fault})
	<-hang
	hang <- true
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- d.Acquire(ctx, testDomain, epoch, "a") }()
	cancel()
	select {
	case err := <-result:
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("Acquire: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the call hangs with the storage")
	}
}

// TestTidy: epochs long past go, those of late stay for diagnosis, and so does
// what might still be wanted of a crash that is not long ago.
func TestTidy(t *testing.T) {
	d, path, epoch := opened(t, arbiter.DirConfig{})
	dir := filepath.Join(path, testDomain.String())
	old, young := filepath.Join(dir, ".tmp-old"), filepath.Join(dir, ".tmp-young")
	for _, name := range []string{old, young} {
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(old, past, past); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		if err := d.Acquire(t.Context(), testDomain, epoch, "a"); err != nil {
			t.Fatal(err)
		}
		var err error
		if epoch, err = d.Open(t.Context(), testDomain, "a", "b"); err != nil {
			t.Fatal(err)
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.open"))
	if err != nil || len(names) != 4 {
		t.Errorf("%d epochs are kept: %v, %v", len(names), names, err)
	}
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("temporary file of an old crash is kept: %v", err)
	}
	if _, err := os.Stat(young); err != nil {
		t.Errorf("temporary file that may be in use: %v", err)
	}
}

// TestForgetLeaves: one file, to keep the past fenced.
func TestForgetLeaves(t *testing.T) {
	d, path, epoch := opened(t, arbiter.DirConfig{})
	for range 2 {
		if err := errors.Join(
			d.Acquire(t.Context(), testDomain, epoch, "a"),
			d.Forget(t.Context(), testDomain),
		); err != nil {
			t.Fatal(err)
		}
		names, err := filepath.Glob(filepath.Join(path, testDomain.String(), "*"))
		if want := fmt.Sprintf("epoch-%08d.forgotten", epoch); err != nil || len(names) != 1 || filepath.Base(names[0]) != want {
			t.Fatalf("left: %v, %v; want only %s", names, err, want)
		}
		if epoch, err = d.Open(t.Context(), testDomain, "a", "b"); err != nil {
			t.Fatal(err)
		}
	}
}

const envUnprivileged = "FTVIRT_ARBITER_UNPRIVILEGED_DIR"

// TestReadOnlyDirectory makes the directory truly unwritable. Root may write
// anywhere, so the test runs itself again as nobody.
func TestReadOnlyDirectory(t *testing.T) {
	if path, child := os.LookupEnv(envUnprivileged); child {
		readOnlyDirectory(t, path)
		return
	}
	path := initDir(t)
	d := newDir(t, arbiter.DirConfig{Path: path})
	decided, err := d.Open(t.Context(), plugin.UUID{1}, "a", "b")
	if err == nil {
		err = d.Acquire(t.Context(), plugin.UUID{1}, decided, "a")
	}
	if err == nil {
		_, err = d.Open(t.Context(), plugin.UUID{2}, "a", "b")
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, filepath.Join(path, plugin.UUID{1}.String()), filepath.Join(path, plugin.UUID{2}.String())} {
		if err := os.Chmod(name, 0o555); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Chmod(name, 0o755) })
	}
	if os.Geteuid() != 0 {
		readOnlyDirectory(t, path)
		return
	}
	// nobody must be able to reach the directory and to run the binary.
	for dir := filepath.Dir(path); strings.HasPrefix(dir, os.TempDir()) && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(filepath.Dir(path), "arbiter.test")
	if err := os.WriteFile(binary, text, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), binary, "-test.run=^TestReadOnlyDirectory$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), envUnprivileged+"="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestReadOnlyDirectory") {
		t.Fatalf("as nobody: %v\n%s", err, out)
	}
}

func readOnlyDirectory(t *testing.T, path string) {
	d := newDir(t, arbiter.DirConfig{Path: path})
	// What is decided can be read,
	if err := d.Acquire(t.Context(), plugin.UUID{1}, 1, "a"); err != nil {
		t.Errorf("Acquire by the owner: %v", err)
	}
	if err := d.Acquire(t.Context(), plugin.UUID{1}, 1, "b"); !errors.Is(err, arbiter.ErrLost) {
		t.Errorf("Acquire by the other: %v, want ErrLost", err)
	}
	// and the rest has to wait.
	if err := d.Acquire(t.Context(), plugin.UUID{2}, 1, "a"); !errors.Is(err, arbiter.ErrUnavailable) || !errors.Is(err, os.ErrPermission) {
		t.Errorf("Acquire of an undecided epoch: %v, want ErrUnavailable and ErrPermission", err)
	}
	if _, err := d.Open(t.Context(), plugin.UUID{3}, "a", "b"); !errors.Is(err, arbiter.ErrUnavailable) {
		t.Errorf("Open: %v, want ErrUnavailable", err)
	}
}
