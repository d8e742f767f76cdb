// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// BenchCmdline is added to the kernel's command line of a guest of BuildBench.
const BenchCmdline = "rdinit=/bench-init"

// BenchDiskSize holds the tools, of 130 MiB, and what they write.
const BenchDiskSize = 256 << 20

// benchVersion is part of the cache key, as buildVersion is.
const benchVersion = "2"

//go:embed src/ftbench.c
var benchSource []byte

//go:embed src/bench.sh
var benchScript []byte

// Where a guest of BuildBench has what it compiles.
const BenchSources = "/data/tools/src"

// benchTools are taken from this machine, with the libraries that they need.
var benchTools = []string{"fio", "iperf3"}

// BuildBench makes the guest that benchmarks use, in dir as Build does: the same
// kernel and programs, ftbench, which runs commands, and a disk with fio, iperf3,
// the C compiler proper of this machine's gcc, and the C files of a source tree,
// preprocessed, so that the guest needs no headers.
func BuildBench(ctx context.Context, dir, sources string) (Artifacts, error) {
	base, err := Build(ctx, dir)
	if err != nil {
		return Artifacts{}, err
	}
	unlock, err := lockFile(ctx, filepath.Join(dir, ".lock"))
	if err != nil {
		return Artifacts{}, err
	}
	defer unlock()
	files, err := filepath.Glob(filepath.Join(sources, "*.c"))
	if err != nil || len(files) == 0 {
		return Artifacts{}, fmt.Errorf("build guest: no C files in %s", sources)
	}
	headers, err := filepath.Glob(filepath.Join(sources, "*.h"))
	if err != nil {
		return Artifacts{}, err
	}
	tools, err := findBenchTools(ctx)
	if err != nil {
		return Artifacts{}, err
	}
	final := filepath.Dir(base.Kernel) + "-bench-"
	key, err := benchKey(slices.Concat(files, headers, tools))
	if err != nil {
		return Artifacts{}, err
	}
	final += key
	artifacts := Artifacts{
		Kernel: base.Kernel, Initrd: filepath.Join(final, "initrd.gz"), DiskTemplate: filepath.Join(final, "disk.raw"),
	}
	if _, err := os.Stat(final); err == nil {
		return artifacts, nil
	}
	work, err := os.MkdirTemp(dir, ".work-")
	if err != nil {
		return Artifacts{}, err
	}
	defer func() { _ = os.RemoveAll(work) }()
	if err := buildBench(ctx, work, base, tools, files); err != nil {
		return Artifacts{}, fmt.Errorf("build guest: %w", err)
	}
	if err := os.Rename(filepath.Join(work, "out"), final); err != nil {
		return Artifacts{}, fmt.Errorf("build guest: %w", err)
	}
	return artifacts, nil
}

func benchKey(files []string) (string, error) {
	h := sha256.New()
	for _, part := range [][]byte{[]byte(benchVersion), benchSource, benchScript} {
		_, _ = fmt.Fprintf(h, "%d\n", len(part)) // a hash never fails
		h.Write(part)
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		_, _ = fmt.Fprintln(h, filepath.Base(path))
		_, err = io.Copy(h, f)
		_ = f.Close()
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// findBenchTools returns the programs, and then the libraries that the dynamic
// linker finds for them.
func findBenchTools(ctx context.Context) ([]string, error) {
	var programs []string
	for _, name := range benchTools {
		path, err := findTool(name)
		if err != nil {
			return nil, err
		}
		programs = append(programs, path)
	}
	compiler, err := run(ctx, "", "gcc", "-print-prog-name=cc1")
	if err != nil {
		return nil, err
	}
	programs = append(programs, strings.TrimSpace(string(compiler)))
	out, err := run(ctx, "", "ldd", programs...)
	if err != nil {
		return nil, err
	}
	var libraries []string
	for line := range strings.Lines(string(out)) {
		// "NAME => PATH (ADDRESS)", of the linker itself "PATH (ADDRESS)".
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") && strings.Contains(word, ".so") && !slices.Contains(libraries, word) {
				libraries = append(libraries, word)
			}
		}
	}
	return append(programs, libraries...), nil
}

func buildBench(ctx context.Context, work string, base Artifacts, tools, sources []string) error {
	out, root := filepath.Join(work, "out"), filepath.Join(work, "root")
	for _, d := range []string{out, filepath.Join(root, "tools", "bin"), filepath.Join(root, "tools", "lib"), filepath.Join(root, "tools", "src")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, path := range tools {
		to := "bin"
		if strings.Contains(filepath.Base(path), ".so") {
			to = "lib"
		}
		if _, err := run(ctx, "", "cp", "-L", path, filepath.Join(root, "tools", to)); err != nil {
			return err
		}
	}
	for _, path := range sources {
		name := strings.TrimSuffix(filepath.Base(path), ".c") + ".i"
		if _, err := run(ctx, "", "gcc", "-std=gnu11", "-O2", "-E", "-P", `-DFTVIRT_VERSION=""`, "-o", filepath.Join(root, "tools", "src", name), path); err != nil {
			return err
		}
	}
	program, err := compile(ctx, work, "ftbench", benchSource)
	if err != nil {
		return err
	}
	initrd, err := os.ReadFile(base.Initrd)
	if err != nil {
		return err
	}
	// The kernel unpacks archives that follow each other, one after the other.
	var archive cpio
	archive.device("dev/null", 1, 3) // what a shell gives to what runs beside it
	archive.file("bench-init", 0o755, benchScript)
	archive.file("bin/ftbench", 0o755, program)
	if err := os.WriteFile(filepath.Join(out, "initrd.gz"), append(initrd, compress(archive)...), 0o644); err != nil {
		return err
	}
	return makeDisk(ctx, filepath.Join(out, "disk.raw"), BenchDiskSize, "-d", root)
}

// compress ends an archive.
func compress(archive cpio) []byte {
	var compressed bytes.Buffer
	z, _ := gzip.NewWriterLevel(&compressed, gzip.BestCompression) // the level is valid
	_, _ = z.Write(archive.bytes())                                // a buffer never fails
	_ = z.Close()
	return compressed.Bytes()
}
