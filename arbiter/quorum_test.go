// SPDX-License-Identifier: Apache-2.0

package arbiter_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/arbitertest"
)

var testKey = bytes.Repeat([]byte{0xf7}, 32)

// voter is a witness of a test, which can be taken away and hindered.
type voter struct {
	*httptest.Server
	path    string
	address arbiter.WitnessAddress
	away    atomic.Bool
	slow    atomic.Bool

	mu      sync.Mutex
	witness *arbiter.Witness
}

// panel is the witnesses of one target.
type panel []*voter

// panels are those of this process, by target.
var panels sync.Map

func newPanel(t testing.TB, size int) (panel, string) {
	t.Helper()
	var p panel
	var names []string
	for range size {
		v := newVoter(t)
		p = append(p, v)
		names = append(names, v.address.String())
	}
	target := strings.Join(names, ",")
	panels.Store(target, p)
	return p, target
}

func newVoter(t testing.TB) *voter {
	t.Helper()
	v := &voter{path: filepath.Join(t.TempDir(), "witness")}
	if err := os.Mkdir(v.path, 0o755); err != nil {
		t.Fatal(err)
	}
	id, err := arbiter.InitWitness(t.Context(), v.path)
	if err != nil {
		t.Fatal(err)
	}
	v.open(t)
	v.Server = httptest.NewServer(http.HandlerFunc(v.serve))
	v.address = arbiter.WitnessAddress{ID: id, Address: v.Listener.Addr().String()}
	t.Cleanup(func() {
		v.Close()
		v.shut(t)
	})
	return v
}

// open starts the witness, as its daemon does after a crash.
func (v *voter) open(t testing.TB) {
	t.Helper()
	w, err := arbiter.OpenWitness(context.Background(), arbiter.WitnessConfig{
		Path: v.path, Key: testKey, Fault: hindered(v.path), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.witness = w
}

func (v *voter) shut(t testing.TB) {
	t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.witness.Close(); err != nil {
		t.Error(err)
	}
}

func (v *voter) serve(rw http.ResponseWriter, r *http.Request) {
	if v.away.Load() {
		panic(http.ErrAbortHandler) // the client sees the connection end
	}
	if v.slow.Load() {
		<-time.After(arbitertest.SlowBy)
	}
	v.mu.Lock()
	w := v.witness
	v.mu.Unlock()
	w.ServeHTTP(rw, r)
}

// most gives the witnesses without which there is no majority.
func (p panel) most() panel { return p[:len(p)/2+1] }

// settle waits until all witnesses hold the same for testDomain: a majority is
// enough for a call to return.
func (p panel) settle(t testing.TB) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		held := make(map[string]bool)
		for _, v := range p {
			text, err := os.ReadFile(filepath.Join(v.path, testDomain.String()+".json"))
			if err != nil {
				text = nil
			}
			held[string(text)] = true
		}
		if len(held) == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the witnesses still differ: %v", slices.Collect(maps.Keys(held)))
		}
		<-time.After(5 * time.Millisecond)
	}
}

func panelOf(t testing.TB, target string) panel {
	t.Helper()
	p, ok := panels.Load(target)
	if !ok {
		t.Fatalf("no witnesses %s", target)
	}
	return p.(panel)
}

// hinderMost hinders the storage of a majority.
func hinderMost(how string) func(testing.TB, string) func() {
	return func(t testing.TB, target string) func() {
		var mends []func()
		for _, v := range panelOf(t, target).most() {
			mends = append(mends, hinder(how)(t, v.path))
		}
		return func() {
			for _, mend := range mends {
				mend()
			}
		}
	}
}

func connectQuorum(target string, fault arbiter.FaultFunc) (arbiter.Arbiter, error) {
	cfg := arbiter.QuorumConfig{Key: testKey, Timeout: time.Minute, WitnessTimeout: 10 * time.Second, Fault: fault}
	for _, s := range strings.Split(target, ",") {
		w, err := arbiter.ParseWitnessAddress(s)
		if err != nil {
			return nil, err
		}
		cfg.Witnesses = append(cfg.Witnesses, w)
	}
	return arbiter.NewQuorum(cfg)
}

var quorumBackend = arbitertest.Backend{
	Name: "quorum",
	// Each call costs several writes on three disks, which here are one.
	Rounds: 50,
	New: func(t testing.TB) string {
		_, target := newPanel(t, 3)
		return target
	},
	Connect: func(target string) (arbiter.Arbiter, error) { return connectQuorum(target, nil) },
	Break: func(t testing.TB, target string) func() {
		set := func(away bool) {
			for _, v := range panelOf(t, target).most() {
				v.away.Store(away)
			}
		}
		set(true)
		return func() { set(false) }
	},
	Slow: func(t testing.TB, target string) func() {
		set := func(slow bool) {
			for _, v := range panelOf(t, target).most() {
				v.slow.Store(slow)
			}
		}
		set(true)
		return func() { set(false) }
	},
	ReadOnly: hinderMost("read-only"),
	Full:     hinderMost("full"),
	// A client that dies leaves its request with any number of witnesses.
	CrashPoints: []string{"before prepare", "after prepare", "before accept", "after accept"},
	Crashing: func(target, point string) (arbiter.Arbiter, error) {
		when, op, _ := strings.Cut(point, " ")
		return connectQuorum(target, func(f arbiter.Fault) error {
			if f.Op == arbiter.Op(op) && f.After == (when == "after") {
				return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), context.Canceled)
			}
			return nil
		})
	},
	Processes: true,
}

func TestQuorum(t *testing.T) { arbitertest.Run(t, quorumBackend) }

func newQuorum(t *testing.T, target string) arbiter.Arbiter {
	t.Helper()
	q, err := connectQuorum(target, nil)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestNewQuorumRefusesBadConfig(t *testing.T) {
	w := func(id, address string) arbiter.WitnessAddress {
		return arbiter.WitnessAddress{ID: id, Address: address}
	}
	a, b, c := w("a", "h:1"), w("b", "h:2"), w("c", "h:3")
	good := []arbiter.WitnessAddress{a, b, c}
	for name, cfg := range map[string]arbiter.QuorumConfig{
		"nobody":           {Key: testKey},
		"one":              {Key: testKey, Witnesses: good[:1]},
		"two":              {Key: testKey, Witnesses: good[:2]},
		"four":             {Key: testKey, Witnesses: append(good[:3:3], w("d", "h:4"))},
		"the same address": {Key: testKey, Witnesses: []arbiter.WitnessAddress{a, b, w("c", "h:2")}},
		"the same witness": {Key: testKey, Witnesses: []arbiter.WitnessAddress{a, b, w("b", "h:3")}},
		"no id":            {Key: testKey, Witnesses: []arbiter.WitnessAddress{a, b, w("", "h:3")}},
		"no key":           {Witnesses: good},
		"short key":        {Key: testKey[:31], Witnesses: good},
		"negative limit":   {Key: testKey, Witnesses: good, Timeout: -1},
	} {
		if _, err := arbiter.NewQuorum(cfg); !errors.Is(err, arbiter.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	for _, s := range []string{"", "id", "id@", "@h:1", "id@host", "h:1"} {
		if w, err := arbiter.ParseWitnessAddress(s); !errors.Is(err, arbiter.ErrInvalid) {
			t.Errorf("ParseWitnessAddress(%q) gives %v, %v", s, w, err)
		}
	}
	if got, err := arbiter.ParseWitnessAddress(a.String()); err != nil || got != a {
		t.Errorf("%v, %v after %v", got, err, a)
	}
}

// TestMinorityAway: with every single witness gone in turn, of three and of
// five two, everything goes on, and what was decided before holds.
func TestMinorityAway(t *testing.T) {
	for _, size := range []int{3, 5} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p, target := newPanel(t, size)
			q := newQuorum(t, target)
			owner := "a"
			for i := range p {
				epoch, err := q.Open(t.Context(), testDomain, owner, "b"+owner)
				if err != nil {
					t.Fatalf("round %d: Open: %v", i, err)
				}
				away := []*voter{p[i]}
				if size == 5 {
					away = append(away, p[(i+1)%size])
				}
				for _, v := range away {
					v.away.Store(true)
				}
				if err := q.Acquire(t.Context(), testDomain, epoch, "b"+owner); err != nil {
					t.Fatalf("round %d: Acquire: %v", i, err)
				}
				for _, v := range away {
					v.away.Store(false)
				}
				// Whoever answers now, a majority of it knows.
				p[(i+2)%size].away.Store(true)
				if err := q.Acquire(t.Context(), testDomain, epoch, owner); !errors.Is(err, arbiter.ErrLost) {
					t.Fatalf("round %d: Acquire by the other: %v", i, err)
				}
				p[(i+2)%size].away.Store(false)
				owner = "b" + owner
			}
		})
	}
}

// TestHungWitness: one that takes requests and never answers costs no time.
func TestHungWitness(t *testing.T) {
	p, target := newPanel(t, 3)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }() // its queue takes connections
	target = strings.Replace(target, p[0].address.Address, ln.Addr().String(), 1)
	q := newQuorum(t, target)
	start := time.Now()
	epoch, err := q.Open(t.Context(), testDomain, "a", "b")
	if err == nil {
		err = q.Acquire(t.Context(), testDomain, epoch, "b")
	}
	if took := time.Since(start); err != nil || took > 5*time.Second {
		t.Fatalf("%v after %v", err, took)
	}
}

// TestWitnessRestarts: a witness keeps its word over a crash.
func TestWitnessRestarts(t *testing.T) {
	p, target := newPanel(t, 3)
	q := newQuorum(t, target)
	epoch, err := q.Open(t.Context(), testDomain, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	// The third misses the decision.
	p[2].away.Store(true)
	if err := q.Acquire(t.Context(), testDomain, epoch, "b"); err != nil {
		t.Fatal(err)
	}
	litter := filepath.Join(p[1].path, ".tmp-x")
	if err := os.WriteFile(litter, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, v := range p[:2] {
		v.shut(t)
		v.open(t)
	}
	if _, err := os.Stat(litter); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a crash left stays: %v", err)
	}
	p[2].away.Store(false)
	p[0].away.Store(true)
	if err := q.Acquire(t.Context(), testDomain, epoch, "a"); !errors.Is(err, arbiter.ErrLost) {
		t.Fatalf("Acquire after the restart: %v, want ErrLost", err)
	}
}

// TestWitnessForgot: one with a new directory is not the one that promised.
func TestWitnessForgot(t *testing.T) {
	p, target := newPanel(t, 3)
	q := newQuorum(t, target)
	epoch, err := q.Open(t.Context(), testDomain, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	p[0].away.Store(true)
	if err := q.Acquire(t.Context(), testDomain, epoch, "a"); err != nil {
		t.Fatal(err)
	}
	p[0].away.Store(false)
	p[1].shut(t)
	if err := os.RemoveAll(p[1].path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(p[1].path, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := arbiter.WitnessConfig{Path: p[1].path, Key: testKey}
	if _, err := arbiter.OpenWitness(t.Context(), cfg); !errors.Is(err, arbiter.ErrNotInitialised) {
		t.Fatalf("OpenWitness of a bare directory: %v", err)
	}
	if _, err := arbiter.InitWitness(t.Context(), p[1].path); err != nil {
		t.Fatal(err)
	}
	p[1].open(t)
	p[2].away.Store(true)
	// The first does not know, and the second is not asked.
	err = q.Acquire(t.Context(), testDomain, epoch, "b")
	if !errors.Is(err, arbiter.ErrUnavailable) || !strings.Contains(err.Error(), p[1].address.ID) {
		t.Fatalf("Acquire: %v, want ErrUnavailable naming witness %s", err, p[1].address.ID)
	}
	p[2].away.Store(false)
	if err := q.Acquire(t.Context(), testDomain, epoch, "b"); !errors.Is(err, arbiter.ErrLost) {
		t.Fatalf("Acquire: %v, want ErrLost", err)
	}
}

// TestWitnessDamaged: a witness whose file is spoiled abstains, and says why.
func TestWitnessDamaged(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"empty":         func([]byte) []byte { return nil },
		"cut":           func(text []byte) []byte { return text[:len(text)/2] },
		"bit flip":      func(text []byte) []byte { return bytes.Replace(text, []byte(`"round":1`), []byte(`"round":0`), 1) },
		"newer version": func(text []byte) []byte { return bytes.Replace(text, []byte(`"version":1`), []byte(`"version":2`), 1) },
	} {
		t.Run(name, func(t *testing.T) {
			p, target := newPanel(t, 3)
			q := newQuorum(t, target)
			epoch, err := q.Open(t.Context(), testDomain, "a", "b")
			if err != nil {
				t.Fatal(err)
			}
			p.settle(t)
			file := filepath.Join(p[0].path, testDomain.String()+".json")
			text, err := os.ReadFile(file)
			if err == nil {
				err = os.WriteFile(file, change(text), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := q.Acquire(t.Context(), testDomain, epoch, "a"); err != nil {
				t.Fatalf("Acquire with the other two: %v", err)
			}
			p[1].away.Store(true)
			if _, err := q.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrUnavailable) || !strings.Contains(err.Error(), file) {
				t.Fatalf("Lookup without a majority: %v, want ErrUnavailable naming %s", err, file)
			}
		})
	}
}

// TestWitnessDiskFails: a vote that may not be durable is not relied on.
func TestWitnessDiskFails(t *testing.T) {
	for _, op := range []arbiter.Op{arbiter.OpCreate, arbiter.OpWrite, arbiter.OpSync, arbiter.OpRename, arbiter.OpSyncDir, arbiter.OpRead} {
		t.Run(string(op), func(t *testing.T) {
			var broken atomic.Bool
			var synced atomic.Int32
			path := t.TempDir()
			id, err := arbiter.InitWitness(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			w, err := arbiter.OpenWitness(t.Context(), arbiter.WitnessConfig{
				Path: path, Key: testKey, Log: slog.New(slog.DiscardHandler),
				Fault: func(f arbiter.Fault) error {
					switch {
					case f.Op == op && !f.After && broken.Load():
						return syscall.EIO
					case f.Op == arbiter.OpSyncDir && f.After:
						synced.Add(1)
					}
					return nil
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = w.Close() }()
			srv := httptest.NewServer(w)
			defer srv.Close()
			p, target := newPanel(t, 3)
			p[1].away.Store(true)
			target = strings.Replace(target, p[0].address.String(), id+"@"+srv.Listener.Addr().String(), 1)
			q := newQuorum(t, target)
			epoch, err := q.Open(t.Context(), testDomain, "a", "b")
			if err != nil {
				t.Fatal(err)
			}
			broken.Store(true)
			if err := q.Acquire(t.Context(), testDomain, epoch, "a"); !errors.Is(err, arbiter.ErrUnavailable) {
				t.Fatalf("Acquire: %v, want ErrUnavailable", err)
			}
			broken.Store(false)
			before := synced.Load()
			if err := q.Acquire(t.Context(), testDomain, epoch, "b"); err != nil && !errors.Is(err, arbiter.ErrLost) {
				t.Fatalf("Acquire after repair: %v", err)
			}
			if synced.Load() == before {
				t.Error("nothing was made durable after the repair")
			}
		})
	}
}

func TestOpenWitness(t *testing.T) {
	path := t.TempDir()
	first, err := arbiter.InitWitness(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := arbiter.InitWitness(t.Context(), path); err != nil || again != first {
		t.Fatalf("identity %q, then %q (%v)", first, again, err)
	}
	cfg := arbiter.WitnessConfig{Path: path, Key: testKey}
	w, err := arbiter.OpenWitness(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if w.ID() != first {
		t.Errorf("ID gives %q, want %q", w.ID(), first)
	}
	if _, err := arbiter.OpenWitness(t.Context(), cfg); !errors.Is(err, arbiter.ErrUnavailable) {
		t.Errorf("a second witness in the same directory: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if w, err = arbiter.OpenWitness(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	for name, cfg := range map[string]arbiter.WitnessConfig{
		"no key": {Path: path}, "short key": {Path: path, Key: testKey[:8]}, "relative": {Path: "x", Key: testKey},
	} {
		if _, err := arbiter.OpenWitness(t.Context(), cfg); !errors.Is(err, arbiter.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := arbiter.InitWitness(t.Context(), initDir(t)); !errors.Is(err, arbiter.ErrInvalid) {
		t.Errorf("InitWitness of an arbiter directory: %v", err)
	}
}

// TestServe: the daemon's loop ends with its context, and lets the port go.
func TestServe(t *testing.T) {
	v := newVoter(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- v.witness.Serve(ctx, ln) }()
	resp, err := http.Post("http://"+ln.Addr().String()+"/v1/domains/"+testDomain.String(), "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("Ftvirt-Mac") != "" {
		t.Errorf("without a key: %s, %v", resp.Status, resp.Header)
	}
	cancel()
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Serve does not end")
	}
}

// TestAuthentication: an impostor on either side gets nowhere.
func TestAuthentication(t *testing.T) {
	p, target := newPanel(t, 3)
	cfg := arbiter.QuorumConfig{Key: make([]byte, 32)}
	if _, err := rand.Read(cfg.Key); err != nil {
		t.Fatal(err)
	}
	for _, v := range p {
		cfg.Witnesses = append(cfg.Witnesses, v.address)
	}
	stranger, err := arbiter.NewQuorum(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stranger.Open(t.Context(), testDomain, "a", "b"); !errors.Is(err, arbiter.ErrUnavailable) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("with another key: %v", err)
	}
	q := newQuorum(t, target)
	if _, err := q.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrNoRecord) {
		t.Errorf("a stranger changed something: %v", err)
	}

	// Two witnesses whose answers are recorded, and played again later.
	var mu sync.Mutex
	recorded := make(map[string]*httptest.ResponseRecorder)
	replaying := false
	for i, v := range p[:2] {
		proxy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			var body bytes.Buffer
			_, _ = body.ReadFrom(r.Body)
			r.Body = http.NoBody
			var req struct {
				Op string `json:"op"`
			}
			_ = json.Unmarshal(body.Bytes(), &req)
			what := v.address.ID + req.Op
			if !replaying {
				again := httptest.NewRequest(r.Method, r.URL.Path, &body)
				again.Header = r.Header
				recorded[what] = httptest.NewRecorder()
				v.serve(recorded[what], again)
			}
			rec := recorded[what]
			for name, values := range rec.Header() {
				rw.Header()[name] = values
			}
			rw.WriteHeader(rec.Code)
			_, _ = rw.Write(rec.Body.Bytes())
		}))
		defer proxy.Close()
		target = strings.Replace(target, p[i].address.Address, proxy.Listener.Addr().String(), 1)
	}
	p[2].away.Store(true)
	q = newQuorum(t, target)
	epoch, err := q.Open(t.Context(), testDomain, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	replaying = true
	mu.Unlock()
	if err := q.Acquire(t.Context(), testDomain, epoch, "a"); !errors.Is(err, arbiter.ErrUnavailable) {
		t.Errorf("with answers played again: %v", err)
	}
}
