// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/arbiter/paxos"
	"ftvirt.org/ftvirt/plugin"
)

// witnessMarker is the file that makes a directory a witness's. Without it a
// witness does not start: one whose disk was lost or is not mounted must not
// vote, since it forgot what it promised.
const witnessMarker = "ftvirt-witness.json"

// witnessPath starts the path of each domain's register on a witness.
const witnessPath = "/v1/domains/"

// maxMessage bounds a message of the witness protocol, in bytes.
const maxMessage = 16 << 10

// WitnessConfig configures one witness of the majority backend.
type WitnessConfig struct {
	// Path is the witness's own directory, made ready by InitWitness, on a
	// disk that no other witness uses. Required.
	Path string
	// Key is the secret shared with the hosts, at least 32 bytes. Required.
	Key []byte
	// Log is told what goes wrong. Default slog.Default.
	Log *slog.Logger
	// Fault interferes with the storage. For tests only.
	Fault FaultFunc
}

// Witness is one voter of the majority backend: a third party for hosts that
// share no storage (the paper, section 4.1). It keeps one small file for each
// domain and answers hosts over HTTP. It knows nothing of epochs: what it holds
// for a domain is one paxos.Acceptor.
type Witness struct {
	dir  *Dir
	id   string
	key  key
	log  *slog.Logger
	lock *os.File

	// turn holds a token while nobody works on the storage. Unlike a mutex it
	// can be waited for in vain, when the disk hangs.
	turn chan struct{}
	// dirty domains had a write that failed halfway; what their file holds may
	// not be durable, so it is written again before it is relied on. It belongs
	// to whoever has the turn.
	dirty map[plugin.UUID]bool
	// complained is when the log was last told of a stranger, who could fill it.
	complained complaints
}

// complainEach is the least time between two lines about strangers.
const complainEach = time.Minute

// complaints limits lines about strangers. Its times keep what the system's clock
// that only goes forward says: one that is put back must not silence them.
type complaints struct {
	mu   sync.Mutex
	last time.Time
}

func (c *complaints) due(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.last.IsZero() && now.Sub(c.last) <= complainEach {
		return false
	}
	c.last = now
	return true
}

// InitWitness makes an existing, empty directory a witness's and returns its
// identity, which the hosts' configuration names. Repeating it changes nothing
// and returns the same. A witness that lost its directory must not be given a
// new one while domains are protected: hosts take it for another witness, and
// the others go on without it.
func InitWitness(ctx context.Context, path string) (id string, err error) {
	d, err := NewDir(DirConfig{Path: path})
	if err != nil {
		return "", err
	}
	return do(ctx, d.guard, "initialising witness directory "+d.path, func(ctx context.Context) (string, error) {
		names, err := d.list(ctx, d.path)
		if err != nil {
			return "", err
		}
		for _, name := range names {
			if name == markerName {
				return "", fmt.Errorf("%w: %s is the arbiter directory of another kind", ErrInvalid, d.path)
			}
		}
		marker, err := d.publish(ctx, d.path, witnessMarker, contents{Kind: kindWitness})
		return marker.Token, err
	})
}

// OpenWitness starts a witness. It wraps ErrNotInitialised if the directory is
// not a witness's, and ErrUnavailable if another process serves it.
func OpenWitness(ctx context.Context, cfg WitnessConfig) (*Witness, error) {
	if len(cfg.Key) < minKey {
		return nil, fmt.Errorf("%w: key of %d bytes, at least %d are needed", ErrInvalid, len(cfg.Key), minKey)
	}
	d, err := NewDir(DirConfig{Path: cfg.Path, Fault: cfg.Fault})
	if err != nil {
		return nil, err
	}
	w := &Witness{
		dir: d, key: cfg.Key, log: cfg.Log,
		turn: make(chan struct{}, 1), dirty: make(map[plugin.UUID]bool),
	}
	w.turn <- struct{}{}
	if w.log == nil {
		w.log = slog.Default()
	}
	w.lock, err = os.Open(d.path)
	if err != nil {
		return nil, fmt.Errorf("opening witness directory: %w: %w", ErrUnavailable, err)
	}
	if err := w.start(ctx); err != nil {
		_ = w.lock.Close()
		return nil, fmt.Errorf("opening witness directory %s: %w", d.path, err)
	}
	return w, nil
}

func (w *Witness) start(ctx context.Context) error {
	if err := unix.Flock(int(w.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%w: another witness serves it: %w", ErrUnavailable, err)
	}
	marker, err := w.dir.readAs(ctx, OpReadMarker, filepath.Join(w.dir.path, witnessMarker), kindWitness, "", 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrUnavailable, ErrNotInitialised)
	}
	if err != nil {
		return err
	}
	w.id = marker.Token
	names, err := w.dir.list(ctx, w.dir.path)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, tempPrefix) {
			_ = w.dir.removeTemp(ctx, filepath.Join(w.dir.path, name))
		}
	}
	// The last crash may have come between a rename and its sync.
	return w.dir.syncDir(ctx, w.dir.path)
}

// ID gives the identity that InitWitness gave.
func (w *Witness) ID() string { return w.id }

// Close lets another process serve the directory. Requests must have ended.
func (w *Witness) Close() error { return w.lock.Close() }

// Serve answers on ln until ctx ends, and closes it.
func (w *Witness) Serve(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler: w,
		// A host that is slower than this has given up.
		ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 4 << 10,
		ErrorLog:       slog.NewLogLogger(w.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving witness %s: %w", w.id, err)
	}
	return nil
}

// ServeHTTP answers one request. Whoever does not have the key learns nothing.
func (w *Witness) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, maxMessage))
	if err != nil {
		http.Error(rw, "unreadable", http.StatusBadRequest)
		return
	}
	nonce := r.Header.Get(headerNonce)
	if !equalMAC(r.Header.Get(headerMAC), w.key.request(w.id, nonce, r.URL.Path, body)) {
		if w.complained.due(time.Now()) {
			w.log.Warn("request with a wrong key, or for another witness", "from", r.RemoteAddr)
		}
		http.Error(rw, "not authenticated", http.StatusUnauthorized)
		return
	}
	status, answer := w.answer(r, body)
	rw.Header().Set("Content-Type", "application/json")
	rw.Header().Set(headerMAC, w.key.reply(w.id, nonce, status, answer))
	rw.WriteHeader(status)
	_, _ = rw.Write(answer) // the host asks again if it does not arrive
}

// answer gives the status and body for an authentic request. A body that comes
// with an error is its text.
func (w *Witness) answer(r *http.Request, body []byte) (int, []byte) {
	id, found := strings.CutPrefix(r.URL.Path, witnessPath)
	domain, err := plugin.ParseUUID(id)
	if !found || err != nil || r.Method != http.MethodPost {
		return http.StatusNotFound, []byte("no such thing")
	}
	var req paxos.Request
	if err := json.Unmarshal(body, &req); err != nil {
		return http.StatusBadRequest, []byte(err.Error())
	}
	reply, err := w.step(r.Context(), domain, req)
	if err == nil {
		body, err = json.Marshal(reply)
	}
	if err != nil {
		w.log.Error("cannot vote", "domain", domain, "error", err)
		return http.StatusServiceUnavailable, []byte(err.Error())
	}
	return http.StatusOK, body
}

// step lets the domain's acceptor answer req.
func (w *Witness) step(ctx context.Context, domain plugin.UUID, req paxos.Request) (paxos.Reply, error) {
	select {
	case <-w.turn:
	case <-ctx.Done():
		return paxos.Reply{}, gone(ctx, "waiting for the disk")
	}
	defer func() { w.turn <- struct{}{} }()
	a, err := w.load(ctx, domain)
	if err != nil {
		return paxos.Reply{}, err
	}
	next, reply, changed := a.Step(req)
	if changed || w.dirty[domain] {
		if err := w.store(ctx, domain, next); err != nil {
			return paxos.Reply{}, err
		}
	}
	return reply, nil
}

// vote is the file of one domain on a witness.
type vote struct {
	Version  int            `json:"version"`
	Domain   plugin.UUID    `json:"domain"`
	Acceptor paxos.Acceptor `json:"acceptor"`
	// Checksum is the SHA-256 of this object encoded with Checksum empty.
	Checksum string `json:"checksum"`
}

func (v vote) sum() (string, error) {
	v.Checksum = ""
	text, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("encoding vote: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

func (w *Witness) votePath(domain plugin.UUID) string {
	return filepath.Join(w.dir.path, domain.String()+".json")
}

// load gives the acceptor of domain, the zero one if there is no file yet. A
// file that cannot be trusted is no vote: this witness abstains.
func (w *Witness) load(ctx context.Context, domain plugin.UUID) (paxos.Acceptor, error) {
	path := w.votePath(domain)
	var text []byte
	err := w.dir.step(ctx, OpRead, path, func() (err error) {
		text, err = os.ReadFile(path)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return paxos.Acceptor{}, nil
	}
	if err != nil {
		return paxos.Acceptor{}, err
	}
	var v vote
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		return paxos.Acceptor{}, &CorruptError{Path: path, Reason: err.Error()}
	}
	switch sum, err := v.sum(); {
	case err != nil:
		return paxos.Acceptor{}, &CorruptError{Path: path, Reason: err.Error()}
	case v.Version != fileVersion:
		return paxos.Acceptor{}, &CorruptError{Path: path, Reason: fmt.Sprintf("format version %d, this ftvirt knows %d", v.Version, fileVersion)}
	case sum != v.Checksum:
		return paxos.Acceptor{}, &CorruptError{Path: path, Reason: "the checksum does not match"}
	case v.Domain != domain:
		return paxos.Acceptor{}, &CorruptError{Path: path, Reason: fmt.Sprintf("it belongs to domain %s", v.Domain)}
	}
	return v.Acceptor, nil
}

// store replaces the file of domain, durably. A crash leaves the old file or
// the new one.
func (w *Witness) store(ctx context.Context, domain plugin.UUID, a paxos.Acceptor) error {
	v := vote{Version: fileVersion, Domain: domain, Acceptor: a}
	sum, err := v.sum()
	if err != nil {
		return err
	}
	v.Checksum = sum
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding vote: %w", err)
	}
	temp, final := filepath.Join(w.dir.path, tempPrefix+newToken()), w.votePath(domain)
	err = w.dir.writeTemp(ctx, temp, append(text, '\n'))
	if err == nil {
		w.dirty[domain] = true
		err = w.dir.step(ctx, OpRename, final, func() error { return os.Rename(temp, final) })
	}
	if err != nil {
		return errors.Join(err, w.dir.removeTemp(ctx, temp))
	}
	if err := w.dir.syncDir(ctx, w.dir.path); err != nil {
		return err
	}
	delete(w.dirty, domain)
	return nil
}
