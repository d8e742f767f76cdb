// SPDX-License-Identifier: Apache-2.0

// Package pki makes what the logging channel's TLS needs, in the files and with
// the names that libvirt uses: an authority, and for each host a certificate to
// serve with and one to call others with. It is for the lab, for tests, and for
// operators who have no authority of their own yet; certtool does as well.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Names of the files. Those of a host lie in libvirt's layout as
// /etc/pki/CA/cacert.pem, /etc/pki/libvirt/servercert.pem and
// /etc/pki/libvirt/private/serverkey.pem.
const (
	CACert     = "cacert.pem"
	CAKey      = "cakey.pem"
	CRL        = "cacrl.pem"
	ServerCert = "servercert.pem"
	ServerKey  = "serverkey.pem"
	ClientCert = "clientcert.pem"
	ClientKey  = "clientkey.pem"
)

// How long certificates are valid unless an [Request] says otherwise.
const (
	caYears   = 10
	hostYears = 2
)

// skew lets a certificate be used at once by a host whose clock is behind.
const skew = time.Hour

// ErrFile is wrapped when a file is not the certificate or key that it should be.
var ErrFile = errors.New("not usable as a certificate authority")

// CA is a certificate authority whose key is at hand.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey

	fault fault
}

// NewCA makes an authority of a name that only people read.
func NewCA(name string) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-skew), NotAfter: now.AddDate(caYears, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &CA{cert: cert, key: key}, err
}

// serial is 127 random bits, so that no two are alike.
func serial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails, see crypto/rand
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b[:])
}

// OpenCA reads the authority that [CA.Save] wrote.
func OpenCA(dir string) (*CA, error) {
	cert, err := readPEM(filepath.Join(dir, CACert), "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	key, err := readPEM(filepath.Join(dir, CAKey), "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	ca := &CA{}
	if ca.cert, err = x509.ParseCertificate(cert); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", CACert, ErrFile, err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", CAKey, ErrFile, err)
	}
	var ok bool
	if ca.key, ok = parsed.(*ecdsa.PrivateKey); !ok || !ca.key.PublicKey.Equal(ca.cert.PublicKey) {
		return nil, fmt.Errorf("%s: %w: it is not the key of %s", CAKey, ErrFile, CACert)
	}
	return ca, nil
}

func readPEM(path, kind string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s: %w: no %s in it", path, ErrFile, kind)
	}
	return block.Bytes, nil
}

// Save writes the authority's certificate and key into dir. It overwrites
// nothing.
func (ca *CA) Save(dir string) error {
	key, err := keyPEM(ca.key)
	if err != nil {
		return err
	}
	return writeAll(dir, []file{{CAKey, key, 0o600}, {CACert, ca.PEM(), 0o644}}, ca.fault)
}

// PEM is the authority's certificate.
func (ca *CA) PEM() []byte { return certPEM(ca.cert.Raw) }

// Request says what a host's certificates are to be.
type Request struct {
	// Host is the host's name as the configurations of its peers call it.
	Host string
	// Names are more DNS names and IP addresses of the host.
	Names []string
	// NotBefore and NotAfter are now and in two years if they are zero.
	NotBefore, NotAfter time.Time
}

// Host is what one host needs besides the authority's certificate.
type Host struct {
	ServerCert, ServerKey, ClientCert, ClientKey []byte // PEM

	server, client *big.Int
	fault          fault
}

// Issue makes the certificates of a host.
func (ca *CA) Issue(r Request) (*Host, error) {
	h := &Host{}
	var err error
	if h.ServerCert, h.ServerKey, h.server, err = ca.issue(r, x509.ExtKeyUsageServerAuth); err != nil {
		return nil, err
	}
	h.ClientCert, h.ClientKey, h.client, err = ca.issue(r, x509.ExtKeyUsageClientAuth)
	return h, err
}

func (ca *CA) issue(r Request, usage x509.ExtKeyUsage) (cert, key []byte, number *big.Int, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: r.Host},
		NotBefore: r.NotBefore, NotAfter: r.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		BasicConstraintsValid: true,
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = now.Add(-skew)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = now.AddDate(hostYears, 0, 0)
	}
	for _, name := range append([]string{r.Host}, r.Names...) {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &private.PublicKey, ca.key)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("certificate of %s: %w", r.Host, err)
	}
	key, err = keyPEM(private)
	return certPEM(der), key, template.SerialNumber, err
}

// Save writes the four files of a host into dir. It overwrites nothing.
func (h *Host) Save(dir string) error {
	return writeAll(dir, []file{
		{ServerKey, h.ServerKey, 0o600}, {ClientKey, h.ClientKey, 0o600},
		{ServerCert, h.ServerCert, 0o644}, {ClientCert, h.ClientCert, 0o644},
	}, h.fault)
}

// Revoke makes the list that takes the certificates of hosts back, good for a
// year.
func (ca *CA) Revoke(hosts ...*Host) ([]byte, error) {
	now := time.Now()
	list := &x509.RevocationList{Number: serial(), ThisUpdate: now.Add(-skew), NextUpdate: now.AddDate(1, 0, 0)}
	for _, h := range hosts {
		for _, n := range []*big.Int{h.server, h.client} {
			list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
				x509.RevocationListEntry{SerialNumber: n, RevocationTime: now})
		}
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, ca.cert, ca.key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), nil
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// step is what is done to the filesystem, in this order for each file.
type step string

const (
	stepCreate step = "create" // of a temporary file
	stepWrite  step = "write"
	stepSync   step = "sync"
	stepLink   step = "link" // to the final name
	stepRemove step = "remove"
)

// fault, unless nil, comes before each step, and may fail it. For tests only.
type fault func(s step, path string, text []byte) error

func (f fault) do(s step, path string, text []byte, act func() error) error {
	if f != nil {
		if err := f(s, path, text); err != nil {
			return err
		}
	}
	return act()
}

// file is one to write.
type file struct {
	name string
	text []byte
	mode fs.FileMode
}

// writeAll writes files, each of which is there as a whole or not at all whatever
// ends this process. It overwrites nothing.
func writeAll(dir string, files []file, f fault) error {
	for _, one := range files {
		err := write(dir, one, f)
		if errors.Is(err, fs.ErrExist) {
			return halfway(dir, files, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// halfway tells what to do where an earlier attempt was interrupted.
func halfway(dir string, files []file, err error) error {
	var have, missing []string
	for _, one := range files {
		if _, err := os.Lstat(filepath.Join(dir, one.name)); err == nil {
			have = append(have, one.name)
		} else {
			missing = append(missing, one.name)
		}
	}
	if len(missing) == 0 {
		return err
	}
	return fmt.Errorf("%w; without %s it is of no use, as when it was interrupted: remove %s from %s and try again",
		err, strings.Join(missing, ", "), strings.Join(have, ", "), dir)
}

func write(dir string, one file, f fault) error {
	final := filepath.Join(dir, one.name)
	temp := final + ".new"
	var out *os.File
	if err := f.do(stepCreate, temp, nil, func() (err error) {
		// One that an interrupted attempt left is worth nothing.
		if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		out, err = os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, one.mode)
		return err
	}); err != nil {
		return err
	}
	err := f.do(stepWrite, temp, one.text, func() error { _, err := out.Write(one.text); return err })
	if err == nil {
		err = f.do(stepSync, temp, nil, out.Sync)
	}
	err = errors.Join(err, out.Close())
	if err == nil {
		err = f.do(stepLink, final, nil, func() error { return os.Link(temp, final) })
	}
	removed := f.do(stepRemove, temp, nil, func() error { return os.Remove(temp) })
	if err != nil {
		return err
	}
	return removed
}
