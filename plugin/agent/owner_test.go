// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestOwner(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"web.xml": `<domstatus state='running' reason='booted' pid='4391'>
  <monitor path='/var/lib/libvirt/qemu/domain-1-web/monitor.sock' type='unix'/>
  <domain type='qemu' id='1'><name>web</name><uuid>6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001</uuid></domain>
</domstatus>`,
		"web.pid": "4391\n", "cut.pid": "4392", "none.pid": "4393", "old.pid": "4394", "lost.pid": "4395",
		"old.xml":  `<domstatus state='running' pid='1'><domain><uuid>6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001</uuid></domain></domstatus>`,
		"cut.xml":  `<domstatus state='running' pid='4392'><domain>`,
		"none.xml": `<domstatus state='running' pid='4393'><domain><uuid>x</uuid></domain></domstatus>`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if id, err := ownerIn(dir, 4391); err != nil || id.String() != "6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001" {
		t.Errorf("%s, %v", id, err)
	}
	for _, pid := range []int{0, 1, 4392, 4394, 4395} {
		if _, err := ownerIn(dir, pid); !errors.Is(err, ErrNoQEMU) {
			t.Errorf("%d: %v", pid, err)
		}
	}
	if _, err := ownerIn(dir, 4393); err == nil {
		t.Error("a domain without UUID was believed")
	}
	if owners("qemu:///system") == nil || owners("qemu:///session") != nil {
		t.Error("where libvirt keeps its notes")
	}
}
