// SPDX-License-Identifier: Apache-2.0

package web

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func sample() Page {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	line := func(name string, values ...float64) Line {
		return Line{Name: name, Values: values, Every: time.Second, Format: func(v float64) string { return fmt.Sprintf("%g units", v) }}
	}
	return Page{Host: "hosta", Time: at, Pairs: []Pair{
		{
			ID: "d1", Domain: `web<script>alert("x")</script>`, State: "protected", Role: "primary", Peer: "hostb", Epoch: 3,
			Lag: line("Lag", 0, 4, 2), Log: line("Log"), Delay: line("Output delay", 0, 0),
			Events: []Event{{Time: at, Epoch: 3, State: "protected"}, {Time: at, Epoch: 2, State: "live", Reason: "backup-lost"}},
		},
		{ID: "d2", Domain: "mail", State: "live", Reason: "backup-lost", Role: "primary", Failure: "no & peer", Lag: line("Lag"), Log: line("Log"), Delay: line("Output delay")},
	}}
}

func get(t *testing.T, p Page, path string) (*http.Response, string) {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(func() Page { return p }).ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Result(), w.Body.String()
}

// element is a start tag with its attributes.
type element struct {
	name  string
	attrs map[string]string
}

// elements reads a page, which is well-formed, so that every browser takes it
// the same way.
func elements(t *testing.T, text string) []element {
	t.Helper()
	dec := xml.NewDecoder(strings.NewReader(text))
	dec.Entity = xml.HTMLEntity
	var all []element
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("not well-formed: %v\n%s", err, text)
		}
		if s, ok := token.(xml.StartElement); ok {
			e := element{s.Name.Local, map[string]string{}}
			for _, a := range s.Attr {
				e.attrs[a.Name.Local] = a.Value
			}
			all = append(all, e)
		}
	}
}

func TestPage(t *testing.T) {
	t.Parallel()
	r, text := get(t, sample(), "/")
	if r.StatusCode != http.StatusOK || !strings.Contains(r.Header.Get("Content-Security-Policy"), "default-src 'none'") {
		t.Errorf("%s, %v", r.Status, r.Header)
	}
	for _, want := range []string{"ftvirt on hosta", "backup-lost", "no &amp; peer", "2 units", "at most 4 units in the last 3 s", "web&lt;script&gt;"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	ids := map[string]bool{}
	var links, refers []string
	for _, e := range elements(t, text) {
		if id := e.attrs["id"]; id != "" {
			if ids[id] {
				t.Errorf("id %s is there twice", id)
			}
			ids[id] = true
		}
		if strings.HasPrefix(e.attrs["href"], "#") {
			links = append(links, e.attrs["href"][1:])
		}
		if by := e.attrs["aria-labelledby"]; by != "" {
			refers = append(refers, by)
		}
		// Who cannot see must be told, too.
		switch e.name {
		case "html":
			if e.attrs["lang"] == "" {
				t.Error("the page has no language")
			}
		case "svg":
			if e.attrs["role"] != "img" || e.attrs["aria-label"] == "" {
				t.Errorf("a drawing without words: %v", e.attrs)
			}
		case "th":
			if e.attrs["scope"] == "" {
				t.Errorf("a heading of nothing: %v", e.attrs)
			}
		case "script", "img", "iframe", "form":
			t.Errorf("the page has <%s>", e.name)
		}
	}
	for _, id := range append(links, refers...) {
		if !ids[id] {
			t.Errorf("nothing has the id %s", id)
		}
	}
	if len(links) != 2 {
		t.Errorf("links to pairs: %v", links)
	}
}

func TestRefresh(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]bool{"": false, "?refresh=5": true, "?refresh=0": false, "?refresh=x": false, "?refresh=99999": false} {
		_, text := get(t, Page{Host: "hosta"}, "/"+query)
		elements(t, text)
		if strings.Contains(text, `http-equiv="refresh"`) != want {
			t.Errorf("%q: %s", query, text)
		}
		if !strings.Contains(text, "No domain of this host") {
			t.Errorf("%q: it does not say that there is nothing", query)
		}
	}
}

func TestOthers(t *testing.T) {
	t.Parallel()
	if r, text := get(t, sample(), "/style.css"); r.StatusCode != http.StatusOK || !strings.Contains(r.Header.Get("Content-Type"), "css") || text == "" {
		t.Errorf("style: %s", r.Status)
	}
	if r, _ := get(t, sample(), "/page.html"); r.StatusCode != http.StatusNotFound {
		t.Errorf("another path: %s", r.Status)
	}
	w := httptest.NewRecorder()
	Handler(sample).ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/", nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", w.Code)
	}
}

func TestPoints(t *testing.T) {
	t.Parallel()
	for want, values := range map[string][]float64{
		"": nil, "0.0,59.0": {0}, "0.0,59.0 150.0,1.0 300.0,30.0": {0, 4, 2}, "0.0,59.0 300.0,59.0": {0, -1},
	} {
		if got := (Line{Values: values}).Points(); got != want {
			t.Errorf("%v: %q, want %q", values, got, want)
		}
	}
}

func TestSpan(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{0: "0 s", 59: "59 s", 60: "1 min", 282: "4 min 42 s", 300: "5 min"} {
		if got := (Line{Values: make([]float64, n), Every: time.Second}).Span(); got != want {
			t.Errorf("%d seconds: %q, want %q", n, got, want)
		}
	}
}
