// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestImageHash reads images of each format, some based on another, and demands
// the hashes of what a guest would see.
func TestImageHash(t *testing.T) {
	const size = 5<<20 + 512
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
	}
	content := make([]byte, size)
	copy(content[1<<20+100:], "in the second chunk")
	copy(content[4<<20:], bytes.Repeat([]byte{7}, 1<<20))
	copy(content[size-5:], "tail")
	if err := os.WriteFile(at("base.raw"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", at("base.raw"), at("alone.qcow2"))
	run("qemu-img", "create", "-q", "-f", "qcow2", "-b", at("base.raw"), "-F", "raw", at("mid.qcow2"))
	run("qemu-img", "create", "-q", "-f", "qcow2", "-b", at("mid.qcow2"), "-F", "qcow2", at("top.qcow2"))
	run("qemu-io", "-c", "write -P 3 64k 64k", at("mid.qcow2"))
	run("qemu-io", "-c", "write -z 4M 64k", "-c", "write -P 5 2M 1k", at("top.qcow2"))
	layered := bytes.Clone(content)
	copy(layered[64<<10:], bytes.Repeat([]byte{3}, 64<<10))
	copy(layered[4<<20:], make([]byte, 64<<10))
	copy(layered[2<<20:], bytes.Repeat([]byte{5}, 1<<10))
	for name, c := range map[string]struct {
		image   image
		content []byte
	}{
		"raw":     {image{"vda", at("base.raw"), "raw"}, content},
		"qcow2":   {image{"vda", at("alone.qcow2"), "qcow2"}, content},
		"layered": {image{"vda", at("top.qcow2"), "qcow2"}, layered},
	} {
		var want []byte
		for rest := c.content; len(rest) > 0; rest = rest[min(len(rest), diskChunk):] {
			sum := sha256.Sum256(rest[:min(len(rest), diskChunk)])
			want = append(want, sum[:]...)
		}
		got, n, err := c.image.hash(t.Context())
		if err != nil || n != size || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, hashes equal %v: %v", name, n, bytes.Equal(got, want), err)
		}
	}
	run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", at("base.raw"), at("packed.qcow2"))
	if _, _, err := (image{"vda", at("packed.qcow2"), "qcow2"}).hash(t.Context()); !errors.Is(err, errImage) {
		t.Errorf("a compressed image: %v", err)
	}
	if _, _, err := (image{"vda", at("none"), "raw"}).hash(t.Context()); !errors.Is(err, errImage) {
		t.Errorf("no image: %v", err)
	}
}
