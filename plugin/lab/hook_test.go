// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
)

// A write to a file system that is frozen hangs as SG_IO on a LUN without a path
// does: in a system call that not even SIGKILL ends. libvirt waits for its hook,
// and for the end of the hook's output, with the domain locked.
func TestHookOnHungStorage(t *testing.T) {
	hook := filepath.Join(labtest.Root(t), "bin", "ftvirt-hook")
	dir := t.TempDir()
	shared, image := filepath.Join(dir, "shared"), filepath.Join(dir, "image")
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, out)
		}
	}
	if err := os.Mkdir(shared, 0o700); err != nil {
		t.Fatal(err)
	}
	run("truncate", "-s", "16M", image)
	run("mkfs.ext4", "-q", image)
	run("mount", "-o", "loop", image, shared)
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", shared).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: shared}); err != nil {
		t.Fatal(err)
	}
	arb, err := arbiter.NewDir(arbiter.DirConfig{Path: shared})
	if err != nil {
		t.Fatal(err)
	}
	// It must be acquired, which is a write.
	id := plugin.UUID{0xf7, 0x16}
	if _, err := arb.Open(t.Context(), id, "hosta", "hostb"); err != nil {
		t.Fatal(err)
	}
	cfg := filepath.Join(dir, "ftvirt.toml")
	text := fmt.Sprintf("host = \"hosta\"\n[agent]\nrun_dir = %[1]q\nstate_dir = %[1]q\n[arbiter]\npath = %[2]q\n", dir, shared)
	if err := os.WriteFile(cfg, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	start := func() (time.Duration, string, error) {
		cmd := exec.CommandContext(t.Context(), hook, "web", "prepare", "begin", "-")
		cmd.Env = append(os.Environ(), "FTVIRT_CONFIG="+cfg)
		cmd.Stdin = strings.NewReader(fmt.Sprintf(
			`<domain type='qemu'><name>web</name><uuid>%s</uuid><metadata><ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="protected" peer="hostb"/></metadata></domain>`, id))
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		began := time.Now()
		err := cmd.Run() // as libvirt: until all that has the pipes is gone
		return time.Since(began), out.String(), err
	}
	run("fsfreeze", "-f", shared)
	thaw := context.AfterFunc(t.Context(), func() { _ = exec.Command("fsfreeze", "-u", shared).Run() })
	defer thaw()
	later := time.AfterFunc(20*time.Second, func() { _ = exec.Command("fsfreeze", "-u", shared).Run() })
	took, out, err := start()
	if later.Stop() {
		run("fsfreeze", "-u", shared)
	}
	if err == nil || !strings.Contains(out, "web is not started") || !strings.Contains(out, "try again") {
		t.Errorf("while the storage hangs: %v: %s", err, out)
	}
	if took > 6*time.Second {
		t.Errorf("the hook of a start took %v, its limit is 5 s", took)
	}
	if took, out, err := start(); err != nil {
		t.Errorf("once the storage answers, after %v: %v: %s", took, err, out)
	}
}
