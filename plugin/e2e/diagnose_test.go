// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin/lab"
)

// What an operator sends in with a report of a defect has what it takes.
func TestDiagnose(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	traffic.Close()
	for _, h := range []*lab.Host{hosta, hostb} {
		path := "/tmp/" + vm.Name + ".tar.gz"
		_, err := h.Exec(t.Context(), lab.BinDir+"/ftvirt", "diagnose", vm.Name, "-o", path)
		must(t, err)
		out, err := exec.CommandContext(t.Context(), "tar", "-tzf", h.Path(path)).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, want := range []string{"status.json", "events.json", "config.json", "host.json", "arbiter.json", "domain.xml", "plugin.json", "qemu.log"} {
			if !strings.Contains(string(out), "/"+want+"\n") {
				t.Errorf("%s is not in the archive of %s:\n%s", want, h.Name, out)
			}
		}
		if _, err := h.Exec(t.Context(), lab.BinDir+"/ftvirt", "diagnose", vm.Name, "-o", path); err == nil {
			t.Errorf("%s was overwritten", filepath.Base(path))
		}
	}
}
