// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestMissing(t *testing.T) {
	row := func(n int, text string) []string { return []string{strings.TrimSpace(text), note(n)} }
	tests := map[string]struct {
		rows  [][]string
		acked int
		lost  int
		wrong bool
	}{
		"all there":       {[][]string{row(2, "2"), row(1, "1")}, 2, 0, false},
		"none":            {nil, 0, 0, false},
		"the last lost":   {[][]string{row(1, "1")}, 2, 1, true},
		"another note":    {[][]string{row(1, "1"), row(1, "2")}, 2, 1, true},
		"one too many":    {[][]string{row(1, "1"), row(2, "2")}, 1, 0, true},
		"not a number":    {[][]string{row(1, "x")}, 1, 1, true},
		"a column lacks":  {[][]string{{"1"}}, 1, 1, true},
		"the ledger lost": {nil, 3, 3, true},
	}
	for name, c := range tests {
		if lost, err := missing(c.rows, c.acked); lost != c.lost || (err != nil) != c.wrong || err != nil && !errors.Is(err, ErrPostgres) {
			t.Errorf("%s: %d lost, %v; want %d", name, lost, err, c.lost)
		}
	}
}

func TestBalanced(t *testing.T) {
	tests := map[string]struct {
		row   string
		lost  int
		wrong bool
	}{
		"equal":               {"-7 -7 -7 -7 5 100000", 0, false},
		"a transaction lost":  {"-7 -7 -7 -7 4 100000", 1, true},
		"one that nobody did": {"-7 -7 -7 -7 6 100000", 0, true},
		"half a transaction":  {"-7 -7 -7 -8 5 100000", 0, true},
		"accounts":            {"-8 -7 -7 -7 5 100000", 0, true},
		"tellers":             {"-7 -8 -7 -7 5 100000", 0, true},
		"branches":            {"-7 -7 -8 -7 5 100000", 0, true},
		"an account lost":     {"-7 -7 -7 -7 5 99999", 0, true},
		"no count":            {"-7 -7 -7 -7 x 100000", 5, true},
		"a column lacks":      {"-7 -7 -7 -7 5", 5, true},
	}
	for name, c := range tests {
		if lost, err := balanced([][]string{strings.Fields(c.row)}, 5); lost != c.lost || (err != nil) != c.wrong || err != nil && !errors.Is(err, ErrPostgres) {
			t.Errorf("%s: %d lost, %v; want %d", name, lost, err, c.lost)
		}
	}
}

func TestTransactions(t *testing.T) {
	const report = `pgbench (15.20)
transaction type: <builtin: TPC-B (sort of)>
number of transactions actually processed: 298
number of failed transactions: 0 (0.000%)
`
	if n, err := transactions(report); n != 298 || err != nil {
		t.Errorf("%d, %v; want 298", n, err)
	}
	for _, bad := range []string{"", strings.Replace(report, "transactions: 0 ", "transactions: 1 ", 1), strings.Replace(report, "processed", "done", 1)} {
		if n, err := transactions(bad); !errors.Is(err, ErrPgbench) {
			t.Errorf("%d, %v of %q; want %v", n, err, bad, ErrPgbench)
		}
	}
}

// serving gives a dialer to a server that answers each connection by f.
func serving(t *testing.T, f func(net.Conn)) func(context.Context, netip.AddrPort) (net.Conn, error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				f(conn)
			}()
		}
	}()
	return func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	}
}

// database answers each query but the first few, which are the startup and those
// that succeed, with an error, or not at all.
func database(good int, refuse bool) func(net.Conn) {
	return func(c net.Conn) {
		r := bufio.NewReader(c)
		for n := 0; ; n++ {
			if n > 0 {
				if kind, err := r.ReadByte(); err != nil || kind != 'Q' {
					return
				}
			}
			var head [4]byte
			if _, err := io.ReadFull(r, head[:]); err != nil {
				return
			}
			if _, err := r.Discard(int(binary.BigEndian.Uint32(head[:])) - len(head)); err != nil {
				return
			}
			message := func(kind byte, body string) { _, _ = c.Write(append([]byte{kind}, framed([]byte(body))...)) }
			switch {
			case n == 0:
				message('R', "\x00\x00\x00\x00")
				message('S', "server_version\x0015\x00")
			case n <= good:
				message('T', "")
				message('D', "\x00\x02\x00\x00\x00\x01a\xff\xff\xff\xff")
				message('C', "SELECT 1\x00")
			case refuse:
				message('E', "SERROR\x00Mno space left\x00\x00")
			default:
				return
			}
			message('Z', "I")
		}
	}
}

func TestPostgres(t *testing.T) {
	db, err := dialPostgres(t.Context(), serving(t, database(1, true)), netip.IPv4Unspecified())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query(t.Context(), "SELECT 1")
	if err != nil || len(rows) != 1 || !slices.Equal(rows[0], []string{"a", ""}) {
		t.Errorf("rows %q, %v; want one of a and null", rows, err)
	}
	if _, err := db.Query(t.Context(), "SELECT 2"); !errors.Is(err, ErrPostgres) || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("%v; want what the server said", err)
	}
	for _, cut := range []string{"", "\x00\x01", "\x00\x01\x00\x00\x00\x02a"} {
		if row, err := fields([]byte(cut)); !errors.Is(err, ErrPostgres) {
			t.Errorf("row %q of %q, %v; want %v", row, cut, err, ErrPostgres)
		}
	}
}

// Only what the server has acknowledged counts, whether it refuses or breaks off.
func TestCommits(t *testing.T) {
	for _, refuse := range []bool{true, false} {
		c, err := StartCommits(t.Context(), serving(t, database(3, refuse)), netip.IPv4Unspecified())
		if err != nil {
			t.Fatal(err)
		}
		c.wg.Wait()
		if err := c.Stop(); c.Count() != 3 || !errors.Is(err, ErrPostgres) {
			t.Errorf("%d commits, %v; want 3 and then %v", c.Count(), err, ErrPostgres)
		}
	}
}

func TestWeb(t *testing.T) {
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if requests.Add(1) > 2 {
			_, _ = io.WriteString(w, "altered")
			return
		}
		_, _ = io.WriteString(w, "content")
	}))
	defer server.Close()
	addr := netip.MustParseAddrPort(server.Listener.Addr().String())
	w := StartWeb(t.Context(), func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", a.String())
	}, addr, "/", []byte("content"))
	w.wg.Wait()
	if err := w.Stop(); w.Count() != 2 || !errors.Is(err, ErrWeb) {
		t.Errorf("%d requests, %v; want 2 and then %v", w.Count(), err, ErrWeb)
	}
}

func TestSession(t *testing.T) {
	here := func(replace ...string) func(context.Context, string) *exec.Cmd {
		work := strings.NewReplacer(append(replace, ">>/root/session", ">/dev/null")...).Replace(sessionWork)
		return func(ctx context.Context, _ string) *exec.Cmd { return exec.CommandContext(ctx, "sh", "-c", work) }
	}
	s, err := StartSession(t.Context(), here())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.await(t.Context(), "work", 10*time.Second); err != nil {
		t.Error(err)
	}
	answers, err := s.Stop()
	if err != nil || strings.Count(answers, "\n") != s.Count() {
		t.Errorf("%q, %v; want %d answers", answers, err, s.Count())
	}
	for name, command := range map[string]func(context.Context, string) *exec.Cmd{
		"a shell that forgets": here("state=$(", "state=; state=$("),
		"a shell that ends":    here("while read -r line; do", "read -r line; if :; then", "done", "fi"),
		"no shell":             func(ctx context.Context, _ string) *exec.Cmd { return exec.CommandContext(ctx, "false") },
	} {
		s, err := StartSession(t.Context(), command)
		if err != nil {
			t.Fatal(err)
		}
		s.wg.Wait()
		if _, err := s.Stop(); !errors.Is(err, ErrSession) {
			t.Errorf("%s: %v; want %v", name, err, ErrSession)
		}
	}
}
