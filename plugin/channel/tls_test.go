// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/pki"
)

// lines collects a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(sub string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), sub)
}

func authority(t testing.TB) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA("test authority")
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t testing.TB, ca *pki.CA, r pki.Request) *pki.Host {
	t.Helper()
	h, err := ca.Issue(r)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func put(t testing.TB, path string, text []byte) {
	t.Helper()
	// As an operator's tools do: the file is replaced.
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// install writes the files of a host.
func install(t testing.TB, dir string, ca []byte, h *pki.Host) PKI {
	t.Helper()
	p := PKI{
		CACert: filepath.Join(dir, pki.CACert), CRL: filepath.Join(dir, pki.CRL),
		ServerCert: filepath.Join(dir, pki.ServerCert), ServerKey: filepath.Join(dir, pki.ServerKey),
		ClientCert: filepath.Join(dir, pki.ClientCert), ClientKey: filepath.Join(dir, pki.ClientKey),
	}
	for path, text := range map[string][]byte{
		p.CACert: ca, p.ServerCert: h.ServerCert, p.ServerKey: h.ServerKey, p.ClientCert: h.ClientCert, p.ClientKey: h.ClientKey,
	} {
		put(t, path, text)
	}
	return p
}

func itself(host string) string { return host }

func transport(t testing.TB, p PKI, log io.Writer) Transport {
	t.Helper()
	tr, err := TLS(p, itself, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// startTLS is an agent called hostb. It tells its address and counts whom it
// welcomed.
func startTLS(t testing.TB, tr Transport, log io.Writer) (addr string, welcomed func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ln, err := tr.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	n := 0
	cfg := DefaultConfig()
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, tr, ln, cfg, func(ctx context.Context, in *Incoming) {
			mu.Lock()
			n++
			mu.Unlock()
			conn, err := in.Welcome(ctx, 0)
			if err != nil {
				return
			}
			_, _ = io.Copy(conn, conn)
			_ = conn.Close()
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	return ln.Addr().String(), func() int { mu.Lock(); defer mu.Unlock(); return n }
}

func echoOver(t testing.TB, conn net.Conn) {
	t.Helper()
	if _, err := conn.Write([]byte("a page of memory")); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); err != nil || string(b) != "a page of memory" {
		t.Fatalf("read %q, %v", b, err)
	}
	_ = conn.Close()
}

func TestTLS(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	hosta := transport(t, install(t, t.TempDir(), ca.PEM(), issue(t, ca, pki.Request{Host: "hosta"})), io.Discard)
	hostb := transport(t, install(t, t.TempDir(), ca.PEM(), issue(t, ca, pki.Request{Host: "hostb"})), io.Discard)
	addr, _ := startTLS(t, hostb, io.Discard)
	conn, _, err := Dial(t.Context(), hosta, addr, testHello, DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	if v := conn.(*secured).ConnectionState().Version; v != tls.VersionTLS13 {
		t.Errorf("version %x", v)
	}
	echoOver(t, conn)
}

// TestTLSRefusesStrangers: whoever is not the host that it says it is gets
// nothing, and is told of in the log once.
func TestTLSRefusesStrangers(t *testing.T) {
	t.Parallel()
	ca, other := authority(t), authority(t)
	dirB := t.TempDir()
	filesB := install(t, dirB, ca.PEM(), issue(t, ca, pki.Request{Host: "hostb"}))
	now := time.Now()
	revoked := issue(t, ca, pki.Request{Host: "hosta"})
	list, err := ca.Revoke(revoked)
	if err != nil {
		t.Fatal(err)
	}
	put(t, filesB.CRL, list)
	servers := issue(t, ca, pki.Request{Host: "hosta"})
	servers.ClientCert, servers.ClientKey = servers.ServerCert, servers.ServerKey
	for name, h := range map[string]*pki.Host{
		"foreign authority":        issue(t, other, pki.Request{Host: "hosta"}),
		"expired":                  issue(t, ca, pki.Request{Host: "hosta", NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Minute)}),
		"not yet valid":            issue(t, ca, pki.Request{Host: "hosta", NotBefore: now.Add(time.Hour)}),
		"of another host":          issue(t, ca, pki.Request{Host: "hostc"}),
		"revoked":                  revoked,
		"for servers, not to call": servers,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log lines
			addr, welcomed := startTLS(t, transport(t, filesB, io.Discard), &log)
			// The impostor itself trusts the authority.
			client := transport(t, install(t, t.TempDir(), ca.PEM(), h), io.Discard)
			for range 3 {
				if conn, _, err := Dial(t.Context(), client, addr, testHello, DefaultConfig()); err == nil {
					_ = conn.Close()
					t.Fatal("it was welcomed")
				}
			}
			if welcomed() != 0 {
				t.Error("the handler was called")
			}
			if n := log.count("peer="); n != 1 {
				t.Errorf("%d lines in the log, want one:\n%s", n, log.text.String())
			}
		})
		t.Run("server "+name, func(t *testing.T) {
			t.Parallel()
			if name == "for servers, not to call" {
				h = &pki.Host{ServerCert: h.ServerCert, ServerKey: h.ServerKey, ClientCert: h.ClientCert, ClientKey: h.ClientKey}
				calls := issue(t, ca, pki.Request{Host: "hosta"})
				h.ServerCert, h.ServerKey = calls.ClientCert, calls.ClientKey
			}
			addr, welcomed := startTLS(t, transport(t, install(t, t.TempDir(), ca.PEM(), h), io.Discard), io.Discard)
			client := transport(t, filesB, io.Discard)
			hello := testHello
			hello.From, hello.To = "hostb", "hosta"
			if conn, _, err := Dial(t.Context(), client, addr, hello, DefaultConfig()); err == nil {
				_ = conn.Close()
				t.Fatal("its certificate was taken")
			}
			if welcomed() != 0 {
				t.Error("HELLO was told")
			}
		})
	}
}

// TestTLSWithoutCertificate speaks to the server as other programs might.
func TestTLSWithoutCertificate(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	h := issue(t, ca, pki.Request{Host: "hosta"})
	addr, welcomed := startTLS(t, transport(t, install(t, t.TempDir(), ca.PEM(), issue(t, ca, pki.Request{Host: "hostb"})), io.Discard), io.Discard)
	pair, err := tls.X509KeyPair(h.ClientCert, h.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	hello, err := encodeHello(testHello)
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]*tls.Config{
		"none":    {InsecureSkipVerify: true},
		"TLS 1.2": {InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}},
	} {
		conn, err := tls.Dial("tcp", addr, cfg)
		if err == nil {
			_, _ = conn.Write(hello)
			_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			var b [1]byte
			_, err = conn.Read(b[:])
			_ = conn.Close()
		}
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v, want a refusal", name, err)
		}
	}
	if _, _, err := Dial(t.Context(), Plain(), addr, testHello, DefaultConfig()); err == nil {
		t.Error("plaintext was welcomed")
	}
	if welcomed() != 0 {
		t.Error("the handler was called")
	}
}

// TestTLSReload: certificates that are replaced count at the next handshake, and
// half of a change counts for nothing.
func TestTLSReload(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	first := issue(t, ca, pki.Request{Host: "hosta"})
	filesA := install(t, t.TempDir(), ca.PEM(), first)
	filesB := install(t, t.TempDir(), ca.PEM(), issue(t, ca, pki.Request{Host: "hostb"}))
	var log lines
	hosta, hostb := transport(t, filesA, &log), transport(t, filesB, &log)
	addr, _ := startTLS(t, hostb, io.Discard)
	dial := func() error {
		conn, _, err := Dial(t.Context(), hosta, addr, testHello, DefaultConfig())
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	if err := dial(); err != nil {
		t.Fatal(err)
	}
	// Another authority: the certificates of before are worth nothing, until
	// those of the new one are there on both sides.
	next := authority(t)
	put(t, filesB.CACert, next.PEM())
	if err := dial(); err == nil {
		t.Fatal("a certificate of the old authority was taken")
	}
	put(t, filesA.CACert, append(next.PEM(), ca.PEM()...))
	second := issue(t, next, pki.Request{Host: "hosta"})
	put(t, filesA.ClientCert, second.ClientCert)
	if err := dial(); err == nil {
		t.Fatal("a certificate without its key was taken")
	}
	if log.count("those of before") != 1 {
		t.Errorf("log:\n%s", log.text.String())
	}
	put(t, filesA.ClientKey, second.ClientKey)
	if err := dial(); err != nil {
		t.Fatalf("after the change: %v", err)
	}
	// Taken back.
	list, err := next.Revoke(second)
	if err != nil {
		t.Fatal(err)
	}
	put(t, filesB.CRL, list)
	if err := dial(); err == nil {
		t.Fatal("a revoked certificate was taken")
	}
	if err := os.Remove(filesB.CRL); err != nil {
		t.Fatal(err)
	}
	if err := dial(); err != nil {
		t.Fatalf("without a list: %v", err)
	}
}

func TestTLSNames(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	h := issue(t, ca, pki.Request{Host: "a.example.org", Names: []string{"192.0.2.7"}})
	names := func(host string) string {
		return map[string]string{"hosta": "a.example.org", "hostip": "192.0.2.7"}[host]
	}
	files := install(t, t.TempDir(), ca.PEM(), h)
	tr, err := TLS(files, names, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := startTLS(t, tr, io.Discard)
	for _, tt := range []struct {
		from, to string
		want     error
	}{
		{"hosta", "hostip", nil},
		{"hostip", "hosta", nil},
		{"hosta", "hostb", ErrIdentity},
		{"hostb", "hosta", ErrRefused},
	} {
		hello := testHello
		hello.From, hello.To = tt.from, tt.to
		conn, _, err := Dial(t.Context(), tr, addr, hello, DefaultConfig())
		if !errors.Is(err, tt.want) {
			t.Errorf("%s to %s: %v, want %v", tt.from, tt.to, err, tt.want)
		}
		if err == nil {
			_ = conn.Close()
		}
	}
}

func TestTLSNeedsItsFiles(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	files := install(t, t.TempDir(), ca.PEM(), issue(t, ca, pki.Request{Host: "hosta"}))
	for name, spoil := range map[string]func(p *PKI){
		"no authority":    func(p *PKI) { p.CACert += "-none" },
		"empty authority": func(p *PKI) { p.CACert = filepath.Join(t.TempDir(), "empty"); put(t, p.CACert, nil) },
		"no key":          func(p *PKI) { p.ServerKey += "-none" },
		"another's key":   func(p *PKI) { p.ClientKey = p.ServerKey },
		"broken CRL":      func(p *PKI) { p.CRL = p.CACert },
	} {
		p := files
		spoil(&p)
		if _, err := TLS(p, itself, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrCredentials) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCloseDoesNotWait: a peer that is cut off, with the buffers full, must not
// hold up who goes live.
func TestCloseDoesNotWait(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	tr := transport(t, install(t, t.TempDir(), ca.PEM(), issue(t, ca, pki.Request{Host: "hosta", Names: []string{"hostb"}})), io.Discard)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ln, err := tr.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, tr, ln, DefaultConfig(), func(ctx context.Context, in *Incoming) {
			conn, err := in.Welcome(ctx, 0)
			if err == nil {
				<-ctx.Done()
				_ = conn.Close()
			}
		})
	}()
	conn, _, err := Dial(t.Context(), tr, ln.Addr().String(), testHello, DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	full := make(chan struct{})
	go func() {
		defer close(full)
		buf := make([]byte, 64<<10)
		for {
			_ = conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	}()
	<-full
	began := time.Now()
	_ = conn.Close()
	if d := time.Since(began); d > time.Second {
		t.Errorf("Close took %v", d)
	}
	cancel()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Errorf("Serve: %v", err)
	}
}

// TestSilentStrangersMakeRoom: connections that say nothing do not keep an agent
// out, however many there are.
func TestSilentStrangersMakeRoom(t *testing.T) {
	t.Parallel()
	var log lines
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ln, err := Plain().Listen(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, Plain(), ln, cfg, func(ctx context.Context, in *Incoming) {
			if conn, err := in.Welcome(ctx, 0); err == nil {
				_ = conn.Close()
			}
		})
	}()
	for range 4 * cfg.MaxHandshakes {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
	}
	began := time.Now()
	conn, _, err := Dial(t.Context(), Plain(), ln.Addr().String(), testHello, cfg)
	if err != nil || time.Since(began) > 5*time.Second {
		t.Fatalf("%v after %v", err, time.Since(began))
	}
	_ = conn.Close()
	cancel()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Errorf("Serve: %v", err)
	}
	if n := log.count("handshake failed"); n != 1 {
		t.Errorf("%d lines in the log, want one", n)
	}
}

func TestComplaintsAreBounded(t *testing.T) {
	t.Parallel()
	c := &Complaints{}
	now := time.Now()
	addr := origin(&net.TCPConn{})
	for i := range 10 {
		if _, due := c.due(addr, now); due != (i == 0) {
			t.Fatalf("call %d: due %v", i, due)
		}
	}
	if skipped, due := c.due(addr, now.Add(complainEach)); !due || skipped != 9 {
		t.Errorf("a minute later: %d, %v", skipped, due)
	}
}

// BenchmarkTransport compares what the transports carry.
func BenchmarkTransport(b *testing.B) {
	ca := authority(b)
	files := install(b, b.TempDir(), ca.PEM(), issue(b, ca, pki.Request{Host: "hosta", Names: []string{"hostb"}}))
	for name, tr := range map[string]Transport{"plain": Plain(), "TLS": transport(b, files, io.Discard)} {
		b.Run(name, func(b *testing.B) {
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			ln, err := tr.Listen(ctx, "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			got := make(chan int64, 1)
			go func() {
				_ = Serve(ctx, tr, ln, DefaultConfig(), func(ctx context.Context, in *Incoming) {
					if conn, err := in.Welcome(ctx, 0); err == nil {
						n, _ := io.Copy(io.Discard, conn)
						got <- n
					}
				})
			}()
			conn, _, err := Dial(ctx, tr, ln.Addr().String(), testHello, DefaultConfig())
			if err != nil {
				b.Fatal(err)
			}
			buf := make([]byte, 64<<10)
			b.SetBytes(int64(len(buf)))
			for b.Loop() {
				if _, err := conn.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			<-got
			_ = conn.Close()
		})
	}
}

// FuzzRevocation: a list of revoked certificates is understood or refused; it is
// never taken for none.
func FuzzRevocation(f *testing.F) {
	ca := authority(f)
	h := issue(f, ca, pki.Request{Host: "hosta"})
	list, err := ca.Revoke(h)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(list)
	f.Add(append(list, list...))
	f.Add([]byte("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"))
	f.Add(ca.PEM())
	f.Fuzz(func(t *testing.T, text []byte) {
		lists, err := parseCRL(text)
		if (err == nil) != (len(lists) > 0) {
			t.Fatalf("%d lists, %v", len(lists), err)
		}
	})
}
