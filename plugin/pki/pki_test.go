// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestAuthority(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	made, err := NewCA("an authority")
	if err != nil {
		t.Fatal(err)
	}
	if err := made.Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := made.Save(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an authority was overwritten: %v", err)
	}
	if info, err := os.Stat(filepath.Join(dir, CAKey)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key: %v, %v", info, err)
	}
	ca, err := OpenCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	h, err := ca.Issue(Request{Host: "hosta", Names: []string{"192.0.2.1", "a.example.org"}})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(made.PEM())
	for _, c := range []struct {
		cert, key []byte
		usage     x509.ExtKeyUsage
	}{{h.ServerCert, h.ServerKey, x509.ExtKeyUsageServerAuth}, {h.ClientCert, h.ClientKey, x509.ExtKeyUsageClientAuth}} {
		pair, err := tls.X509KeyPair(c.cert, c.key)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"hosta", "192.0.2.1", "a.example.org"} {
			if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, KeyUsages: []x509.ExtKeyUsage{c.usage}}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if len(pair.Leaf.ExtKeyUsage) != 1 {
			t.Errorf("usages %v", pair.Leaf.ExtKeyUsage)
		}
	}
	if err := h.Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := h.Save(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("certificates were overwritten: %v", err)
	}
}

func TestOpenCARefusesAnothersKey(t *testing.T) {
	t.Parallel()
	dir, other := t.TempDir(), t.TempDir()
	for _, d := range []string{dir, other} {
		ca, err := NewCA("one of two")
		if err != nil {
			t.Fatal(err)
		}
		if err := ca.Save(d); err != nil {
			t.Fatal(err)
		}
	}
	key, err := os.ReadFile(filepath.Join(other, CAKey))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, CAKey), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCA(dir); !errors.Is(err, ErrFile) {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, CACert), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCA(dir); !errors.Is(err, ErrFile) {
		t.Error(err)
	}
}
