// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"fmt"
)

// File types in a cpio header, as in stat's st_mode.
const (
	modeDir     = 0o040000
	modeFile    = 0o100000
	modeCharDev = 0o020000
)

// cpio writes the "newc" archive that the kernel unpacks as its initramfs
// (Documentation/driver-api/early-userspace/buffer-format.rst). Everything
// belongs to root and dates from the epoch, so equal inputs give equal bytes.
type cpio struct {
	buf   bytes.Buffer
	inode int
}

func (c *cpio) dir(name string) { c.entry(name, modeDir|0o755, nil, 0, 0) }

func (c *cpio) file(name string, perm int, content []byte) {
	c.entry(name, modeFile|perm, content, 0, 0)
}

func (c *cpio) device(name string, major, minor int) {
	c.entry(name, modeCharDev|0o600, nil, major, minor)
}

func (c *cpio) entry(name string, mode int, content []byte, major, minor int) {
	c.inode++
	_, _ = fmt.Fprintf(&c.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0, name)
	c.pad()
	c.buf.Write(content)
	c.pad()
}

// pad aligns to 4 bytes, as every header and every content begins.
func (c *cpio) pad() {
	for c.buf.Len()%4 != 0 {
		c.buf.WriteByte(0)
	}
}

// bytes ends the archive and returns it.
func (c *cpio) bytes() []byte {
	c.entry("TRAILER!!!", 0, nil, 0, 0)
	return c.buf.Bytes()
}
