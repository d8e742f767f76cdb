// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
)

// What the Debian guest is made of. It is the same on every machine that it is
// built on.
const (
	debianSuite    = "bookworm"
	debianPackages = "systemd-sysv,udev,initramfs-tools," + kernelPackage + ",iproute2,procps,openssh-server,postgresql,nginx-light"
	// DebianDiskSize leaves room for what PostgreSQL writes in an hour.
	DebianDiskSize = 1536 << 20
	// DebianMemoryMiB is what the guest should have.
	DebianMemoryMiB = 512
	// debianVersion is part of the cache key, as buildVersion is.
	debianVersion = "1"
)

// TCP ports of the Debian guest.
const (
	PortSSH      = 22
	PortHTTP     = 80
	PortPostgres = 5432
)

//go:embed src/debian.sh
var debianScript []byte

// Debian is a built Debian guest: its kernel, its initramfs and its root disk,
// and what a client needs. Root logs in with a key; PostgreSQL trusts the
// network, and its database "postgres" has pgbench's tables, the extension amcheck
// and an empty table ledger (id bigint, note text); nginx has a file.
type Debian struct {
	Artifacts
	Key     string // root's private key
	HostKey string // the guest's public key
	Pgbench string // the guest's pgbench, for clients that have a libpq
	Content string // what nginx hands out at ContentPath
}

// ContentPath is where nginx has the content.
const ContentPath = "/data"

// BuildDebian makes a small Debian server in dir, or returns at once when dir
// holds one made in the same way. It needs root, mmdebstrap and Debian's mirror.
func BuildDebian(ctx context.Context, dir string) (Debian, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Debian{}, err
	}
	key := cacheKey([]byte(debianVersion), []byte(debianSuite), []byte(debianPackages), debianScript)
	final, err := cached(ctx, dir, key, func(work string) error { return buildDebian(ctx, work) })
	if err != nil {
		return Debian{}, fmt.Errorf("build Debian guest: %w", err)
	}
	return Debian{
		Artifacts: artifactsIn(final),
		Key:       filepath.Join(final, "key"),
		HostKey:   filepath.Join(final, "host-key"),
		Pgbench:   filepath.Join(final, "pgbench"),
		Content:   filepath.Join(final, "content"),
	}, nil
}

func buildDebian(ctx context.Context, work string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: it makes the files of a system", os.ErrPermission)
	}
	out, root := filepath.Join(work, "out"), filepath.Join(work, "root")
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	key, content, script := filepath.Join(out, "key"), filepath.Join(out, "content"), filepath.Join(work, "debian.sh")
	if _, err := run(ctx, "", "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key); err != nil {
		return err
	}
	if err := os.WriteFile(content, webContent(), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(script, debianScript, 0o644); err != nil {
		return err
	}
	// Manuals are left out, and what PostgreSQL compiles queries with, which is
	// as large as all the rest of it.
	arguments := []string{
		"--mode=root", "--variant=minbase", "--include=" + debianPackages, `--aptopt=APT::Install-Recommends "false"`,
		"--customize-hook=sh -eu '" + script + `' "$1" '` + key + ".pub' '" + content + "'",
	}
	for _, pattern := range []string{"/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/lib/*/libLLVM-*"} {
		arguments = append(arguments, "--dpkgopt=path-exclude="+pattern)
	}
	if _, err := run(ctx, "", "mmdebstrap", append(arguments, debianSuite, root)...); err != nil {
		return err
	}
	for name, pattern := range map[string]string{
		"vmlinuz": "boot/vmlinuz-*", "initrd.gz": "boot/initrd.img-*",
		"host-key": "etc/ssh/ssh_host_ed25519_key.pub", "pgbench": "usr/lib/postgresql/*/bin/pgbench",
	} {
		if err := take(root, pattern, filepath.Join(out, name)); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(out, "pgbench"), 0o755); err != nil {
		return err
	}
	disk := filepath.Join(out, "disk.raw")
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(disk, DebianDiskSize); err != nil {
		return err
	}
	_, err := run(ctx, "", "mkfs.ext4", "-q", "-F", "-L", "root", "-J", "size=16",
		"-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", root, disk)
	return err
}

// take copies the only file below root that the pattern names.
func take(root, pattern, to string) error {
	found, err := filepath.Glob(filepath.Join(root, pattern))
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("the system has %d files %s, want one", len(found), pattern)
	}
	text, err := os.ReadFile(found[0])
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o644)
}

// webContent is some text of which no two lines are equal.
func webContent() []byte {
	const lines = 512
	var b bytes.Buffer
	for i := range lines {
		fmt.Fprintf(&b, "%04d %08x\n", i, uint32(i+1)*2654435761)
	}
	return b.Bytes()
}

// Adapt makes a description of the lab's guest one of a Debian guest.
func (Debian) Adapt(d *Domain) {
	// A kernel without a driver for it leaves ip= to systemd.
	d.Cmdline = fmt.Sprintf("root=/dev/vda rw net.ifnames=0 ip=%s:::%s::eth0:off", d.Address.Addr(), netmask(d.Address))
	d.Address = netip.Prefix{}
	d.MemoryMiB = DebianMemoryMiB
}

func netmask(p netip.Prefix) net.IP { return net.IP(net.CIDRMask(p.Bits(), p.Addr().BitLen())) }
