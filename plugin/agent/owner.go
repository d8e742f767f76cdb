// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"ftvirt.org/ftvirt/plugin"
)

// ErrNoQEMU: a process is none of the QEMUs that libvirt runs.
var ErrNoQEMU = errors.New("not a QEMU that libvirt started")

// statusDir is where libvirt's system daemon notes which process runs which
// domain, for itself and before it starts the process. Only root can write there.
// It is read rather than libvirt asked, since a plugin must get through when
// libvirt does not answer.
const statusDir = "/run/libvirt/qemu"

// maxStatus bounds such a note.
const maxStatus = 16 << 20

type domainStatus struct {
	PID    int `xml:"pid,attr"`
	Domain struct {
		Name string `xml:"name"`
		UUID string `xml:"uuid"`
	} `xml:"domain"`
}

// owners gives the function that tells whose QEMU a process is, or nil where
// libvirt keeps its notes elsewhere.
func owners(uri string) func(pid int) (plugin.UUID, error) {
	if !strings.HasSuffix(strings.SplitN(uri, "?", 2)[0], ":///system") {
		return nil
	}
	return func(pid int) (plugin.UUID, error) { return ownerIn(statusDir, pid) }
}

// ownerIn looks for the process in the small files that have nothing but a
// number, and only then reads the note: strangers must be cheap.
func ownerIn(dir string, pid int) (plugin.UUID, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.pid"))
	if err != nil {
		return plugin.UUID{}, err
	}
	want := strconv.Itoa(pid)
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(text)) != want {
			continue // of a domain that has just ended, or of another
		}
		s, err := readStatus(strings.TrimSuffix(path, ".pid") + ".xml")
		if err != nil {
			return plugin.UUID{}, fmt.Errorf("%w: process %d: %w", ErrNoQEMU, pid, err)
		}
		if s.PID != pid {
			return plugin.UUID{}, fmt.Errorf("%w: process %d is that of before", ErrNoQEMU, pid)
		}
		return plugin.ParseUUID(strings.TrimSpace(s.Domain.UUID))
	}
	return plugin.UUID{}, fmt.Errorf("%w: process %d", ErrNoQEMU, pid)
}

// nameIn finds a running domain's name, which is empty if it is not there.
func nameIn(dir string, id plugin.UUID) string {
	files, err := filepath.Glob(filepath.Join(dir, "*.xml"))
	if err != nil {
		return ""
	}
	for _, path := range files {
		if s, err := readStatus(path); err == nil && strings.TrimSpace(s.Domain.UUID) == id.String() {
			return s.Domain.Name
		}
	}
	return ""
}

func readStatus(path string) (domainStatus, error) {
	var s domainStatus
	f, err := os.Open(path)
	if err != nil {
		return s, err
	}
	defer func() { _ = f.Close() }()
	return s, xml.NewDecoder(io.LimitReader(f, maxStatus)).Decode(&s)
}
