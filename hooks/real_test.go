// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirtxml"
)

// realDomains are definitions as tools write them; see testdata/real.
func realDomains(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/real/*.xml")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		if name := strings.TrimSuffix(filepath.Base(f), ".xml"); !strings.HasSuffix(name, ".ft") {
			names = append(names, name)
		}
	}
	if len(names) < 12 {
		t.Fatalf("definitions: %v", names)
	}
	return names
}

// What 'ftvirt check' says of real definitions, and what they become.
func TestReal(t *testing.T) {
	t.Parallel()
	for _, name := range realDomains(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := read(t, "real/"+name+".xml")
			validate(t, marshal(t, in))
			problems := Check(in, CheckOptions{Peer: "hostb"})
			var b strings.Builder
			for _, p := range problems {
				fmt.Fprintf(&b, "refused %s: %s\n", p.Code, p)
			}
			for _, p := range Changes(in) {
				fmt.Fprintf(&b, "changed %s: %s\n", p.Code, p)
			}
			if b.Len() == 0 {
				t.Error("nothing to tell of a definition as tools write it")
			}
			path := filepath.Join("testdata/real", name+".check")
			if *update {
				if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("%s differs; got:\n%s", path, &b)
			}
			out, err := Transform(in, options)
			if (err == nil) != (len(problems) == 0) {
				t.Fatalf("Check found %d problems, Transform says: %v", len(problems), err)
			}
			if err != nil {
				return
			}
			golden(t, "real/"+name+".ft.xml", out)
			if left := Changes(out); len(left) > 0 {
				t.Errorf("left after the transformation: %v", left)
			}
			plain, err := Plain(out)
			if err != nil {
				t.Fatal(err)
			}
			if got := marshal(t, plain); got != marshal(t, in) {
				t.Errorf("Plain does not give the operator's domain back:\n%s", got)
			}
		})
	}
}

// libvirt takes the transformed definitions as they are: what it makes of them
// needs no further change, and gives the operator's definition back.
func TestRealIsDefined(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	dir := t.TempDir()
	originals := map[string]*libvirtxml.Domain{}
	var commands []string
	for _, name := range realDomains(t) {
		in := read(t, "real/"+name+".xml")
		out, err := Transform(in, options)
		if err != nil {
			continue
		}
		originals[in.Name] = in
		file := filepath.Join(dir, name+".xml")
		if err := os.WriteFile(file, []byte(marshal(t, out)), 0o600); err != nil {
			t.Fatal(err)
		}
		commands = append(commands, "define "+file+" --validate", "dumpxml --inactive "+in.Name)
	}
	output := embedded(ctx, t, commands...)
	texts := regexp.MustCompile(`(?s)<domain .*?</domain>`).FindAllString(output, -1)
	if len(texts) != len(originals) || len(texts) < 5 {
		t.Fatalf("%d of %d definitions are back", len(texts), len(originals))
	}
	for _, text := range texts {
		defined, err := Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		again, err := Transform(defined, options)
		if err != nil {
			t.Errorf("%s: %v", defined.Name, err)
			continue
		}
		if changed := guestChanges(defined, again); changed != "" {
			t.Errorf("%s: as libvirt has it: %s", defined.Name, changed)
		}
		plain, err := Plain(defined)
		if err != nil {
			t.Fatal(err)
		}
		was := originals[defined.Name]
		for kind, n := range map[string][2]int{
			"channels": {len(was.Devices.Channels), len(plain.Devices.Channels)}, "inputs": {len(was.Devices.Inputs), len(plain.Devices.Inputs)},
			"controllers": {len(was.Devices.Controllers), len(plain.Devices.Controllers)}, "rngs": {len(was.Devices.RNGs), len(plain.Devices.RNGs)},
			"disks": {len(was.Devices.Disks), len(plain.Devices.Disks)}, "redirdevs": {len(was.Devices.RedirDevs), len(plain.Devices.RedirDevs)},
		} {
			// libvirt adds some of its own to what it did not write.
			if n[1] < n[0] {
				t.Errorf("%s: %d %s of %d are back", defined.Name, n[1], kind, n[0])
			}
		}
		for i, v := range plain.Devices.Videos {
			if v.Model.Type != was.Devices.Videos[i].Model.Type {
				t.Errorf("%s: video %s is back as %s", defined.Name, was.Devices.Videos[i].Model.Type, v.Model.Type)
			}
		}
	}
}
