// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sort"
	"strings"

	"libvirt.org/go/libvirtxml"

	"ftvirt.org/ftvirt/hooks"
)

// image is a disk of a domain on this host.
type image struct {
	target, path, format string
}

// imageOf finds the image of a disk that has a target and a source.
func imageOf(x libvirtxml.DomainDisk) (image, bool) {
	if x.Target == nil || x.Source == nil || x.Source.File == nil {
		return image{}, false
	}
	i := image{target: x.Target.Dev, path: x.Source.File.File, format: "raw"}
	if x.Driver != nil && x.Driver.Type != "" {
		i.format = x.Driver.Type
	}
	return i, true
}

// images gives the replicated disks of this host's copy.
func (d *domain) images(ctx context.Context) ([]image, error) {
	text, err := d.a.virt.XML(ctx, d.id, false)
	if err != nil {
		return nil, err
	}
	dom, err := hooks.Parse([]byte(text))
	if err != nil {
		return nil, err
	}
	var list []image
	for _, n := range hooks.DiskNodes(dom) {
		for _, x := range dom.Devices.Disks {
			if x.Target == nil || x.Target.Dev != n.Target || x.Source == nil {
				continue
			}
			i, ok := imageOf(x)
			if !ok {
				return nil, fmt.Errorf("disk %s is not in a file", n.Target)
			}
			list = append(list, i)
		}
	}
	return list, nil
}

// extent is a part of a disk as 'qemu-img map' tells of it.
type extent struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`
	Zero       bool   `json:"zero"`
	Data       bool   `json:"data"`
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset"`
}

// errImage is wrapped by what keeps an image from being read.
var errImage = errors.New("cannot read the image")

// qemuImg asks about an image that QEMU has open, whose tables are complete. The
// format is given: that of a raw image would be the guest's to choose.
func qemuImg(ctx context.Context, out any, args ...string) error {
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%w: qemu-img %s: %w: %s", errImage, args[0], err, strings.TrimSpace(stderr.String()))
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("%w: qemu-img %s: %w", errImage, args[0], err)
	}
	return nil
}

// open makes what the guest sees of a disk readable, whatever its format.
// Nothing may write to it meanwhile.
func (i image) open(ctx context.Context) (*content, error) {
	var chain []struct {
		Filename string `json:"filename"`
		Size     int64  `json:"virtual-size"`
	}
	if err := qemuImg(ctx, &chain, "info", "-U", "--backing-chain", "--output=json", "-f", i.format, i.path); err != nil {
		return nil, err
	}
	var extents []extent
	if err := qemuImg(ctx, &extents, "map", "-U", "--output=json", "-f", i.format, i.path); err != nil {
		return nil, err
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: qemu-img names no file", errImage)
	}
	c := &content{extents: extents, size: chain[0].Size}
	for _, link := range chain {
		f, err := os.Open(link.Filename)
		if err != nil {
			_ = c.Close()
			return nil, err
		}
		c.files = append(c.files, f)
	}
	return c, nil
}

// hash gives the hash of each chunk of a disk, and its size.
func (i image) hash(ctx context.Context) ([]byte, int64, error) {
	c, err := i.open(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = c.Close() }()
	hashes, err := c.hash(ctx)
	return hashes, c.size, err
}

// content is a disk as extents of files, the image and what it is based on.
type content struct {
	extents []extent
	files   []*os.File
	size    int64
}

// Close closes its files.
func (c *content) Close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// ReadAt implements io.ReaderAt.
func (c *content) ReadAt(p []byte, at int64) (int, error) {
	if at < 0 || at > c.size {
		return 0, fmt.Errorf("%w: it does not reach to %d", errImage, at)
	}
	n := int(min(int64(len(p)), c.size-at))
	if _, err := c.read(p[:n], at); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (c *content) hash(ctx context.Context) ([]byte, error) {
	var hashes []byte
	buf := make([]byte, diskChunk)
	zeros := sha256.Sum256(buf)
	for at := int64(0); at < c.size; at += diskChunk {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		p := buf[:min(diskChunk, c.size-at)]
		data, err := c.read(p, at)
		if err != nil {
			return nil, err
		}
		if !data && len(p) == diskChunk {
			hashes = append(hashes, zeros[:]...)
			continue
		}
		sum := sha256.Sum256(p)
		hashes = append(hashes, sum[:]...)
	}
	return hashes, nil
}

// read fills p from a place of the disk, and tells whether there is data at all.
func (c *content) read(p []byte, at int64) (data bool, err error) {
	clear(p)
	end := at + int64(len(p))
	for done := at; done < end; {
		i := sort.Search(len(c.extents), func(i int) bool { return c.extents[i].Start+c.extents[i].Length > done })
		if i == len(c.extents) || c.extents[i].Start > done {
			return false, fmt.Errorf("%w: qemu-img leaves out what is at %d", errImage, done)
		}
		e := c.extents[i]
		to := min(end, e.Start+e.Length)
		if e.Data && !e.Zero {
			if e.Compressed || e.Offset == nil || e.Depth < 0 || e.Depth >= len(c.files) {
				return false, fmt.Errorf("%w: what is at %d is compressed or encrypted", errImage, done)
			}
			// A file may end within its last sector, which is zeros then.
			_, err := c.files[e.Depth].ReadAt(p[done-at:to-at], *e.Offset+done-e.Start)
			if err != nil && !errors.Is(err, io.EOF) {
				return false, err
			}
			data = true
		}
		done = to
	}
	return data, nil
}
