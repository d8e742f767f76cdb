// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin/virt"
)

// EnableRequest is the body of POST /v1/enable and /v1/disable.
type EnableRequest struct {
	Domain string `json:"domain"`
	Peer   string `json:"peer,omitempty"`
}

// ErrorReply is the body of every answer that is not 200.
type ErrorReply struct {
	Error    string          `json:"error"`
	Problems []hooks.Problem `json:"problems,omitempty"`
}

// listenAdmin makes the socket of the command line: only root gets through.
func (a *Agent) listenAdmin() (net.Listener, error) {
	path := a.cfg.Agent.AdminSocket
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return l, nil
}

func (a *Agent) serveAdmin(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { reply(w, a.Status(), nil) })
	mux.HandleFunc("GET /v1/status/{domain}", func(w http.ResponseWriter, r *http.Request) {
		s, err := a.StatusOf(r.Context(), r.PathValue("domain"))
		reply(w, s, err)
	})
	mux.HandleFunc("GET /v1/check/{domain}", func(w http.ResponseWriter, r *http.Request) {
		p, err := a.Check(r.Context(), r.PathValue("domain"), r.URL.Query().Get("peer"))
		reply(w, p, err)
	})
	mux.HandleFunc("GET /v1/doctor", func(w http.ResponseWriter, r *http.Request) {
		f, err := a.Doctor(r.Context(), r.URL.Query().Get("peer"))
		reply(w, f, err)
	})
	mux.HandleFunc("POST /v1/enable", post(func(ctx context.Context, r EnableRequest) error { return a.Enable(ctx, r.Domain, r.Peer) }))
	mux.HandleFunc("POST /v1/disable", post(func(ctx context.Context, r EnableRequest) error { return a.Disable(ctx, r.Domain) }))
	for path, f := range map[string]func(context.Context, string) error{
		"failover": a.Failover, "suspend": a.Suspend, "resume": a.Resume,
	} {
		mux.HandleFunc("POST /v1/"+path, post(func(ctx context.Context, r EnableRequest) error { return f(ctx, r.Domain) }))
	}
	mux.HandleFunc("POST /v1/restart-backup", post(func(ctx context.Context, r EnableRequest) error { return a.RestartBackup(ctx, r.Domain, r.Peer) }))
	mux.HandleFunc("GET /v1/verify/{domain}", func(w http.ResponseWriter, r *http.Request) {
		p, err := a.Plan(r.Context(), r.PathValue("domain"))
		reply(w, p, err)
	})
	mux.HandleFunc("POST /v1/verify", a.serveVerify)
	mux.HandleFunc("POST /v1/handover", a.serveHandover)
	mux.HandleFunc("GET /v1/diagnosis/{domain}", a.serveDiagnosis)
	mux.HandleFunc("GET /v1/events", a.serveEvents)
	mux.Handle("GET /metrics", a.metrics())
	a.adminDefinitions(mux)
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("admin socket: %w", err)
	}
	return nil
}

func post(f func(context.Context, EnableRequest) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req EnableRequest
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&req); err != nil {
			reply(w, nil, fmt.Errorf("request: %w", err))
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
		defer cancel()
		reply(w, struct{}{}, f(ctx, req))
	}
}

func (a *Agent) serveVerify(w http.ResponseWriter, r *http.Request) {
	var req VerifyRequest
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		reply(w, nil, fmt.Errorf("request: %w", err))
		return
	}
	v, err := a.Verify(r.Context(), req)
	reply(w, v, err)
}

func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		var notReady *hooks.NotReadyError
		e := ErrorReply{Error: err.Error()}
		if errors.As(err, &notReady) {
			e.Problems = notReady.Problems
		}
		code := http.StatusConflict
		if errors.Is(err, virt.ErrNoDomain) {
			code = http.StatusNotFound
		}
		w.WriteHeader(code)
		v = e
	}
	_ = json.NewEncoder(w).Encode(v) // the client hung up, else
}

// serveEvents writes the kept events, one JSON object a line, and with
// ?follow=1 those to come.
func (a *Agent) serveEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	follow := r.URL.Query().Get("follow") != ""
	if !follow {
		cancel()
	}
	_ = a.events.follow(ctx, func(entries []Entry) error {
		for _, e := range entries {
			if err := enc.Encode(e); err != nil {
				return err
			}
		}
		return http.NewResponseController(w).Flush()
	})
}
