// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"
)

// Errors of certificates.
var (
	// ErrCredentials: a file of the PKI cannot be used.
	ErrCredentials = errors.New("unusable certificate file")
	// ErrIdentity: the peer's certificate is not that of the host it is said to be.
	ErrIdentity = errors.New("peer's certificate is not of that host")
	// ErrRevoked: the peer's certificate was taken back, or it is not known
	// whether it was.
	ErrRevoked = errors.New("peer's certificate is revoked")
)

// PKI names the files that a host's TLS is made of, all PEM. The layout is
// libvirt's.
type PKI struct {
	// CACert has the authorities whose certificates are accepted.
	CACert string
	// CRL has what they took back; a file that is not there takes nothing back.
	CRL                   string
	ServerCert, ServerKey string
	ClientCert, ClientKey string
}

// maxPEM bounds each file.
const maxPEM = 4 << 20

// credentials is what one reading of the files gave.
type credentials struct {
	roots          *x509.CertPool
	revoked        []*x509.RevocationList
	server, client tls.Certificate
}

// keeper holds the newest credentials that could be read. It looks at the files
// at each handshake, so that a renewed certificate counts from then on.
type keeper struct {
	files PKI
	log   *slog.Logger

	mu      sync.Mutex
	current *credentials
	seen    [6]stamp
	settled bool // seen is old enough to tell any later change
}

// stamp tells one content of a file from another.
type stamp struct {
	inode          uint64
	size           int64
	changed, wrote time.Time
	missing        bool
}

// settle is longer than the steps of a filesystem's clock: a file that was
// written more recently may change again without a sign.
const settle = 2 * time.Second

func newKeeper(files PKI, log *slog.Logger) (*keeper, error) {
	k := &keeper{files: files, log: log}
	k.seen, k.settled = k.look(time.Now())
	var err error
	if k.current, err = files.load(); err == nil {
		k.tellValidity()
	}
	return k, err
}

// get gives the credentials of now. Files that cannot be used, as when a
// certificate was renewed and its key is still to come, leave those of before.
func (k *keeper) get() *credentials {
	k.mu.Lock()
	defer k.mu.Unlock()
	seen, settled := k.look(time.Now())
	if seen == k.seen && k.settled {
		return k.current
	}
	changed := seen != k.seen
	k.seen, k.settled = seen, settled
	fresh, err := k.files.load()
	switch {
	case err == nil:
		k.current = fresh
		if changed {
			k.tellValidity()
		}
	case changed:
		k.log.Warn("changed certificates cannot be used; those of before still are", "error", err)
	}
	return k.current
}

// renewal is how early the end of a certificate is worth a warning.
const renewal = 30 * 24 * time.Hour

func (k *keeper) tellValidity() {
	server, client := k.current.server.Leaf.NotAfter, k.current.client.Leaf.NotAfter
	level := slog.LevelInfo
	if left := min(time.Until(server), time.Until(client)); left < renewal {
		level = slog.LevelWarn
	}
	k.log.Log(context.Background(), level, "certificates were read", "server_until", server, "client_until", client)
}

func (k *keeper) look(now time.Time) (seen [6]stamp, settled bool) {
	settled = true
	f := k.files
	for i, path := range []string{f.CACert, f.CRL, f.ServerCert, f.ServerKey, f.ClientCert, f.ClientKey} {
		info, err := os.Stat(path)
		if err != nil {
			seen[i].missing = true
			continue
		}
		seen[i] = stamp{size: info.Size(), wrote: info.ModTime()}
		newest := info.ModTime()
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			seen[i].inode = st.Ino
			seen[i].changed = time.Unix(st.Ctim.Unix())
			newest = seen[i].changed
		}
		// One of the future is a clock that was put back, and as young as can be.
		if now.Sub(newest) < settle {
			settled = false
		}
	}
	return seen, settled
}

func (p PKI) load() (*credentials, error) {
	c := &credentials{roots: x509.NewCertPool()}
	text, err := readPEM(p.CACert)
	if err != nil {
		return nil, err
	}
	if !c.roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s: %w: no certificate in it", p.CACert, ErrCredentials)
	}
	if c.revoked, err = loadCRL(p.CRL); err != nil {
		return nil, err
	}
	if c.server, err = loadPair(p.ServerCert, p.ServerKey); err != nil {
		return nil, err
	}
	c.client, err = loadPair(p.ClientCert, p.ClientKey)
	return c, err
}

func readPEM(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrCredentials, err)
	case len(text) > maxPEM:
		return nil, fmt.Errorf("%s: %w: it is larger than %d MiB", path, ErrCredentials, maxPEM>>20)
	}
	return text, nil
}

func loadPair(cert, key string) (tls.Certificate, error) {
	c, err := readPEM(cert)
	if err != nil {
		return tls.Certificate{}, err
	}
	k, err := readPEM(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	pair, err := tls.X509KeyPair(c, k)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s and %s: %w: %w", cert, key, ErrCredentials, err)
	}
	return pair, nil
}

func loadCRL(path string) ([]*x509.RevocationList, error) {
	text, err := readPEM(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	lists, err := parseCRL(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, ErrCredentials, err)
	}
	return lists, nil
}

func parseCRL(text []byte) ([]*x509.RevocationList, error) {
	var lists []*x509.RevocationList
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "X509 CRL" {
			continue
		}
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, err
		}
		lists = append(lists, list)
	}
	if len(lists) == 0 {
		return nil, errors.New("no revocation list in it")
	}
	return lists, nil
}

// verify tells whether the peer's certificates lead to an authority, for the
// usage and now, and none of them was taken back.
func (c *credentials) verify(peer []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	if len(peer) == 0 {
		return fmt.Errorf("%w: it showed none", ErrIdentity)
	}
	intermediates := x509.NewCertPool()
	for _, cert := range peer[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := peer[0].Verify(x509.VerifyOptions{
		Roots: c.roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return fmt.Errorf("peer's certificate %q: %w", peer[0].Subject, err)
	}
	// Any chain will do.
	for _, chain := range chains {
		if err = c.checkChain(chain, now); err == nil {
			return nil
		}
	}
	return err
}

// checkChain looks each certificate up in the list of its issuer. An issuer
// without a list takes nothing back. One whose list is out of date may have
// taken back anything, as libvirt sees it.
func (c *credentials) checkChain(chain []*x509.Certificate, now time.Time) error {
	for i := range len(chain) - 1 {
		cert, issuer := chain[i], chain[i+1]
		for _, list := range c.revoked {
			if !bytes.Equal(list.RawIssuer, cert.RawIssuer) {
				continue
			}
			if err := list.CheckSignatureFrom(issuer); err != nil {
				// Another authority of that name, or a forgery.
				return fmt.Errorf("%w: the list of %q is not by that authority: %w", ErrRevoked, list.Issuer, err)
			}
			if !list.NextUpdate.IsZero() && now.After(list.NextUpdate) {
				return fmt.Errorf("%w, perhaps: the list of %q is valid until %s only; install a newer one",
					ErrRevoked, list.Issuer, list.NextUpdate.Format(time.DateTime))
			}
			for _, e := range list.RevokedCertificateEntries {
				if e.SerialNumber.Cmp(cert.SerialNumber) == 0 {
					return fmt.Errorf("%w: %q, number %x", ErrRevoked, cert.Subject, cert.SerialNumber)
				}
			}
		}
	}
	return nil
}
