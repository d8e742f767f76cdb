// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Artifacts are the files of a built guest, all absolute paths.
type Artifacts struct {
	Kernel       string // bzImage
	Initrd       string // gzip-compressed cpio
	DiskTemplate string // raw image with an empty ext4; copy it with NewDisk
}

// DiskSize is the size of the data disk in bytes. A replica is seeded by
// copying it, so it is no larger than the tests need.
const DiskSize = 64 << 20

// buildVersion is part of the cache key: raise it when Build changes what it
// produces from the same sources.
const buildVersion = "1"

// kernelPackage is Debian's kernel for virtual machines; the package that it
// depends on holds the image.
const kernelPackage = "linux-image-cloud-amd64"

// rootModules are what the guest needs beyond the kernel's built-in drivers;
// modulesFor adds what they depend on.
var rootModules = []string{"virtio_pci", "virtio_blk", "virtio_net", "ext4", "button", "evdev"}

// optionalModules are needed by some Debian releases' kernels only, and by
// name at run time, so no dependency leads to them.
var optionalModules = []string{"crc32c_generic", "crc32c-cryptoapi"}

// Build makes the guest in dir, or returns at once when dir holds one made
// from the same sources. It needs the network only through apt, for the
// kernel package. Several processes may build in the same dir; one does.
func Build(ctx context.Context, dir string) (Artifacts, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Artifacts{}, err
	}
	busybox, err := findBusybox()
	if err != nil {
		return Artifacts{}, err
	}
	final, err := cached(ctx, dir, cacheKey([]byte(buildVersion), programSource, initScript, busybox), func(work string) error {
		return build(ctx, work, busybox)
	})
	if err != nil {
		return Artifacts{}, fmt.Errorf("build guest: %w", err)
	}
	return artifactsIn(final), nil
}

// artifactsIn names the files of a built guest.
func artifactsIn(dir string) Artifacts {
	return Artifacts{
		Kernel:       filepath.Join(dir, "vmlinuz"),
		Initrd:       filepath.Join(dir, "initrd.gz"),
		DiskTemplate: filepath.Join(dir, "disk.raw"),
	}
}

// cached returns the directory in dir that has what build once left in "out" of
// the directory that it was given, for this key.
func cached(ctx context.Context, dir, key string, build func(work string) error) (string, error) {
	final := filepath.Join(dir, key)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := lockFile(ctx, filepath.Join(dir, ".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(final); err == nil {
		return final, nil
	}
	work, err := os.MkdirTemp(dir, ".work-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(work) }()
	if err := build(work); err != nil {
		return "", err
	}
	// The rename makes a guest appear whole or not at all.
	return final, os.Rename(filepath.Join(work, "out"), final)
}

func build(ctx context.Context, work string, busybox []byte) error {
	out := filepath.Join(work, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	root, release, err := fetchKernel(ctx, work)
	if err != nil {
		return err
	}
	kernel, err := os.ReadFile(filepath.Join(root, "boot", "vmlinuz-"+release))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "vmlinuz"), kernel, 0o644); err != nil {
		return err
	}
	program, err := compile(ctx, work, "ftguest", programSource)
	if err != nil {
		return err
	}
	modules, err := modulesFor(ctx, root, release)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "initrd.gz"), initramfs(busybox, program, modules), 0o644); err != nil {
		return err
	}
	return makeDisk(ctx, filepath.Join(out, "disk.raw"), DiskSize)
}

// NewDisk copies the template to path, which must not exist, in qemu-img's
// format "raw" or "qcow2".
func (a Artifacts) NewDisk(ctx context.Context, path, format string) error {
	if format != "raw" && format != "qcow2" {
		return fmt.Errorf("disk format %q: want raw or qcow2", format)
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("new disk %s: %w", path, os.ErrExist)
	}
	_, err := run(ctx, "", "qemu-img", "convert", "-q", "-f", "raw", "-O", format, a.DiskTemplate, path)
	return err
}

func cacheKey(parts ...[]byte) string {
	h := sha256.New()
	for _, part := range parts {
		_, _ = fmt.Fprintf(h, "%d\n", len(part)) // a hash never fails
		h.Write(part)
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// findBusybox returns the host's busybox, which must be static: the initramfs
// has no C library.
func findBusybox() ([]byte, error) {
	path, err := findTool("busybox")
	if err != nil {
		return nil, err
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%w: %s is linked dynamically, busybox-static is wanted", ErrMissingTool, path)
		}
	}
	return content, nil
}

// fetchKernel downloads Debian's kernel package into work and unpacks it
// there; nothing is installed.
func fetchKernel(ctx context.Context, work string) (root, release string, err error) {
	release, err = downloadKernel(ctx, work)
	if err != nil && ctx.Err() == nil && os.Geteuid() == 0 {
		// Mirrors drop a kernel when its security update appears; apt's lists
		// may still name it.
		if _, updateErr := run(ctx, "", "apt-get", "-q", "update"); updateErr != nil {
			return "", "", errors.Join(err, updateErr)
		}
		release, err = downloadKernel(ctx, work)
	}
	if err != nil {
		return "", "", err
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", "", fmt.Errorf("apt-get download left %d packages, want 1", len(debs))
	}
	root = filepath.Join(work, "root")
	if _, err := run(ctx, "", "dpkg-deb", "-x", debs[0], root); err != nil {
		return "", "", err
	}
	return root, release, nil
}

func downloadKernel(ctx context.Context, work string) (release string, err error) {
	depends, err := run(ctx, "", "apt-cache", "depends", "--important", kernelPackage)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(depends)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			// As root, apt would drop to a user who may not write here.
			_, err := run(ctx, work, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "linux-image-"+name)
			return name, err
		}
	}
	return "", fmt.Errorf("apt knows no dependency of %s (run 'make deps', which updates apt's lists)", kernelPackage)
}

// compile makes a static program of one C file.
func compile(ctx context.Context, work, name string, text []byte) ([]byte, error) {
	source, binary := filepath.Join(work, name+".c"), filepath.Join(work, name)
	if err := os.WriteFile(source, text, 0o644); err != nil {
		return nil, err
	}
	if _, err := run(ctx, "", "gcc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o", binary, source); err != nil {
		return nil, err
	}
	return os.ReadFile(binary)
}

// makeDisk makes the template with a fixed UUID and hash seed, so that two
// templates differ only in their time stamps. options are more of mkfs.ext4's.
func makeDisk(ctx context.Context, path string, size int64, options ...string) error {
	const id = "f7000000-0000-4000-8000-000000000001"
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(path, size); err != nil {
		return err
	}
	// Without lazy initialisation no kernel thread writes behind the tests.
	args := append([]string{
		"-q", "-F", "-L", "ftdata", "-U", id, "-b", "4096", "-J", "size=4",
		"-E", "hash_seed=" + id + ",lazy_itable_init=0,lazy_journal_init=0",
	}, options...)
	_, err := run(ctx, "", "mkfs.ext4", append(args, path)...)
	return err
}

func initramfs(busybox, program []byte, modules []module) []byte {
	var archive cpio
	for _, dir := range []string{"bin", "lib", "lib/modules", "dev"} {
		archive.dir(dir)
	}
	archive.device("dev/console", 5, 1)
	archive.file("init", 0o755, initScript)
	archive.file("bin/busybox", 0o755, busybox)
	archive.file("bin/ftguest", 0o755, program)
	var order strings.Builder
	for _, m := range modules {
		archive.file("lib/modules/"+m.file(), 0o644, m.content)
		order.WriteString(m.file() + "\n")
	}
	archive.file("lib/modules/order", 0o644, []byte(order.String()))
	return compress(archive)
}

// lockFile takes an exclusive lock, polling so that ctx can end the wait.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := pause(ctx); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
	}
}
