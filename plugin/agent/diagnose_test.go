// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The disk of a diagnosis hangs. Nobody waits for it, and the log is kept all the
// same, though the backup was discarded meanwhile.
func TestDiagnosisOnADiskThatHangs(t *testing.T) {
	t.Parallel()
	s := newSessions(t)
	s.d.a.cfg.Agent.StateDir = t.TempDir()
	dir := s.d.diagnosisDir(1)
	report := filepath.Join(dir, "report.json")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// Whoever opens it to write waits for a reader.
	if err := unix.Mkfifo(report, 0o600); err != nil {
		t.Fatal(err)
	}
	segment := filepath.Join(s.b.spoolDir(), "0")
	if err := os.MkdirAll(s.b.spoolDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(segment, []byte("log"), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.d.diagnose(1, nil, s.b)
		s.d.endData(nil, s.b)
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for waited := 0; ; waited++ {
		if _, err := os.Stat(segment); err != nil {
			break
		}
		if waited == 500 {
			t.Fatal("the backup's log is not removed while the disk hangs")
		}
		<-tick.C
	}
	<-done
	go func() { _, _ = os.ReadFile(report) }()
	for {
		text, err := os.ReadFile(filepath.Join(dir, "log", "0"))
		if err == nil && string(text) == "log" {
			return
		}
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			t.Fatalf("the log is not kept: %q, %v", text, err)
		}
	}
}
