// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/hooks"
)

const plainDomain = `<domain type="qemu">
  <name>web</name>
  <uuid>6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001</uuid>
  <memory unit="MiB">16</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch="x86_64" machine="pc-q35-9.1">hvm</type>
  </os>
  <devices></devices>
</domain>`

func TestPrepareAndRestoreAreInverse(t *testing.T) {
	t.Parallel()
	opts := hooks.Options{PluginFile: "/usr/lib/ftvirt/ftvirt.so", PluginSocket: "/run/ftvirt/plugin.sock", ICountShift: 3}
	ready, err := readyXML(plainDomain, "hostb", opts)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{`peer="hostb"`, opts.PluginFile, "rr=record"} {
		if !strings.Contains(ready, part) {
			t.Errorf("%s is missing in:\n%s", part, ready)
		}
	}
	again, err := readyXML(ready, "hostb", opts)
	if err != nil || again != ready {
		t.Errorf("prepared twice: %v\n%s\nwant:\n%s", err, again, ready)
	}
	back, err := plainXML(ready)
	if err != nil {
		t.Fatal(err)
	}
	if want, err := plainXML(plainDomain); err != nil || back != want {
		t.Errorf("restored, %v:\n%s\nwant:\n%s", err, back, want)
	}
	if strings.Contains(back, "ftvirt") || strings.Contains(back, "icount") {
		t.Errorf("something of ours is left:\n%s", back)
	}
}

func TestPrepareRefusesWhatCannotBeProtected(t *testing.T) {
	t.Parallel()
	opts := hooks.Options{PluginFile: "/f.so", PluginSocket: "/s"}
	two := strings.Replace(plainDomain, "<vcpu>1<", "<vcpu>2<", 1)
	if _, err := readyXML(two, "hostb", opts); !errors.Is(err, hooks.ErrNotReady) {
		t.Errorf("two vCPUs: %v", err)
	}
	if _, err := readyXML(plainDomain, "not a host", opts); !errors.Is(err, hooks.ErrAnnotation) {
		t.Errorf("a peer that is no host name: %v", err)
	}
	if _, err := plainXML("<domain"); err == nil {
		t.Error("XML that is cut was taken")
	}
}
