// SPDX-License-Identifier: Apache-2.0

//go:build browser

// What follows needs Chromium, and so is no part of 'make test': make test-web.

package web

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"maps"
	"math"
	"mime"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

var picture = flag.String("picture", "", "write the page as a PNG to this `FILE`")

// browserTimeout bounds a whole test: a machine that has other work is slow.
const browserTimeout = 2 * time.Minute

// browser is a headless Chromium, spoken to by the DevTools protocol: JSON
// between NULs, by two pipes.
type browser struct {
	t       *testing.T
	in      *os.File
	answers chan message
	session string
	next    int
	// complaints are what the browser's console would show.
	complaints []string
}

type message struct {
	ID        int             `json:"id,omitempty"`
	SessionID string          `json:"sessionId,omitempty"`
	Method    string          `json:"method,omitempty"`
	Params    json.RawMessage `json:"params,omitempty"`
	Result    json.RawMessage `json:"result,omitempty"`
	Error     *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), browserTimeout)
	home := t.TempDir()
	cmd := exec.CommandContext(ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--user-data-dir="+home,
		"--remote-debugging-pipe", "about:blank")
	cmd.Env = append(os.Environ(), "HOME="+home, "TZ=UTC")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	theirIn, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{theirIn, theirOut}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v; 'make test-web' installs it", err)
	}
	_, _ = theirIn.Close(), theirOut.Close()
	b := &browser{t: t, in: in, answers: make(chan message, 1024)}
	go func() {
		defer close(b.answers)
		var rest []byte
		buf := make([]byte, 64<<10)
		for {
			n, err := out.Read(buf)
			rest = append(rest, buf[:n]...)
			for {
				one, more, ok := bytes.Cut(rest, []byte{0})
				if !ok {
					break
				}
				var m message
				if json.Unmarshal(one, &m) == nil {
					b.answers <- m
				}
				rest = more
			}
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = in.Close() // it ends when nobody is there to command it
		timer := time.AfterFunc(10*time.Second, cancel)
		for range b.answers {
		}
		_ = cmd.Wait()
		timer.Stop()
		cancel()
		_ = out.Close()
		if t.Failed() {
			t.Logf("the browser's errors:\n%s", &stderr)
		}
	})
	var target struct {
		TargetID string `json:"targetId"`
	}
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var session struct {
		SessionID string `json:"sessionId"`
	}
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &session)
	b.session = session.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network", "Accessibility"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// receive takes in the next message, and notes what it complains of.
func (b *browser) receive() message {
	b.t.Helper()
	m, ok := <-b.answers
	if !ok {
		b.t.Fatal("the browser ended, or was too slow")
	}
	switch m.Method {
	case "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed":
		b.complaints = append(b.complaints, m.Method+" "+string(m.Params))
	}
	return m
}

func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	b.next++
	if params == nil {
		params = struct{}{}
	}
	text, err := json.Marshal(map[string]any{"id": b.next, "method": method, "params": params, "sessionId": b.session})
	if b.session == "" {
		text, err = json.Marshal(map[string]any{"id": b.next, "method": method, "params": params})
	}
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.in.Write(append(text, 0)); err != nil {
		b.t.Fatal(err)
	}
	for {
		m := b.receive()
		if m.ID != b.next {
			continue
		}
		if m.Error != nil {
			b.t.Fatalf("%s: %s", method, m.Error.Message)
		}
		if result != nil {
			if err := json.Unmarshal(m.Result, result); err != nil {
				b.t.Fatalf("%s: %v: %s", method, err, m.Result)
			}
		}
		return
	}
}

// open shows the page in a window of this width, in light or dark colours.
func (b *browser) open(url string, width int, scheme string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": false}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": scheme}}}, nil)
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	for b.receive().Method != "Page.loadEventFired" {
	}
}

// evaluate gives what an expression is on the page.
func (b *browser) evaluate(expression string, value any) {
	b.t.Helper()
	var r struct {
		Result struct {
			Value json.RawMessage `json:"value"`
		} `json:"result"`
		ExceptionDetails json.RawMessage `json:"exceptionDetails"`
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &r)
	if r.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s", expression, r.ExceptionDetails)
	}
	if err := json.Unmarshal(r.Result.Value, value); err != nil {
		b.t.Fatalf("%s: %v: %s", expression, err, r.Result.Value)
	}
}

// three is a host with a pair that is well, one that has just failed over to it,
// and a domain that cannot get a backup.
func three() Page {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ms := func(v float64) string { return fmt.Sprintf("%.1f ms", v) }
	rate := func(v float64) string { return fmt.Sprintf("%.1f KiB/s", v/1024) }
	// curve is a figure that wavers as of a guest at work, the same each time.
	curve := func(name string, format func(float64) string, base, swing, phase float64) Line {
		l := Line{Name: name, Format: format, Every: time.Second}
		for i := range 300 {
			x := float64(i)
			l.Values = append(l.Values, base+swing*(math.Sin(x/9+phase)+0.6*math.Sin(x/2.3+phase)+0.4*math.Sin(x*1.7))/2)
		}
		return l
	}
	flat := func(name string, format func(float64) string) Line {
		return Line{Name: name, Format: format, Every: time.Second, Values: make([]float64, 300)}
	}
	// alone is a figure of a domain that has had no backup for 18 seconds.
	alone := func(l Line) Line {
		clear(l.Values[len(l.Values)-18:])
		return l
	}
	at := func(ago time.Duration, epoch uint64, state, reason string) Event {
		return Event{Time: now.Add(-ago), Epoch: epoch, State: state, Reason: reason}
	}
	return Page{Host: "hostb", Time: now, Pairs: []Pair{
		{
			ID: "domain-1", Domain: "web", State: "protected", Role: "primary", Peer: "hosta", Epoch: 12,
			Lag: curve("Lag", ms, 5, 4, 0), Log: curve("Log", rate, 180<<10, 120<<10, 2), Delay: curve("Output delay", ms, 1.4, 0.8, 3),
			Events: []Event{at(26*time.Hour, 12, "protected", ""), at(26*time.Hour+4*time.Second, 12, "cloning", "initialising")},
		},
		{
			ID: "domain-2", Domain: "mail", State: "cloning", Reason: "initialising", Clone: "disks 41 %", Role: "primary", Peer: "hostc", Epoch: 8,
			Lag: alone(curve("Lag", ms, 6, 3, 1)), Log: alone(curve("Log", rate, 60<<10, 50<<10, 1)),
			Delay: alone(curve("Output delay", ms, 1.1, 0.5, 5)),
			Events: []Event{
				at(3*time.Second, 8, "cloning", "initialising"), at(17720*time.Millisecond, 7, "live", "peer-agent-lost"),
				at(17890*time.Millisecond, 7, "going-live", "peer-agent-lost"), at(5*time.Hour, 7, "protected", ""),
			},
		},
		{
			ID: "domain-3", Domain: "database-of-the-second-floor", State: "unprotected", Reason: "clone-failed", Role: "primary", Peer: "hostc", Epoch: 3,
			Failure: "host hostc: /var/lib/libvirt/images has 12 GiB left, and the disks need 40 GiB",
			Lag:     flat("Lag", ms), Log: flat("Log", rate), Delay: flat("Output delay", ms),
			Events: []Event{
				at(2*time.Minute, 3, "unprotected", "clone-failed"), at(2*time.Minute+time.Second, 3, "cloning", "initialising"),
				at(9*time.Minute, 2, "live", "divergence"), at(9*time.Minute+90*time.Millisecond, 2, "going-live", "divergence"),
			},
		},
	}}
}

// dim finds text whose contrast with what is behind it is below 4.5 to 1, as the
// Web Content Accessibility Guidelines ask for (2.2, 1.4.3).
const dim = `(() => {
	const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
	const rgba = c => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = c; probe.fillRect(0, 0, 1, 1); return probe.getImageData(0, 0, 1, 1).data; };
	const light = c => { const [r, g, b] = [0, 1, 2].map(i => { const v = c[i] / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
	const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] == 255) return c; } return rgba('Canvas'); };
	const found = [];
	let seen = 0;
	for (const e of document.querySelectorAll('body, body *')) {
		if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
		seen++;
		const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))];
		const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
		if (contrast < 4.5) found.push(e.localName + ' ' + e.textContent.trim().slice(0, 40) + ': ' + contrast.toFixed(2));
	}
	if (seen < 50) found.push('only ' + seen + ' elements have text');
	return found;
})()`

// layout finds what does not fit.
const layout = `(() => {
	const found = [];
	const width = document.documentElement.clientWidth;
	if (document.documentElement.scrollWidth > width) found.push('the page is ' + document.documentElement.scrollWidth + ' wide in a window of ' + width);
	for (const l of document.querySelectorAll('polyline')) {
		const [line, box] = [l.getBoundingClientRect(), l.ownerSVGElement.getBoundingClientRect()];
		if (line.width < box.width / 2) found.push('a timeline is ' + line.width + ' wide in a drawing of ' + box.width);
		if (line.top < box.top - 1 || line.bottom > box.bottom + 1 || line.right > box.right + 1) found.push('a timeline leaves its drawing');
	}
	for (const a of document.querySelectorAll('a')) {
		if (a.getBoundingClientRect().height < 24) found.push('the link ' + a.textContent + ' is ' + a.getBoundingClientRect().height + ' high');
	}
	for (const e of document.querySelectorAll('td, th, figcaption')) {
		if (e.scrollWidth > e.clientWidth + 1) found.push('cut: ' + e.textContent.slice(0, 40));
	}
	return found;
})()`

func TestBrowser(t *testing.T) {
	p := three()
	server := httptest.NewServer(Handler(func() Page { return p }))
	defer server.Close()
	b := startBrowser(t)
	for _, width := range []int{1200, 768, 320} {
		for _, scheme := range []string{"light", "dark"} {
			b.open(server.URL, width, scheme)
			var faults []string
			b.evaluate(layout, &faults)
			for _, f := range faults {
				t.Errorf("%d pixels wide: %s", width, f)
			}
			b.evaluate(dim, &faults)
			for _, f := range faults {
				t.Errorf("hard to read in %s colours: %s", scheme, f)
			}
			var height float64
			b.evaluate("document.documentElement.scrollHeight", &height)
			if height < 700 || height > 5000 {
				t.Errorf("%d pixels wide, the page is %.0f high", width, height)
			}
		}
	}
	b.open(server.URL, 1000, "light")
	b.read(p)
	b.paint()
	b.open(server.URL+"/?refresh=1", 1000, "light")
	for b.receive().Method != "Page.loadEventFired" { // by itself
	}
	for _, c := range b.complaints {
		t.Errorf("the browser complains: %s", c)
	}
}

// standIn is as much of Cockpit's library as the package in contrib uses.
const standIn = `const cockpit = {
	file: path => ({ read: () => fetch("/file" + path).then(r => r.ok ? r.text() : null) }),
	http: where => ({
		get: path => fetch("/agent/" + where.address + "/" + where.port + path).then(r => r.ok ? r.text() : Promise.reject(new Error("not-found"))),
		close: () => {},
	}),
};`

// The package for Cockpit shows the same page, under the policy that Cockpit sets,
// and says what is missing when there is none.
func TestBrowserCockpit(t *testing.T) {
	p := three()
	var toml atomic.Value
	toml.Store("[metrics]\nlisten = \"127.0.0.1:7704\"\n\n[web]\n# Where.\nlisten = \":7703\"\n[peers.hostb]\n")
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ftvirt/{file}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", "default-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'self'; object-src 'none'; font-src 'self'; img-src 'self'; block-all-mixed-content")
		if r.PathValue("file") == "style.css" {
			http.ServeFileFS(w, r, files, "style.css")
			return
		}
		text, err := os.ReadFile(filepath.Join(cockpit, filepath.Base(r.PathValue("file"))))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", mime.TypeByExtension(filepath.Ext(r.PathValue("file"))))
		_, _ = w.Write(text)
	})
	mux.HandleFunc("GET /favicon.ico", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("GET /base1/cockpit.js", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/javascript")
		_, _ = io.WriteString(w, standIn)
	})
	mux.HandleFunc("GET /file/etc/ftvirt/ftvirt.toml", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, toml.Load().(string))
	})
	mux.Handle("GET /agent/127.0.0.1/7703/", http.StripPrefix("/agent/127.0.0.1/7703", Handler(func() Page { return p })))
	server := httptest.NewServer(mux)
	defer server.Close()
	b := startBrowser(t)
	b.open(server.URL+"/ftvirt/index.html", 1000, "light")
	b.until(`document.querySelectorAll('#page section').length == 3`)
	b.read(p)
	var text string
	b.evaluate(`document.querySelector("#page a[href='#domain-3']").click(), document.getElementById('notice').textContent + ' ' + location.hash + ' ' + (scrollY > 100)`, &text)
	if !strings.HasPrefix(text, "ftvirt on hostb, ") || !strings.HasSuffix(text, "  true") {
		t.Errorf("notice, address and whether the link led there: %q", text)
	}
	for _, c := range b.complaints {
		t.Errorf("the browser complains: %s", c)
	}
	for config, want := range map[string]string{
		"[web]\nlisten = \"\"\n":              "set listen in [web]",
		"[web]\nlisten = \"127.0.0.1:9\"\n":   "does not answer at 127.0.0.1:9",
		"[metrics]\nlisten = \"[::]:7703\"\n": "set listen in [web]",
	} {
		toml.Store(config)
		b.open(server.URL+"/ftvirt/index.html", 1000, "light")
		b.until(fmt.Sprintf(`document.getElementById('notice').textContent.includes(%q)`, want))
		b.evaluate(`document.getElementById('page').textContent`, &text)
		if text != "" {
			t.Errorf("%q: it shows what is not: %q", config, text)
		}
	}
}

// until polls for what a script is about to do.
func (b *browser) until(condition string) {
	b.t.Helper()
	limit := time.Now().Add(20 * time.Second)
	for {
		var met bool
		if b.evaluate(condition, &met); met {
			return
		}
		if time.Now().After(limit) {
			var text string
			b.evaluate("document.body.innerText", &text)
			b.t.Fatalf("not so in time: %s; the page: %s; %q", condition, text, b.complaints)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// read sees that what is on the page is what it is to tell, row by row, and that
// it is there for who listens to it, too.
func (b *browser) read(p Page) {
	b.t.Helper()
	var rows [][]string
	b.evaluate(`[...document.querySelectorAll('table')[0].tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText))`, &rows)
	if len(rows) != len(p.Pairs) {
		b.t.Fatalf("rows: %q", rows)
	}
	for i, pair := range p.Pairs {
		row := strings.Join(rows[i], "|")
		for _, want := range []string{pair.Domain, pair.State, pair.Reason, pair.Clone, pair.Peer, fmt.Sprint(pair.Epoch), pair.Lag.Now(), pair.Log.Now(), pair.Delay.Now()} {
			if !strings.Contains(row, want) {
				b.t.Errorf("row %d lacks %q: %s", i, want, row)
			}
		}
		var text string
		b.evaluate(fmt.Sprintf("document.getElementById(%q).innerText", pair.ID), &text)
		for _, want := range []string{pair.Domain, pair.Failure, pair.Lag.Top(), pair.Delay.Top()} {
			if !strings.Contains(text, want) {
				b.t.Errorf("the part of %s lacks %q", pair.Domain, want)
			}
		}
		for _, e := range pair.Events {
			if !strings.Contains(text, e.Time.Format("15:04:05.000")) || !strings.Contains(text, e.State) || !strings.Contains(text, e.Reason) {
				b.t.Errorf("the part of %s lacks %+v", pair.Domain, e)
			}
		}
	}
	var tree struct {
		Nodes []struct {
			Ignored bool                            `json:"ignored"`
			Role    struct{ Value string }          `json:"role"`
			Name    struct{ Value json.RawMessage } `json:"name"`
		} `json:"nodes"`
	}
	b.call("Accessibility.getFullAXTree", nil, &tree)
	named := map[string]int{}
	for _, n := range tree.Nodes {
		if n.Ignored {
			continue
		}
		switch role := n.Role.Value; role {
		case "table", "image", "link", "group", "heading", "region", "columnheader", "rowheader":
			if name := string(n.Name.Value); name == "" || name == `""` {
				b.t.Errorf("a %s has no name", role)
			}
			named[role]++
		case "main", "banner":
			named[role]++
		}
	}
	n := len(p.Pairs)
	for role, want := range map[string]int{"main": 1, "banner": 1, "table": 1 + n, "image": 3 * n, "region": n, "rowheader": n, "heading": 2 + n} {
		if named[role] < want {
			b.t.Errorf("there are %d of %s for who listens, not %d", named[role], role, want)
		}
	}
}

// paint writes the picture that the documents show.
func (b *browser) paint() {
	b.t.Helper()
	var shot struct {
		Data string `json:"data"`
	}
	b.call("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": true}, &shot)
	data, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	whole, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		b.t.Fatal(err)
	}
	count := map[color.Color]int{}
	box := whole.Bounds()
	for y := range box.Dy() {
		for x := range box.Dx() {
			count[whole.At(x, y)]++
		}
	}
	if len(count) < 16 || box.Dy() < 700 {
		b.t.Errorf("a picture of %v with %d colours", box, len(count))
	}
	if *picture == "" {
		return
	}
	// The commonest 256 colours are enough, and make the file small.
	colours := slices.Collect(maps.Keys(count))
	slices.SortFunc(colours, func(a, b color.Color) int {
		return cmp.Or(cmp.Compare(count[b], count[a]), cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)))
	})
	small := image.NewPaletted(box, colours[:min(len(colours), 256)])
	draw.Draw(small, box, whole, image.Point{}, draw.Src)
	var file bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&file, small); err != nil {
		b.t.Fatal(err)
	}
	if file.Len() > 150<<10 {
		b.t.Errorf("a picture of %d bytes is too large for the repository", file.Len())
	}
	if err := os.WriteFile(*picture, file.Bytes(), 0o644); err != nil {
		b.t.Error(err)
	}
}
