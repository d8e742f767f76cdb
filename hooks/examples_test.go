// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"os"
	"path/filepath"
	"testing"
)

// The examples for operators can be protected as they are, and 'ftvirt enable'
// takes nothing from their guests.
func TestExamples(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../contrib/examples/*.xml")
	if err != nil || len(files) < 3 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	seen := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		validate(t, string(text))
		dom, err := Parse(text)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if other := seen[dom.UUID]; other != "" {
			t.Errorf("%s has the UUID of %s", file, other)
		}
		seen[dom.UUID] = file
		a, ok, err := ReadAnnotation(dom)
		if err != nil || !ok || a.Mode != ModeProtected || a.Peer != "hostb" {
			t.Errorf("%s: annotation %+v, %v, %v", file, a, ok, err)
		}
		for _, p := range Check(dom, CheckOptions{Host: "hosta", Peers: []string{"hosta", "hostb"}}) {
			t.Errorf("%s is refused: %s", file, p)
		}
		for _, p := range Changes(dom) {
			t.Errorf("%s is changed for the guest: %s", file, p)
		}
		if _, err := Transform(dom, options); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}
