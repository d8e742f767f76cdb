// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin/channel"
)

// TestPKI: what the commands make is what the channel takes.
func TestPKI(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "ca")
	if r := run(t, "", "pki", "issue", dir, "hosta"); r.code != exitFailure || !strings.Contains(r.errors, "ftvirt pki init "+dir) {
		t.Errorf("without an authority: %+v", r)
	}
	if r := run(t, "", "pki", "init", dir); r.code != exitOK || !strings.Contains(r.out, "/etc/pki/CA/cacert.pem") {
		t.Fatalf("%+v", r)
	}
	if r := run(t, "", "pki", "init", dir); r.code != exitFailure {
		t.Errorf("an authority was overwritten: %+v", r)
	}
	if r := run(t, "", "pki", "issue", dir, "../x"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
	if r := run(t, "", "pki", "issue", dir, "hosta", "192.0.2.1"); r.code != exitOK || !strings.Contains(r.out, "/etc/pki/libvirt/private") {
		t.Fatalf("%+v", r)
	}
	own := filepath.Join(dir, "hosta")
	if _, err := channel.TLS(channel.PKI{
		CACert: filepath.Join(dir, "cacert.pem"), CRL: filepath.Join(dir, "cacrl.pem"),
		ServerCert: filepath.Join(own, "servercert.pem"), ServerKey: filepath.Join(own, "serverkey.pem"),
		ClientCert: filepath.Join(own, "clientcert.pem"), ClientKey: filepath.Join(own, "clientkey.pem"),
	}, func(h string) string { return h }, slog.New(slog.DiscardHandler)); err != nil {
		t.Error(err)
	}
	for _, key := range []string{filepath.Join(dir, "cakey.pem"), filepath.Join(own, "serverkey.pem"), filepath.Join(own, "clientkey.pem")} {
		if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", key, info, err)
		}
	}
}
