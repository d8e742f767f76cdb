// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var errKilled = errors.New("killed")

// killedAt ends all at the n-th step, counting from 0: nothing happens from then
// on. With torn, a write leaves half. steps counts.
func killedAt(n int, torn bool, steps *int) fault {
	return func(s step, path string, text []byte) error {
		at := *steps
		*steps++
		if at < n {
			return nil
		}
		if at == n && torn && s == stepWrite {
			_ = os.WriteFile(path, text[:len(text)/2], 0o600)
		}
		return errKilled
	}
}

// An authority that is being saved dies at each step. No half of a file is ever
// there under its name, and whoever tries again succeeds, or is told what to
// remove and succeeds then.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	ca, err := NewCA("an authority")
	if err != nil {
		t.Fatal(err)
	}
	host, err := ca.Issue(Request{Host: "hosta"})
	if err != nil {
		t.Fatal(err)
	}
	key, err := keyPEM(ca.key)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		save  func(dir string, f fault) error
		files map[string][]byte
	}{
		{"authority", func(dir string, f fault) error { ca := *ca; ca.fault = f; return ca.Save(dir) }, map[string][]byte{CAKey: key, CACert: ca.PEM()}},
		{"host", func(dir string, f fault) error { h := *host; h.fault = f; return h.Save(dir) }, map[string][]byte{
			ServerKey: host.ServerKey, ClientKey: host.ClientKey, ServerCert: host.ServerCert, ClientCert: host.ClientCert,
		}},
	} {
		var steps int
		if err := c.save(t.TempDir(), killedAt(1<<30, false, &steps)); err != nil {
			t.Fatal(err)
		}
		if want := 5 * len(c.files); steps != want {
			t.Fatalf("%s: %d steps, want %d", c.name, steps, want)
		}
		for n := range steps {
			for _, torn := range []bool{false, true} {
				dir := t.TempDir()
				if err := c.save(dir, killedAt(n, torn, new(int))); !errors.Is(err, errKilled) {
					t.Fatalf("%s, step %d: %v", c.name, n, err)
				}
				for name, text := range c.files {
					got, err := os.ReadFile(filepath.Join(dir, name))
					if err != nil && !errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(got, text) {
						t.Errorf("%s, step %d: %s is %q, %v", c.name, n, name, got, err)
					}
				}
				again(t, c.save, dir, c.files)
			}
		}
	}
}

// again tries again, and does what it is told.
func again(t *testing.T, save func(string, fault) error, dir string, files map[string][]byte) {
	t.Helper()
	err := save(dir, nil)
	if err != nil && strings.Contains(err.Error(), "remove ") {
		for name := range files {
			if strings.Contains(err.Error(), name) {
				_ = os.Remove(filepath.Join(dir, name))
			}
		}
		err = save(dir, nil)
	}
	whole := func() bool {
		for name, text := range files {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, text) {
				return false
			}
		}
		return true
	}
	// All may have been there: then it is not overwritten.
	if err != nil && !errors.Is(err, fs.ErrExist) || !whole() {
		t.Errorf("tried again: %v", err)
	}
}
