// SPDX-License-Identifier: Apache-2.0

package resync

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const diskSize = 8<<20 + 5*512 // it does not end with a chunk

// disk is what a guest may have written: noise, and chunks that are empty.
func disk(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	d := make([]byte, diskSize)
	for at := 0; at < len(d); at += Chunk {
		if r.IntN(4) == 0 {
			continue
		}
		for i := at; i < min(at+Chunk, len(d)); i++ {
			d[i] = byte(r.Uint32())
		}
	}
	return d
}

// altered changes some bytes of a few chunks, and fills or empties others.
func altered(d []byte) []byte {
	d = bytes.Clone(d)
	for _, at := range []int{0, 3*Chunk - 1, 3 * Chunk, 10*Chunk + 77, len(d) - 1} {
		d[at] ^= 1
	}
	clear(d[20*Chunk : 22*Chunk])
	copy(d[30*Chunk:], bytes.Repeat([]byte{7}, 2*Chunk))
	return d
}

// serveNBD is a QEMU's NBD server of an image.
func serveNBD(t *testing.T, dir, format, image string) string {
	t.Helper()
	socket := filepath.Join(dir, "replica.sock")
	cmd := exec.Command("qemu-nbd", "-t", "-f", format, "-k", socket, "-x", "vda", image)
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("unix", socket)
		if err == nil {
			_ = c.Close()
			return socket
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		pause(t, 10*time.Millisecond)
	}
}

func pause(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// copyOver copies an image into the replica behind an NBD socket, as a mirror
// would, and gives what went over the network.
func copyOver(t *testing.T, dir, image, socket string, seed io.ReaderAt, limit int64) *Stats {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	front, err := net.Listen("unix", filepath.Join(dir, "mirror.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = front.Close() }()
	stats := &Stats{}
	ends := make(chan error, 2)
	go func() {
		mirror, err := front.Accept()
		if err != nil {
			ends <- err
			return
		}
		replica, err := net.Dial("unix", socket)
		if err != nil {
			ends <- err
			return
		}
		near, far := net.Pipe()
		go func() { ends <- Receive(ctx, far, replica, "vda", seed) }()
		ends <- Send(ctx, mirror, near, Options{Stats: stats, Limit: NewLimit(limit)})
	}()
	tool(t, "qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", image, "nbd+unix:///anything?socket="+front.Addr().String())
	for range 2 {
		if err := <-ends; err != nil {
			t.Error(err)
		}
	}
	return stats
}

func fileOf(t *testing.T, dir, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Whatever the replica has, it is equal afterwards, and what was equal before is
// not sent.
func TestResync(t *testing.T) {
	t.Parallel()
	want := disk(1)
	for _, c := range []struct {
		name          string
		replica, seed []byte
		most          int64 // bytes sent
		limit         int64
	}{
		{name: "Equal", replica: want, most: Chunk},
		{name: "Altered", replica: altered(want), most: 9 * Chunk},
		{name: "AlteredAndLimited", replica: altered(want), most: 9 * Chunk, limit: 100 << 20},
		{name: "Other", replica: disk(2), most: diskSize},
		{name: "Empty", replica: make([]byte, diskSize), most: diskSize},
		{name: "Seeded", replica: make([]byte, diskSize), seed: altered(want), most: 9 * Chunk},
		{name: "AlteredAndSeeded", replica: altered(want), seed: want, most: Chunk},
		{name: "SeedTooShort", replica: make([]byte, diskSize), seed: want[:diskSize/2], most: diskSize/2 + Chunk},
	} {
		for _, format := range []string{"raw", "qcow2"} {
			t.Run(c.name+"/"+format, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				image := fileOf(t, dir, "image", want)
				replica := fileOf(t, dir, "replica", c.replica)
				if format == "qcow2" {
					tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", replica, replica+".qcow2")
					replica += ".qcow2"
				}
				var seed io.ReaderAt
				if c.seed != nil {
					seed = bytes.NewReader(c.seed)
				}
				socket := serveNBD(t, dir, format, replica)
				stats := copyOver(t, dir, image, socket, seed, c.limit)
				qemu, err := net.Dial("unix", socket)
				if err == nil {
					err = Flush(t.Context(), qemu, "vda")
				}
				if err != nil {
					t.Error(err)
				}
				tool(t, "qemu-img", "compare", "-U", "-f", "raw", "-F", format, image, replica)
				if sent := stats.Sent.Load(); sent > c.most {
					t.Errorf("%d bytes were sent, want at most %d", sent, c.most)
				}
				if stats.Equal.Load()+stats.Sent.Load() == 0 {
					t.Error("nothing was copied")
				}
			})
		}
	}
}

// A replica whose server is gone ends the copy with an error on both sides.
func TestLostReplica(t *testing.T) {
	t.Parallel()
	mirror, qemu := net.Pipe()
	replica, server := net.Pipe()
	near, far := net.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ends := make(chan error, 2)
	go func() { ends <- Receive(ctx, far, replica, "vda", nil) }()
	go func() { ends <- Send(ctx, qemu, near, Options{Stats: &Stats{}}) }()
	_ = server.Close()
	for range 2 {
		if err := <-ends; err == nil || ctx.Err() != nil {
			t.Errorf("it ended with %v", err)
		}
	}
	_, err := mirror.Read(make([]byte, 1))
	if err == nil {
		t.Error("the mirror is still served")
	}
}

// garbage answers to whatever it is asked with bytes of somebody's choice.
func garbage(c net.Conn, p []byte) {
	go func() { _, _ = io.Copy(io.Discard, c) }()
	_, _ = c.Write(p)
	_ = c.Close()
}

func FuzzSend(f *testing.F) {
	hello := []byte{0, 0, 0, 0, 0, 0x80, 0, 0, 0, 1}
	client := append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00"...)
	data := make([]byte, Chunk)
	client = append(append(client, request{kind: cmdWrite, cookie: 9, length: Chunk}.encode()...), data...)
	f.Add(append(hello, reply{cookie: 1}.encode()...), client)
	f.Add(append(hello, reply{code: codeDiffers, cookie: 1}.encode()...), client)
	f.Add(append(hello, reply{cookie: 2}.encode()...), append(client, request{kind: cmdDisconnect}.encode()...))
	f.Fuzz(func(t *testing.T, peer, mirror []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		near, far := net.Pipe()
		qemu, client := net.Pipe()
		go garbage(far, peer)
		go garbage(client, mirror)
		if err := Send(ctx, qemu, near, Options{Stats: &Stats{}}); errors.Is(err, context.DeadlineExceeded) {
			t.Error("it hangs")
		}
	})
}

func FuzzReceive(f *testing.F) {
	server := []byte("NBDMAGICIHAVEOPT\x00\x03")
	answer := func(kind byte, data []byte) []byte {
		b := []byte{0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, optGo, 0, 0, 0, kind, 0, 0, 0, byte(len(data))}
		return append(b, data...)
	}
	server = append(server, answer(answerInfo, []byte{0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 1})...)
	server = append(server, answer(answerAck, nil)...)
	compare := append(request{kind: cmdCompare, cookie: 1, length: 8}.encode(), make([]byte, 32)...)
	f.Add(compare, append(append(server, reply{cookie: 1}.encode()...), make([]byte, 8)...))
	f.Add(request{kind: cmdWriteZeroes, cookie: 1, length: 8}.encode(), append(append(server, reply{cookie: 1}.encode()...), "somewhat"...))
	f.Add(append(request{kind: cmdWrite, cookie: 1, length: 8}.encode(), "somewhat"...), append(server, reply{code: 5, cookie: 1}.encode()...))
	f.Fuzz(func(t *testing.T, peer, server []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		near, far := net.Pipe()
		qemu, replica := net.Pipe()
		go garbage(far, peer)
		go garbage(replica, server)
		if err := Receive(ctx, near, qemu, "vda", nil); errors.Is(err, context.DeadlineExceeded) {
			t.Error("it hangs")
		}
	})
}
