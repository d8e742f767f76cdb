// SPDX-License-Identifier: Apache-2.0

// Package labtest gives tests a lab of their own, which ends with the test and
// even with the kill of the test's process.
package labtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

var count atomic.Int32

// Up brings up a lab with the repository's programs and guest, unless o names
// others, and takes it down when the test ends. If the test failed, it logs
// what the agents said.
func Up(t testing.TB, o lab.Options) *lab.Lab {
	t.Helper()
	root := Root(t)
	if o.Name == "" {
		o.Name = fmt.Sprintf("t%d-%d", os.Getpid(), count.Add(1))
	}
	if o.Bin == "" {
		if bin := filepath.Join(root, "bin"); isDir(bin) {
			o.Bin = bin
		}
	}
	if o.Guest.Kernel == "" {
		o.Guest = Guest(t)
	}
	o.Ephemeral = true
	l, err := lab.Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			logAgents(t, l)
		}
		if err := l.Down(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return l
}

// Guest builds the test guest, or finds it built.
func Guest(t testing.TB) guest.Artifacts {
	t.Helper()
	artifacts, err := guest.Build(t.Context(), filepath.Join(Root(t), "build", "guest"))
	if err != nil {
		t.Fatal(err)
	}
	return artifacts
}

// Root finds the top of the repository, given that tests run in their
// package's directory.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	t.Fatal("no go.mod above the test's directory")
	return ""
}

func logAgents(t testing.TB, l *lab.Lab) {
	for _, h := range l.Hosts() {
		if text, err := h.AgentLog(); err == nil {
			t.Logf("agent of %s:\n%s", h.Name, text)
		}
	}
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
