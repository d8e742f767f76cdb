// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"
)

// TLS is TCP under TLS 1.3 in which both sides show a certificate. Names gives
// the DNS name or IP address that a host's certificates are to be for; log takes
// what is to be said of the files.
func TLS(files PKI, names func(host string) string, log *slog.Logger) (Transport, error) {
	k, err := newKeeper(files, log)
	if err != nil {
		return nil, err
	}
	return &secure{keeper: k, names: names, now: time.Now}, nil
}

type secure struct {
	keeper *keeper
	names  func(string) string
	now    func() time.Time
}

// base is common to both sides. Nothing of an earlier session is taken up again,
// so each connection has its certificates checked.
func base() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		// Of records that start small only a web page has use.
		DynamicRecordSizingDisabled: true,
	}
}

func (s *secure) Dial(ctx context.Context, address, host string) (net.Conn, error) {
	raw, err := plain{}.Dial(ctx, address, host)
	if err != nil {
		return nil, err
	}
	creds := s.keeper.get()
	cfg := base()
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &creds.client, nil }
	// The verification is our own: it knows of revocation, and reads the same
	// files that the rest does.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(st tls.ConnectionState) error {
		if err := creds.verify(st.PeerCertificates, x509.ExtKeyUsageServerAuth, s.now()); err != nil {
			return err
		}
		return identify(st.PeerCertificates[0], host, s.names(host))
	}
	conn := &secured{tls.Client(raw, cfg)}
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("TLS with the agent at %s: %w", address, err)
	}
	return conn, nil
}

func (s *secure) Listen(ctx context.Context, address string) (net.Listener, error) {
	ln, err := plain{}.Listen(ctx, address)
	if err != nil {
		return nil, err
	}
	return &secureListener{Listener: ln, transport: s}, nil
}

// Authenticate needs the handshake to be over, as it is once bytes were read.
func (s *secure) Authenticate(conn net.Conn, host string) error {
	c, ok := conn.(*secured)
	if !ok {
		return fmt.Errorf("%w: no TLS on the connection", ErrIdentity)
	}
	st := c.ConnectionState()
	if !st.HandshakeComplete || len(st.PeerCertificates) == 0 {
		return fmt.Errorf("%w: it showed none", ErrIdentity)
	}
	return identify(st.PeerCertificates[0], host, s.names(host))
}

// identify tells whether a certificate is for a name. Only alternative names
// count: what is in the subject is for people.
func identify(cert *x509.Certificate, host, name string) error {
	if err := cert.VerifyHostname(name); err != nil {
		has := append([]string(nil), cert.DNSNames...)
		for _, ip := range cert.IPAddresses {
			has = append(has, ip.String())
		}
		if len(has) == 0 {
			has = []string{"none"}
		}
		return fmt.Errorf("%w: host %s is to have one for %q, and this one, %q, has the names: %s; "+
			"issue one that has it, or set certificate_name of that peer", ErrIdentity, host, name, cert.Subject, strings.Join(has, ", "))
	}
	return nil
}

type secureListener struct {
	net.Listener
	transport *secure
}

// Accept does not wait for the handshake, which the first read does: the peer
// may never say a word.
func (l *secureListener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	cfg := base()
	cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		creds := l.transport.keeper.get()
		own := base()
		own.Certificates = []tls.Certificate{creds.server}
		own.ClientAuth = tls.RequireAnyClientCert
		own.VerifyConnection = func(st tls.ConnectionState) error {
			return creds.verify(st.PeerCertificates, x509.ExtKeyUsageClientAuth, l.transport.now())
		}
		return own, nil
	}
	return &secured{tls.Server(raw, cfg)}, nil
}

// secured is a TLS connection that never makes Close wait.
type secured struct{ *tls.Conn }

// farewell is how long the peer may take to be told of the end. Whoever goes live
// closes a connection to a host that is cut off.
const farewell = 50 * time.Millisecond

// Close tells the peer, if that can be done at once. Its failure is no news: the
// connection is over in any case.
func (c *secured) Close() error {
	hurry := time.AfterFunc(farewell, func() { _ = c.NetConn().Close() })
	defer hurry.Stop()
	_ = c.Conn.Close()
	return nil
}
