// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// journalSocket is where systemd's journal takes entries, see
// systemd-journald.service(8).
const journalSocket = "/run/systemd/journal/socket"

// newLogger logs to the journal if standard error goes there, so that the parts
// of a line can be asked for by name: journalctl FTVIRT_DOMAIN=web. Elsewhere it
// writes text.
func newLogger(stderr *os.File, stream, socket string, level slog.Leveler) *slog.Logger {
	if isJournal(stderr, stream) {
		if conn, err := net.Dial("unixgram", socket); err == nil {
			return slog.New(&journalHandler{w: conn, level: level})
		}
	}
	return slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
}

// isJournal tells whether a file is what JOURNAL_STREAM names: a variable that
// was inherited may be about another, see systemd.exec(5).
func isJournal(f *os.File, stream string) bool {
	var st unix.Stat_t
	if stream == "" || unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	return stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// journalHandler writes each record as one datagram of the journal's protocol.
type journalHandler struct {
	w      io.Writer
	level  slog.Leveler
	attrs  []slog.Attr
	prefix string // of groups
}

// maxEntry is below what a datagram may have by default; longer values are cut.
const maxEntry = 16 << 10

func (h *journalHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	n.attrs = append([]slog.Attr{}, h.attrs...)
	for _, a := range attrs {
		n.attrs = append(n.attrs, slog.Attr{Key: h.prefix + a.Key, Value: a.Value})
	}
	return &n
}

func (h *journalHandler) WithGroup(name string) slog.Handler {
	n := *h
	n.prefix += name + "_"
	return &n
}

func (h *journalHandler) Handle(_ context.Context, r slog.Record) error {
	message := r.Message
	var fields bytes.Buffer
	attr := func(a slog.Attr) {
		value := a.Value.Resolve().String()
		message += " " + a.Key + "=" + quoteIf(value)
		field(&fields, "FTVIRT_"+fieldName(a.Key), value)
	}
	for _, a := range h.attrs {
		attr(a)
	}
	r.Attrs(func(a slog.Attr) bool {
		a.Key = h.prefix + a.Key
		attr(a)
		return true
	})
	var b bytes.Buffer
	field(&b, "MESSAGE", message)
	field(&b, "PRIORITY", priority(r.Level))
	field(&b, "SYSLOG_IDENTIFIER", "ftvirt")
	b.Write(fields.Bytes())
	_, err := h.w.Write(b.Bytes())
	return err
}

// field adds one; a value of several lines has its length before it.
func field(b *bytes.Buffer, name, value string) {
	value = value[:min(len(value), maxEntry)]
	b.WriteString(name)
	if strings.Contains(value, "\n") {
		b.WriteByte('\n')
		b.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(value))))
	} else {
		b.WriteByte('=')
	}
	b.WriteString(value + "\n")
}

// fieldName is made of what the journal takes.
func fieldName(key string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return unicode.ToUpper(r)
		}
		return '_'
	}, key)
}

func quoteIf(s string) string {
	if s == "" || strings.ContainsAny(s, " =\"\n\t") {
		return fmt.Sprintf("%q", s)
	}
	return s
}

// priority is that of syslog(3).
func priority(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return "3"
	case l >= slog.LevelWarn:
		return "4"
	case l >= slog.LevelInfo:
		return "6"
	}
	return "7"
}
