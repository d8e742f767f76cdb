// SPDX-License-Identifier: Apache-2.0

// Package guest makes the lab's guest: a Debian kernel and an initramfs with
// busybox and one small program that echoes over TCP, appends numbered and
// checksummed lines to a disk, and loads the disk on request. It also describes
// the guest as a libvirt domain and judges afterwards what its disk holds.
//
// src/ftguest.c documents the guest's ports and commands.
package guest

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// TCP ports of the guest.
const (
	PortEcho    = 7
	PortControl = 8
	PortHash    = 9
	PortLedger  = 10
	PortShell   = 11 // of a guest of BuildBench
)

// ReadyMessage starts the console line that the guest prints once its ports
// are open.
const ReadyMessage = "ftguest ready"

//go:embed src/ftguest.c
var programSource []byte

//go:embed src/init.sh
var initScript []byte

// ErrMissingTool is returned when a program that the guest's build needs is
// not installed.
var ErrMissingTool = errors.New("a needed program is not installed (run 'make deps')")

// run runs a host program and returns its standard output. Its error carries
// the program's own words.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	path, err := findTool(name)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// findTool looks in the system's directories too: a user's PATH often lacks
// /usr/sbin, where mkfs and debugfs live.
func findTool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/bin/", "/bin/"} {
		if path, err := exec.LookPath(dir + name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s", ErrMissingTool, name)
}
