// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// FuzzFilter gives whole descriptions of domains to all that reads them: the
// hook's filter, the check and the transformation. What comes out is read again,
// and nothing is left to do to it.
func FuzzFilter(f *testing.F) {
	files, err := filepath.Glob("testdata/*.xml")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(`<domain type='qemu'><name>$(id);` + "`id`" + `'"&lt;x&gt;</name><memory>1</memory><os><type arch='x86_64' machine='pc-q35-9.1'>hvm</type></os></domain>`))
	f.Add([]byte(`<domain`))
	o := Options{PluginFile: "/usr/lib/ftvirt/ftvirt.so", PluginSocket: "/run/ftvirt/plugin.sock", ICountShift: 3}
	f.Fuzz(func(t *testing.T, text []byte) {
		_, _ = RestoreFilter(text, o)
		_, _ = MigrateFilter(text, o)
		dom, err := Parse(text)
		if err != nil {
			return
		}
		_ = Check(dom, CheckOptions{Host: "hosta", Peer: "hostb", Peers: []string{"hostb"}})
		out, err := Transform(dom, o)
		if err != nil {
			return
		}
		if out.Name != dom.Name || out.UUID != dom.UUID {
			t.Fatalf("%q %s became %q %s", dom.Name, dom.UUID, out.Name, out.UUID)
		}
		written, err := out.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse([]byte(written))
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if twice, err := Transform(again, o); err != nil && !errors.Is(err, ErrNotReady) {
			t.Fatalf("what was made ready cannot be made ready: %v", err)
		} else if err == nil {
			if text, err := twice.Marshal(); err != nil || text != written {
				t.Fatalf("made ready twice:\n%s\nonce:\n%s\n%v", text, written, err)
			}
		}
	})
}
