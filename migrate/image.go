// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// fitTimeout bounds the check of an old replica.
const fitTimeout = 20 * time.Second

// fits tells whether a file can be the replica of a disk, whatever the guest's
// data in it: an image of that format and size, sound and complete in itself.
func fits(ctx context.Context, path string, d Disk) bool {
	ctx, cancel := context.WithTimeout(ctx, fitTimeout)
	defer cancel()
	if i, err := os.Lstat(path); err != nil || !i.Mode().IsRegular() {
		return false
	}
	text, err := exec.CommandContext(ctx, "qemu-img", "info", "--output=json", "-f", d.Format, path).Output()
	if err != nil {
		return false
	}
	var info struct {
		Size      int64  `json:"virtual-size"`
		Backing   string `json:"backing-filename"`
		Encrypted bool   `json:"encrypted"`
		Specific  struct {
			Data struct {
				DataFile string `json:"data-file"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(text, &info); err != nil {
		return false
	}
	if info.Size != d.Size || info.Backing != "" || info.Specific.Data.DataFile != "" || info.Encrypted {
		return false
	}
	if d.Format == "raw" {
		return true
	}
	// The QEMU that used it was killed: clusters may have leaked, which is 3 and
	// does no harm.
	err = exec.CommandContext(ctx, "qemu-img", "check", "-q", "-f", d.Format, path).Run()
	var exit *exec.ExitError
	return err == nil || errors.As(err, &exit) && exit.ExitCode() == 3
}

// maxBacking is the longest that QEMU takes.
const maxBacking = 1023

// backingOf reads the name of the image that one of qcow2 is based on. The guest of
// a raw image may have made it up: it costs no more than a look.
func backingOf(path string, info os.FileInfo) string {
	var head [20]byte
	if !info.Mode().IsRegular() || info.Size() < int64(len(head)) {
		return ""
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	if _, err := f.ReadAt(head[:], 0); err != nil || !bytes.HasPrefix(head[:], []byte("QFI\xfb")) {
		return ""
	}
	at, length := int64(binary.BigEndian.Uint64(head[8:])), binary.BigEndian.Uint32(head[16:])
	if at <= 0 || length == 0 || length > maxBacking {
		return ""
	}
	name := make([]byte, length)
	if _, err := f.ReadAt(name, at); err != nil {
		return ""
	}
	return string(name)
}
