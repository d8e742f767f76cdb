// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

var testHello = Hello{
	Purpose: PurposeSession, From: "hosta", To: "hostb",
	Domain: plugin.UUID{1, 2, 3, 15: 9}, Epoch: 7, Target: "vda",
}

// start serves a handler on loopback and returns the address.
func start(t *testing.T, cfg Config, handle func(context.Context, *Incoming)) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := Plain().Listen(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, Plain(), ln, cfg, handle) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	return ln.Addr().String()
}

func TestHandshakeThenRawBytes(t *testing.T) {
	got := make(chan Hello, 1)
	addr := start(t, DefaultConfig(), func(ctx context.Context, in *Incoming) {
		got <- in.Hello
		conn, err := in.Welcome(ctx, 4711)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		// At once behind WELCOME: none of it may be lost in the handshake.
		_, _ = conn.Write([]byte("raw bytes"))
	})
	conn, resume, err := Dial(t.Context(), Plain(), addr, testHello, DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if h := <-got; h != testHello {
		t.Errorf("HELLO %+v, want %+v", h, testHello)
	}
	if resume != 4711 {
		t.Errorf("resume at %d, want 4711", resume)
	}
	if b, err := io.ReadAll(conn); err != nil || string(b) != "raw bytes" {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestRefuse(t *testing.T) {
	handled := make(chan struct{})
	addr := start(t, DefaultConfig(), func(ctx context.Context, in *Incoming) {
		if in.Hello.Target == "forgotten" {
			return
		}
		defer close(handled)
		if err := in.Refuse(ctx, RefuseEpoch, "epoch 7 is over"); err != nil {
			t.Error(err)
		}
		if _, err := in.Welcome(ctx, 0); !errors.Is(err, ErrClosed) {
			t.Errorf("welcome after refusal: %v", err)
		}
	})
	_, _, err := Dial(t.Context(), Plain(), addr, testHello, DefaultConfig())
	// The answer is here before Refuse returns, which the end of the test would
	// interrupt.
	<-handled
	var re *RefusedError
	if !errors.Is(err, ErrRefused) || !errors.As(err, &re) || re.Code != RefuseEpoch || re.Text != "epoch 7 is over" {
		t.Errorf("error %v", err)
	}
	h := testHello
	h.Target = "forgotten"
	if _, _, err = Dial(t.Context(), Plain(), addr, h, DefaultConfig()); !errors.As(err, &re) || re.Code != RefuseInternal {
		t.Errorf("a handler that answers nothing: %v", err)
	}
}

// serveRaw answers the bytes of a client that breaks the rules.
func serveRaw(t *testing.T, send []byte) []byte {
	t.Helper()
	addr := start(t, DefaultConfig(), func(context.Context, *Incoming) { t.Error("the handler ran") })
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write(send); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	answer, err := io.ReadAll(conn)
	if errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("the connection was left open")
	}
	return answer
}

func TestServeRefusesOtherVersion(t *testing.T) {
	hello, err := encodeHello(testHello)
	if err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint16(hello[frameHeader+helloVersion:], ProtocolVersion+1)
	answer := serveRaw(t, hello)
	if len(answer) < frameHeader+4 || FrameType(answer[0]) != FrameRefuse ||
		binary.BigEndian.Uint16(answer[frameHeader+2:]) != uint16(RefuseVersion) {
		t.Errorf("answer %q, want REFUSE for the version", answer)
	}
}

func TestServeDoesNotAnswerStrangers(t *testing.T) {
	for _, send := range []string{
		"GET / HTTP/1.1\r\n\r\n",
		string(append(appendHeader(nil, FrameHello, 6), "XXXX\x00\x01"...)),
		string(appendHeader(nil, FrameHello, minFrame+1)),
	} {
		if answer := serveRaw(t, []byte(send)); len(answer) != 0 {
			t.Errorf("%q was answered by %q", send, answer)
		}
	}
}

func TestDialErrors(t *testing.T) {
	other := binary.BigEndian.AppendUint16(nil, ProtocolVersion+1)
	tests := []struct {
		name   string
		answer []byte
		want   error
	}{
		{"welcome of another version", append(append(appendHeader(nil, FrameWelcome, 10), other...), make([]byte, 8)...), ErrVersion},
		{
			"refusal of our version",
			append(append(appendHeader(nil, FrameRefuse, 4), other...), 0, byte(RefuseVersion)), ErrVersion,
		},
		{"short welcome", appendHeader(nil, FrameWelcome, 0), ErrMalformed},
		{"log as answer", append(appendHeader(nil, FrameLog, 8), make([]byte, 8)...), ErrMalformed},
		{"oversized", appendHeader(nil, FrameWelcome, minFrame+1), ErrFrameTooLong},
		{"unknown type", []byte{99, 0, 0, 0, 0}, ErrMalformed},
		{"hangs up", nil, io.ErrUnexpectedEOF},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tr := &pipeTransport{serve: func(c net.Conn) {
				var header [frameHeader]byte
				_, _, _ = readFrame(c, &header, nil, minFrame)
				_, _ = c.Write(tt.answer)
				_ = c.Close()
			}}
			if _, _, err := Dial(t.Context(), tr, "peer", testHello, DefaultConfig()); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
	long := testHello
	long.From = strings.Repeat("x", maxName+1)
	if _, _, err := Dial(t.Context(), Plain(), "", long, DefaultConfig()); !errors.Is(err, ErrMalformed) {
		t.Errorf("long name: %v", err)
	}
}

// pipeTransport connects to a function.
type pipeTransport struct{ serve func(net.Conn) }

func (p *pipeTransport) Dial(context.Context, string, string) (net.Conn, error) {
	a, b := net.Pipe()
	go p.serve(b)
	return a, nil
}

func (p *pipeTransport) Listen(context.Context, string) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

func (p *pipeTransport) Authenticate(net.Conn, string) error { return nil }

func TestHandshakeTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := make(chan net.Conn, 1)
		tr := &pipeTransport{serve: func(c net.Conn) {
			var header [frameHeader]byte
			_, _, _ = readFrame(c, &header, nil, minFrame)
			silent <- c
		}}
		began := time.Now()
		_, _, err := Dial(t.Context(), tr, "peer", testHello, DefaultConfig())
		var ne net.Error
		if !errors.As(err, &ne) || !ne.Timeout() || time.Since(began) != DefaultConfig().HandshakeTimeout {
			t.Errorf("error %v after %v", err, time.Since(began))
		}
		_ = (<-silent).Close()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := Dial(ctx, tr, "peer", testHello, DefaultConfig()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want that of the context", err)
		}
		_ = (<-silent).Close()
	})
}

func TestSplice(t *testing.T) {
	pair := func() (near, far *net.TCPConn) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ln.Close() }()
		a, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return a.(*net.TCPConn), b.(*net.TCPConn)
	}
	client, left := pair()
	server, right := pair()
	done := make(chan error, 1)
	go func() { done <- Splice(t.Context(), left, right) }()
	if _, err := client.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(server); err != nil || string(b) != "question" {
		t.Fatalf("server got %q, %v", b, err)
	}
	// The half-close has passed; the other direction still works.
	if _, err := server.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	if b, err := io.ReadAll(client); err != nil || string(b) != "answer" {
		t.Fatalf("client got %q, %v", b, err)
	}
	if err := <-done; err != nil {
		t.Errorf("Splice: %v", err)
	}
	_ = client.Close()

	client, left = pair()
	server, right = pair()
	defer func() { _ = client.Close(); _ = server.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- Splice(ctx, left, right) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Splice after cancel: %v", err)
	}
}

func FuzzFrames(f *testing.F) {
	hello, err := encodeHello(testHello)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(hello)
	f.Fuzz(func(t *testing.T, in []byte) {
		var header [frameHeader]byte
		var buf []byte
		r := bytes.NewReader(in)
		for {
			ft, payload, err := readFrame(r, &header, buf, 1<<16)
			if err != nil {
				if len(payload) != 0 {
					t.Fatal("payload beside an error")
				}
				return
			}
			buf = payload
			switch ft {
			case FrameHello:
				if h, err := parseHello(payload); err == nil {
					back, err := encodeHello(h)
					if err != nil || !bytes.Equal(back[frameHeader:], payload) {
						t.Fatalf("HELLO %+v does not come back: %v", h, err)
					}
				}
			case FrameWelcome, FrameRefuse:
				_, _ = parseAnswer(ft, payload)
			case FrameLog:
				if _, data, err := parseLog(payload); err == nil && len(data) != len(payload)-8 {
					t.Fatal("LOG lost bytes")
				}
			case FrameAck:
				_, _ = parseAck(payload)
			case FrameControl:
				if kind, err := parseControl(payload); err == nil && kind == "" {
					t.Fatal("CONTROL without kind")
				}
			case FrameRequest:
				if _, method, body, err := parseRequest(payload); err == nil && len(method)+len(body)+10 != len(payload) {
					t.Fatal("REQUEST lost bytes")
				}
			case FrameResponse:
				_, _, _, _ = parseResponse(payload)
			}
		}
	})
}

func TestConfigValidate(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"handshake timeout": func(c *Config) { c.HandshakeTimeout = 0 },
		"write timeout":     func(c *Config) { c.WriteTimeout = -1 },
		"small frame":       func(c *Config) { c.MaxFrame = 10 },
		"small queue":       func(c *Config) { c.QueueBytes = c.MaxFrame },
		"no requests":       func(c *Config) { c.MaxRequests = 0 },
		"no handshakes":     func(c *Config) { c.MaxHandshakes = 0 },
		"no logger":         func(c *Config) { c.Logger = nil },
	} {
		c := DefaultConfig()
		change(&c)
		if err := c.Validate(); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
