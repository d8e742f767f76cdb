// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// entry reads what was sent, as journald does.
func entry(t *testing.T, b []byte) map[string]string {
	t.Helper()
	fields := map[string]string{}
	for len(b) > 0 {
		line, rest, ok := bytes.Cut(b, []byte("\n"))
		if !ok {
			t.Fatalf("a field without an end: %q", b)
		}
		name, value, ok := strings.Cut(string(line), "=")
		if !ok {
			n := binary.LittleEndian.Uint64(rest)
			value, rest = string(rest[8:8+n]), rest[8+n+1:]
		}
		if _, twice := fields[name]; twice {
			t.Errorf("%s is there twice", name)
		}
		fields[name], b = value, rest
	}
	return fields
}

func TestJournal(t *testing.T) {
	t.Parallel()
	socket := socketPath(t)
	journald, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = journald.Close() }()
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stderr.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(stderr.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	stream := fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	log := newLogger(stderr, stream, socket, slog.LevelInfo)
	log.Debug("not wanted")
	log.With("domain", "web").WithGroup("pair").Warn("clone failed", "epoch", 3, "error", errors.New("no\nroom"))
	if err := journald.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64<<10)
	n, err := journald.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	got := entry(t, b[:n])
	for name, want := range map[string]string{
		"MESSAGE": `clone failed domain=web pair_epoch=3 pair_error="no\nroom"`, "PRIORITY": "4", "SYSLOG_IDENTIFIER": "ftvirt",
		"FTVIRT_DOMAIN": "web", "FTVIRT_PAIR_EPOCH": "3", "FTVIRT_PAIR_ERROR": "no\nroom",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if len(got) != 6 {
		t.Errorf("fields %v", got)
	}
	log.Error(strings.Repeat("x", 1<<20))
	if n, err = journald.Read(b); err != nil || len(entry(t, b[:n])["MESSAGE"]) != maxEntry {
		t.Errorf("a long line: %d bytes, %v", n, err)
	}

	// A variable that is about another file, no journal, and none at all.
	for name, log := range map[string]*slog.Logger{
		"other":  newLogger(stderr, "1:2", socket, slog.LevelInfo),
		"absent": newLogger(stderr, stream, socket+".none", slog.LevelInfo),
		"unset":  newLogger(stderr, "", socket, slog.LevelInfo),
	} {
		log.Info("to a file", "case", name)
		text, err := os.ReadFile(stderr.Name())
		if err != nil || !strings.Contains(string(text), "case="+name) {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
}
