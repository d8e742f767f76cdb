// SPDX-License-Identifier: Apache-2.0

package web

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const cockpit = "../../contrib/cockpit"

// Cockpit ignores a package whose manifest it does not understand.
func TestCockpitManifest(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(cockpit, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var m struct {
		Version    int                 `json:"version"`
		Requires   map[string]string   `json:"requires"`
		Conditions []map[string]string `json:"conditions"`
		Menu       map[string]struct {
			Label    string `json:"label"`
			Order    int    `json:"order"`
			Keywords []struct {
				Matches []string `json:"matches"`
			} `json:"keywords"`
		} `json:"menu"`
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		t.Fatal(err)
	}
	if len(m.Menu) == 0 || m.Requires["cockpit"] == "" || len(m.Conditions) != 1 || m.Conditions[0]["path-exists"] != "/etc/ftvirt/ftvirt.toml" {
		t.Errorf("manifest: %+v", m)
	}
	for name, item := range m.Menu {
		// The entry NAME shows NAME.html.
		page, err := os.ReadFile(filepath.Join(cockpit, name+".html"))
		if err != nil || item.Label == "" || item.Order <= 0 {
			t.Errorf("menu entry %s: %+v, %v", name, item, err)
		}
		for _, e := range elements(t, string(page)) {
			for _, link := range []string{e.attrs["src"], e.attrs["href"]} {
				switch {
				case link == "", link == "../base1/cockpit.js": // Cockpit's own
				case link == "style.css": // that of the page, put there at the installation
				case strings.Contains(link, "/"):
					t.Errorf("%s.html takes %s from elsewhere", name, link)
				default:
					if _, err := os.Stat(filepath.Join(cockpit, link)); err != nil {
						t.Error(err)
					}
				}
			}
		}
	}
}
