// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"strings"
	"testing"
)

func TestConfinement(t *testing.T) {
	const right = `user 64055	64055	64055	64055
caps 0000000000000000
caps 0000000000000000
caps 0000000000000000
seccomp 2
mounts mnt:[4026532500]
host mnt:[4026532395]
cgroups 8
devices full kvm mqueue null ptmx pts random shm urandom zero
expected 64055
`
	tests := map[string]struct{ old, new, fault string }{
		"as it should be":    {"", "", ""},
		"root":               {"64055\t64055\t64055\t64055", "0\t0\t0\t0", "runs as user 0"},
		"may become root":    {"64055\t64055\n", "0\t64055\n", "runs as user"},
		"no such user":       {"expected 64055", "expected ", "runs as user"},
		"a capability":       {"caps 0000000000000000\nseccomp", "caps 0000000000001000\nseccomp", "has capabilities 1000"},
		"every system call":  {"seccomp 2", "seccomp 0", "no filter"},
		"the host's mounts":  {"4026532500", "4026532395", "no mount namespace"},
		"the host's devices": {" urandom", " tty urandom", "finds devices"},
		"the host's groups":  {"cgroups 8", "cgroups 0", "no control group"},
		"nothing known":      {right, "", "runs as user"},
	}
	for name, c := range tests {
		text := right
		if c.old != "" {
			text = strings.Replace(right, c.old, c.new, 1)
		}
		got, err := parseConfinement(text)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if fault := got.fault(true); !strings.Contains(fault, c.fault) || (fault == "") != (c.fault == "") {
			t.Errorf("%s: %q; want %q", name, fault, c.fault)
		}
	}
	if got, _ := parseConfinement(strings.Replace(right, "cgroups 8", "cgroups 0", 1)); got.fault(false) != "" {
		t.Error("a machine without control groups is blamed for it")
	}
}
