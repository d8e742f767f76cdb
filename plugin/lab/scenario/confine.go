// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"ftvirt.org/ftvirt/plugin/lab"
)

// qemuUser is who Debian's libvirt lets QEMU be.
const qemuUser = "libvirt-qemu"

// confinement is what holds a QEMU back that a guest has taken over.
type confinement struct {
	user     string // its real, effective, saved and file system user
	caps     string // what it may do beyond that, and could ever get back
	seccomp  string // 2 is a filter of system calls
	mounts   string // its mount namespace
	host     string // that of its host
	cgroups  int    // control groups of its own
	devices  string // what it finds in /dev
	expected string // the number of qemuUser
}

// confinementScript prints what is known of process $1. Its own mount namespace
// is the host's.
const confinementScript = `
sed -n 's/^Uid:/user /p; s/^CapPrm:/caps /p; s/^CapEff:/caps /p; s/^CapInh:/caps /p; s/^Seccomp:/seccomp /p' "/proc/$1/status"
echo mounts "$(readlink "/proc/$1/ns/mnt")"
echo host "$(readlink /proc/self/ns/mnt)"
echo cgroups "$(grep -c 'machine.*qemu' "/proc/$1/cgroup" || :)"
echo devices $(ls "/proc/$1/root/dev")
echo expected "$(id -u "$2")"`

// Confinement looks at the domain's QEMU on a host.
func (vm *VM) Confinement(ctx context.Context, h *lab.Host) (confinement, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	pid, err := h.QEMUPID(vm.Name)
	if err != nil {
		return confinement{}, err
	}
	out, err := h.Exec(ctx, "/bin/sh", "-euc", confinementScript, "sh", strconv.Itoa(pid), qemuUser)
	if err != nil {
		return confinement{}, err
	}
	return parseConfinement(out)
}

func parseConfinement(text string) (c confinement, err error) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		value = strings.Join(strings.Fields(value), " ")
		switch name {
		case "user":
			c.user = value
		case "caps":
			c.caps = strings.TrimLeft(c.caps+value, "0")
		case "seccomp":
			c.seccomp = value
		case "mounts":
			c.mounts = value
		case "host":
			c.host = value
		case "cgroups":
			c.cgroups, err = strconv.Atoi(value)
		case "devices":
			c.devices = value
		case "expected":
			c.expected = value
		}
	}
	return c, err
}

// fault says what is not as libvirt's defaults have it.
func (c confinement) fault(groups bool) string {
	switch {
	case c.expected == "" || c.user != strings.TrimSpace(strings.Repeat(c.expected+" ", 4)):
		return fmt.Sprintf("runs as user %s, not as %s (%s)", c.user, qemuUser, c.expected)
	case c.caps != "":
		return "has capabilities " + c.caps
	case c.seccomp != "2":
		return "has no filter for system calls, but seccomp " + c.seccomp
	case c.mounts == "" || c.mounts == c.host:
		return "has no mount namespace of its own"
	case c.devices == "" || strings.Contains(" "+c.devices+" ", " tty "):
		return "finds devices " + c.devices
	case groups && c.cgroups == 0:
		return "has no control group of its own"
	}
	return ""
}

// confined demands that a guest that takes its QEMU over has gained little, on
// either side.
func (s *siege) confined(ctx context.Context) (string, error) {
	for _, h := range []*lab.Host{s.a, s.b} {
		c, err := s.vm.Confinement(ctx, h)
		if err != nil {
			return "", err
		}
		if fault := c.fault(s.HasCgroups()); fault != "" {
			return "", breach(nil, "the QEMU on %s %s", h.Name, fault)
		}
	}
	groups := ""
	if s.HasCgroups() {
		groups = ", with control groups of its own"
	}
	return fmt.Sprintf("it runs as %s without capabilities, with a filter of system calls, in mounts of its own%s", qemuUser, groups), nil
}
