// SPDX-License-Identifier: Apache-2.0

package storagetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// guestMark is a file that only guests have.
const guestMark = "/ftvirt-storage-guest"

// clientModules are what the guest's kernel needs as a client of the storage.
var clientModules = []string{
	"virtio_pci", "virtio_net", "nfsv3", "nfsv4", "iscsi_tcp", "sd_mod", "sg", "ext4",
}

// sanModules are what it needs as a target.
var sanModules = []string{"virtio_blk", "target_core_iblock", "iscsi_target_mod"}

// lateModules are asked for by name at run time, so no dependency leads to
// them, and not every kernel has them.
var lateModules = []string{"crc32c_generic", "crc32c-cryptoapi", "crc32c", "libcrc32c"}

// initScript is the guest's /init.
const initScript = `#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /run/lock/iscsi /mnt
for m in $(cat /modules/order); do insmod /modules/$m || echo "module $m failed"; done
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
route add default gw 10.0.2.2
# As process 1 the agent would have to look after orphans.
/bin/storagetest
poweroff -f
`

// prepare makes the guest's kernel and initrd in dir.
func prepare(ctx context.Context, dir string) error {
	top, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	art, err := guest.Build(ctx, filepath.Join(top, "build", "guest"))
	if err != nil {
		return err
	}
	kernel, err := os.ReadFile(art.Kernel)
	if err != nil {
		return err
	}
	release, err := kernelRelease(kernel)
	if err != nil {
		return fmt.Errorf("%s: %w", art.Kernel, err)
	}
	modules, err := modulesOf(ctx, filepath.Join(top, "build", "storage"), release)
	if err != nil {
		return fmt.Errorf("modules of kernel %s: %w", release, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "vmlinuz"), kernel, 0o644); err != nil {
		return err
	}
	return makeInitrd(ctx, dir, modules)
}

// kernelRelease reads the version from a bzImage (Documentation/arch/x86/boot.rst,
// kernel_version).
func kernelRelease(image []byte) (string, error) {
	if len(image) < 0x210 {
		return "", errors.New("no bzImage")
	}
	at := int(binary.LittleEndian.Uint16(image[0x20E:])) + 0x200
	if at >= len(image) {
		return "", errors.New("no version in the bzImage")
	}
	text, _, _ := bytes.Cut(image[at:], []byte{0})
	release, _, _ := strings.Cut(string(text), " ")
	return release, nil
}

// modulesOf gives a directory with the modules and, for clients and the target,
// the order to load them in, taken from the kernel's package once.
func modulesOf(ctx context.Context, cache, release string) (string, error) {
	// Another list is another directory.
	lists := sha256.Sum256(fmt.Append(nil, clientModules, sanModules, lateModules))
	final := filepath.Join(cache, fmt.Sprintf("%s-%x", release, lists[:4]))
	if _, err := os.Stat(final); err == nil {
		return final, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, ".work-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	// As root, apt would drop to a user who may not write here.
	if err := run(ctx, tmp, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "linux-image-"+release); err != nil {
		return "", fmt.Errorf("%w; if the mirror has dropped it, remove build/guest and build it anew", err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("apt-get download left %d packages", len(debs))
	}
	root := filepath.Join(tmp, "root")
	if err := run(ctx, "", "dpkg-deb", "-x", debs[0], root); err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(root, "lib")); err != nil {
		root = filepath.Join(root, "usr") // since Debian 13
	}
	if err := run(ctx, "", "busybox", "depmod", "-b", root, release); err != nil {
		return "", err
	}
	out := filepath.Join(tmp, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		return "", err
	}
	if err := copyModules(ctx, filepath.Join(root, "lib", "modules", release), out); err != nil {
		return "", err
	}
	err = os.Rename(out, final)
	if errors.Is(err, os.ErrExist) {
		return final, nil // another run was faster
	}
	return final, err
}

// copyModules copies the wanted modules and what they depend on.
func copyModules(ctx context.Context, from, to string) error {
	text, err := os.ReadFile(filepath.Join(from, "modules.dep"))
	if err != nil {
		return err
	}
	plain := func(path string) string {
		name, _, _ := strings.Cut(filepath.Base(path), ".ko")
		return strings.ReplaceAll(name, "-", "_")
	}
	path, depends := make(map[string]string), make(map[string][]string)
	for line := range strings.Lines(string(text)) {
		file, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		path[plain(file)], depends[plain(file)] = file, strings.Fields(rest)
	}
	builtin, err := os.ReadFile(filepath.Join(from, "modules.builtin"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(builtin)) {
		name := plain(strings.TrimSpace(line))
		if _, both := path[name]; !both {
			path[name] = ""
		}
	}
	var order []string
	seen := make(map[string]bool)
	var add func(name string) error
	add = func(name string) error {
		file, ok := path[name]
		if !ok {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		if seen[name] || file == "" {
			return nil
		}
		seen[name] = true
		for _, d := range depends[name] {
			if err := add(plain(d)); err != nil {
				return err
			}
		}
		content, err := os.ReadFile(filepath.Join(from, file))
		if strings.HasSuffix(file, ".xz") {
			content, err = exec.CommandContext(ctx, "xz", "-dc", filepath.Join(from, file)).Output()
		}
		if err != nil {
			return err
		}
		order = append(order, name+".ko")
		return os.WriteFile(filepath.Join(to, name+".ko"), content, 0o644)
	}
	for _, name := range lateModules {
		if name = plain(name); path[name] != "" {
			if err := add(name); err != nil {
				return err
			}
		}
	}
	for _, list := range []struct {
		file  string
		names []string
	}{{"order", clientModules}, {"order.san", sanModules}} {
		for _, name := range list.names {
			if err := add(plain(name)); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(to, list.file), []byte(strings.Join(order, "\n")+"\n"), 0o644); err != nil {
			return err
		}
		order = nil
	}
	return nil
}

// makeInitrd makes dir/initrd with busybox, this test and open-iscsi.
func makeInitrd(ctx context.Context, dir, modules string) error {
	root := filepath.Join(dir, "root")
	for _, name := range []string{"bin", "dev", "proc", "sys", "run", "tmp", "mnt", "modules", "etc/iscsi", "var/lib"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			return err
		}
	}
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", filepath.Join(root, "bin", "storagetest"), ".")
	// The guest has no C library for it.
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the guest's test: %w: %s", err, out)
	}
	files := []string{"/bin/busybox", "/usr/sbin/iscsid", "/usr/bin/iscsiadm"}
	if _, err := os.Stat(files[2]); err != nil {
		files[1], files[2] = "/sbin/iscsid", "/sbin/iscsiadm"
	}
	for _, tool := range files[1:] {
		libraries, err := librariesOf(ctx, tool)
		if err != nil {
			return fmt.Errorf("%s: %w (run 'make deps')", tool, err)
		}
		files = append(files, libraries...)
	}
	for _, file := range files {
		to := filepath.Join(root, file)
		switch file {
		case "/bin/busybox", files[1], files[2]:
			to = filepath.Join(root, "bin", filepath.Base(file))
		}
		content, err := os.ReadFile(file)
		if err == nil {
			err = errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, content, 0o755))
		}
		if err != nil {
			return err
		}
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(root, "init"), []byte(initScript), 0o755),
		os.WriteFile(filepath.Join(root, guestMark), nil, 0o644),
		os.WriteFile(filepath.Join(root, "etc", "passwd"), []byte("root:x:0:0:root:/:/bin/sh\n"), 0o644),
		os.WriteFile(filepath.Join(root, "etc", "iscsi", "iscsid.conf"), []byte(iscsidConf), 0o644),
		run(ctx, root, "cp", "-r", modules+"/.", "modules"),
	); err != nil {
		return err
	}
	return run(ctx, root, "sh", "-c", "find . | busybox cpio -o -H newc >../initrd 2>/dev/null && rm -rf ../root")
}

// librariesOf gives the shared libraries of a program.
func librariesOf(ctx context.Context, program string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", program).Output()
	if err != nil {
		return nil, err
	}
	var files []string
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			files = append(files, word)
		}
	}
	return files, nil
}

// run runs a command in dir, and tells what it printed if it fails.
func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
