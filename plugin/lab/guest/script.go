// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"compress/gzip"
)

// WithScript adds a file that can be executed to an initrd: the kernel unpacks
// archives that follow each other. Name it by rdinit= to run it instead of the
// guest's own programs; /bin/busybox is there.
func WithScript(initrd []byte, name string, script []byte) ([]byte, error) {
	var archive cpio
	archive.file(name, 0o755, script)
	out := bytes.NewBuffer(bytes.Clone(initrd))
	z := gzip.NewWriter(out)
	if _, err := z.Write(archive.bytes()); err != nil {
		return nil, err
	}
	err := z.Close()
	return out.Bytes(), err
}
