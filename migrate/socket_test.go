// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

// stranger is a user without any right, as which QEMU runs here.
const stranger = 64055

// as runs a command as another user.
func as(ctx context.Context, user int, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(user), Gid: uint32(user)}}
	return cmd.Run()
}

// publicDir is one that others than root can get to, unlike t.TempDir.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ftvirt-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestSocketsAreNotGivenAway: QEMU's user cannot put a link where root changes an
// owner, and still reaches the socket, which nobody else does.
func TestSocketsAreNotGivenAway(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("only root can give files away: run it as root")
	}
	dir := filepath.Join(publicDir(t), "clone")
	c := &clone{Source: &Source{}, o: Options{Dir: dir, QEMUUser: stranger}}
	c.tunnels, c.cancel = context.WithCancel(t.Context())
	t.Cleanup(c.cleanup)
	if err := c.makeDir(); err != nil {
		t.Fatal(err)
	}
	path, err := c.listen("nbd-0.sock", "nbd", "vda", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := as(t.Context(), stranger, "ln", "-s", "/etc/shadow", filepath.Join(dir, "nbd-1.sock")); err == nil {
		t.Error("QEMU's user made a link in the directory of the sockets")
	}
	if err := as(t.Context(), stranger, "mv", path, path+".away"); err == nil {
		t.Error("QEMU's user renamed a socket")
	}
	if err := as(t.Context(), stranger, "test", "-w", path); err != nil {
		t.Errorf("QEMU's user does not reach its socket: %v", err)
	}
	if err := as(t.Context(), stranger+1, "test", "-w", path); err == nil {
		t.Error("somebody else reaches the socket")
	}
}

// TestDialOwnSocketsOnly: a QEMU that puts something else in the place of its socket
// does not get root's connection to it.
func TestDialOwnSocketsOnly(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("only root can give files away: run it as root")
	}
	dir := publicDir(t)
	listen := func(path string) {
		t.Helper()
		l, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
	}
	secret := filepath.Join(dir, "secret.sock")
	listen(secret)
	r := &Receiver{Domain: plugin.UUID{1}, Dir: filepath.Join(dir, "clone"), created: true, replay: user(stranger)}
	if err := r.makeDir(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		make func(path string) error
		ok   bool
	}{
		"own": {func(path string) error { listen(path); return os.Chown(path, stranger, -1) }, true},
		"link": {func(path string) error {
			if err := os.Symlink(secret, path); err != nil {
				return err
			}
			return os.Lchown(path, stranger, -1)
		}, false},
		"root's": {func(path string) error { return os.Link(secret, path) }, false},
		"file":   {func(path string) error { return os.WriteFile(path, nil, 0o600) }, false},
	} {
		path := filepath.Join(r.Dir, "nbd.sock")
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if err := tc.make(path); err != nil {
			t.Fatal(err)
		}
		conn, err := r.Dial(t.Context(), "nbd")
		if err == nil {
			_ = conn.Close()
		}
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
		t.Logf("%s: %v", name, err)
	}
}

// user is a Replayer that only has a user.
type user int

func (u user) User() int                         { return int(u) }
func (user) Replaying(ctx context.Context) error { return ctx.Err() }
