// SPDX-License-Identifier: Apache-2.0

package storagetest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/arbitertest"
	"ftvirt.org/ftvirt/arbiter/backend"
	"ftvirt.org/ftvirt/plugin/config"
)

const (
	nfsPort   = 2049
	mountPort = 20048
	// exportSize is in bytes; a test fills it.
	exportSize = 32 << 20
)

// ganeshaConf has no grace period: no client here holds locks or opens that it
// could reclaim, and the tests would wait for it.
const ganeshaConf = `
NFS_CORE_PARAM {
	NFS_Port = %d; MNT_Port = %d;
	Protocols = 3, 4; Mount_Path_Pseudo = true;
	Enable_NLM = false; Enable_RQUOTA = false;
}
NFSV4 { Graceless = true; RecoveryBackend = fs; RecoveryRoot = "%s"; Only_Numeric_Owners = true; }
EXPORT {
	Export_Id = 1; Path = "%s"; Pseudo = /arbiter;
	Protocols = 3, 4; Transports = TCP; SecType = sys; Squash = None; Access_Type = RW;
	FSAL { Name = VFS; }
}
`

// ganesha is a running nfs-ganesha.
type ganesha struct {
	conf, log string
	cmd       *exec.Cmd
}

func startGanesha(t *testing.T) *ganesha {
	t.Helper()
	dir := t.TempDir()
	export, recovery := filepath.Join(dir, "export"), filepath.Join(dir, "recovery")
	g := &ganesha{conf: filepath.Join(dir, "ganesha.conf"), log: filepath.Join(dir, "ganesha.log")}
	if err := errors.Join(
		os.Mkdir(export, 0o755), os.Mkdir(recovery, 0o755), os.MkdirAll("/run/rpcbind", 0o755),
		unix.Mount("export", export, "tmpfs", 0, fmt.Sprintf("size=%d", exportSize)),
		os.WriteFile(g.conf, fmt.Appendf(nil, ganeshaConf, nfsPort, mountPort, recovery, export), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(export, unix.MNT_DETACH) })
	// ganesha insists on it, though the client names the ports.
	start(t, exec.Command("rpcbind", "-f"))
	waitFor(t, 10*time.Second, "rpcbind", dial(111))
	t.Cleanup(func() {
		if text, err := os.ReadFile(g.log); t.Failed() {
			t.Logf("nfs-ganesha: %v\n%s", err, text)
		}
	})
	g.start(t)
	return g
}

// dial gives a check that something listens on a port.
func dial(port int) func() error {
	return func() error {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

func (g *ganesha) start(t testing.TB) {
	t.Helper()
	g.cmd = exec.Command("ganesha.nfsd", "-F", "-f", g.conf, "-L", g.log, "-p", g.conf+".pid", "-N", "NIV_EVENT")
	start(t, g.cmd)
	waitFor(t, 30*time.Second, "nfs-ganesha", dial(nfsPort))
}

// kill ends the server as a crash of its host would.
func (g *ganesha) kill() {
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
}

func (g *ganesha) process() *os.Process { return g.cmd.Process }

func (g *ganesha) restart(t testing.TB) { g.start(t) }

// mounted gives where the export is in the guest, and mounts it if it is not.
func mounted(version string) (string, error) {
	at := "/mnt/v" + version
	if _, err := os.Stat(at); err == nil {
		return at, nil
	}
	options := fmt.Sprintf("vers=%s,proto=tcp,port=%d,addr=10.0.2.2", version, nfsPort)
	if version == "3" {
		options += fmt.Sprintf(",nolock,mountproto=tcp,mountport=%d,mountaddr=10.0.2.2", mountPort)
	} else {
		options += ",clientaddr=10.0.2.15"
	}
	if err := os.Mkdir(at, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount("10.0.2.2:/arbiter", at, "nfs", 0, options); err != nil {
		return "", errors.Join(fmt.Errorf("mounting NFS version %s: %w", version, err), os.Remove(at))
	}
	return at, nil
}

// raceDir is made by whoever comes first.
const raceDir = "race"

// directoryAt gives the path of a target, "VERSION/NAME".
func directoryAt(target string) (string, error) {
	version, name, _ := strings.Cut(target, "/")
	at, err := mounted(version)
	return filepath.Join(at, name), err
}

func mustDirectoryAt(t testing.TB, target string) string {
	t.Helper()
	path, err := directoryAt(target)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func connectDirectory(target string, fault arbiter.FaultFunc) (arbiter.Arbiter, error) {
	path, err := directoryAt(target)
	if err != nil {
		return nil, err
	}
	if filepath.Base(path) == raceDir {
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
		if _, err := arbiter.InitDir(context.Background(), arbiter.DirConfig{Path: path, Timeout: time.Minute}); err != nil {
			return nil, err
		}
	}
	if fault == nil {
		return backend.New(config.Arbiter{Kind: config.ArbiterDirectory, Path: path}, time.Minute)
	}
	return arbiter.NewDir(arbiter.DirConfig{Path: path, Timeout: time.Minute, Fault: fault})
}

// directory is the backend on the mount, in a guest.
var directory = arbitertest.Backend{
	Name: "directory",
	New: func(t testing.TB) string {
		version := os.Getenv(envStorage)
		at, err := mounted(version)
		if err != nil {
			t.Fatal(err)
		}
		path, err := os.MkdirTemp(at, "arbiter-")
		if err == nil {
			_, err = arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: path, Timeout: time.Minute})
		}
		if err != nil {
			t.Fatal(err)
		}
		return version + "/" + filepath.Base(path)
	},
	Connect: func(target string) (arbiter.Arbiter, error) { return connectDirectory(target, nil) },
	Break: func(t testing.TB, target string) func() {
		path := mustDirectoryAt(t, target)
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.Rename(path+".away", path); err != nil {
				t.Error(err)
			}
		}
	},
	ReadOnly: func(t testing.TB, target string) func() {
		at := filepath.Dir(mustDirectoryAt(t, target))
		remount := func(flags uintptr) {
			if err := unix.Mount("none", at, "none", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
				t.Error(err)
			}
		}
		remount(unix.MS_RDONLY)
		return func() { remount(0) }
	},
	Full: func(t testing.TB, target string) func() {
		fill := mustDirectoryAt(t, target) + ".fill"
		f, err := os.Create(fill)
		if err != nil {
			t.Fatal(err)
		}
		// The client takes more than there is room for; the server tells it
		// at the sync, if not before.
		_, writeErr := f.Write(make([]byte, exportSize))
		if err := errors.Join(writeErr, f.Sync()); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("filling the export: %v, want ENOSPC", err)
		}
		_ = f.Close()
		return func() {
			if err := os.Remove(fill); err != nil {
				t.Error(err)
			}
		}
	},
	CrashPoints: []string{"before sync", "before link", "after link", "before sync-dir"},
	Crashing: func(target, point string) (arbiter.Arbiter, error) {
		when, op, _ := strings.Cut(point, " ")
		return connectDirectory(target, func(f arbiter.Fault) error {
			if f.Op == arbiter.Op(op) && f.After == (when == "after") {
				return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), context.Canceled)
			}
			return nil
		})
	},
	Processes: true,
}
