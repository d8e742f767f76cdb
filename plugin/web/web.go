// SPDX-License-Identifier: Apache-2.0

// Package web is the page on which an agent shows its pairs. It can be read
// only, has no script, and takes nothing from elsewhere.
package web

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"net/http"
	"strconv"
	"strings"
	"time"
)

//go:embed page.html style.css
var files embed.FS

var page = template.Must(template.ParseFS(files, "page.html"))

// Page is what is shown.
type Page struct {
	Host  string
	Time  time.Time
	Pairs []Pair
	// Refresh is after how many seconds the browser asks again, 0 for never.
	Refresh int
}

// Pair is one domain as this host sees it.
type Pair struct {
	ID, Domain, State, Reason, Role, Peer, Clone, Failure string
	Epoch                                                 uint64
	Lag, Log, Delay                                       Line
	Events                                                []Event
}

// Lines are the timelines of a pair.
func (p Pair) Lines() []Line { return []Line{p.Lag, p.Log, p.Delay} }

// Event is a change of a pair's state.
type Event struct {
	Time          time.Time
	Epoch         uint64
	State, Reason string
}

// Line is a figure over time, of which the newest value is the last.
type Line struct {
	Name   string
	Values []float64
	// Format shows a value; Every is the time between two.
	Format func(float64) string
	Every  time.Duration
}

// Now is the newest value.
func (l Line) Now() string {
	if len(l.Values) == 0 {
		return "–"
	}
	return l.Format(l.Values[len(l.Values)-1])
}

func (l Line) top() float64 {
	top := 0.0
	for _, v := range l.Values {
		top = max(top, v)
	}
	return top
}

// Top is the largest value.
func (l Line) Top() string {
	if len(l.Values) == 0 {
		return "–"
	}
	return l.Format(l.top())
}

// Span is the time that the values are of, in words.
func (l Line) Span() string {
	span := time.Duration(len(l.Values)) * l.Every
	minutes, seconds := int(span.Minutes()), int(span.Seconds())%60
	switch {
	case minutes == 0:
		return fmt.Sprintf("%d s", seconds)
	case seconds == 0:
		return fmt.Sprintf("%d min", minutes)
	}
	return fmt.Sprintf("%d min %d s", minutes, seconds)
}

// The size of a drawing, as page.html has it.
const (
	width  = 300
	height = 60
)

// Points draws the values for an SVG polyline.
func (l Line) Points() string {
	top := l.top()
	var b strings.Builder
	for i, v := range l.Values {
		y := float64(height - 1)
		if top > 0 {
			y -= max(v, 0) / top * (height - 2)
		}
		x := 0.0
		if len(l.Values) > 1 {
			x = float64(i) * width / float64(len(l.Values)-1)
		}
		fmt.Fprintf(&b, "%.1f,%.1f ", x, y)
	}
	return strings.TrimSpace(b.String())
}

// Handler serves the page that source gives.
func Handler(source func() Page) http.Handler {
	mux := http.NewServeMux()
	guard := func(w http.ResponseWriter) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
	}
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		p := source()
		if n, err := strconv.Atoi(r.URL.Query().Get("refresh")); err == nil && n >= 1 && n <= 3600 {
			p.Refresh = n
		}
		var b bytes.Buffer
		if err := page.Execute(&b, p); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		guard(w)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		_, _ = w.Write(b.Bytes()) // the client hung up, else
	})
	mux.HandleFunc("GET /style.css", func(w http.ResponseWriter, r *http.Request) {
		guard(w)
		http.ServeFileFS(w, r, files, "style.css")
	})
	return mux
}
