// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin"
	"libvirt.org/go/libvirtxml"
)

const declared = ` xmlns:ft="urn:ftvirt:domain:1"`

func withMetadata(raw string) *libvirtxml.Domain {
	return &libvirtxml.Domain{Metadata: &libvirtxml.DomainMetadata{XML: raw}}
}

// validAnnotations are understood, and have the schema on their side unless
// their attributes are in the namespace, which libvirt does not write.
var validAnnotations = map[string]struct {
	raw  string
	want Annotation
}{
	"as documented":     {`<ft:pair` + declared + ` mode="protected" peer="hostb"/>`, Annotation{ModeProtected, "hostb", plugin.RoleNone, 0}},
	"default namespace": {`<pair xmlns="urn:ftvirt:domain:1" mode='protected' peer='b.example.org'></pair>`, Annotation{ModeProtected, "b.example.org", plugin.RoleNone, 0}},
	"other prefix":      {`<a/><x:pair xmlns:x="urn:ftvirt:domain:1" x:mode="protected"/>`, Annotation{ModeProtected, "", plugin.RoleNone, 0}},
	"suspended":         {`<ft:pair` + declared + ` mode="suspended" peer="hostb"/>`, Annotation{ModeSuspended, "hostb", plugin.RoleNone, 0}},
	"backup":            {`<ft:pair` + declared + ` mode="protected" peer="a" role="backup" epoch="18446744073709551615"/>`, Annotation{ModeProtected, "a", plugin.RoleBackup, 1<<64 - 1}},
}

func TestReadAnnotation(t *testing.T) {
	t.Parallel()
	for name, tc := range validAnnotations {
		a, ok, err := ReadAnnotation(withMetadata(tc.raw))
		if err != nil || !ok || a != tc.want {
			t.Errorf("%s: got %+v, %v, %v", name, a, ok, err)
		}
	}
	for name, dom := range map[string]*libvirtxml.Domain{
		"no metadata":  {},
		"others' only": withMetadata(`<o:x xmlns:o="urn:o"><pair/></o:x><pair mode="protected"/>`),
		"nested":       withMetadata(`<o:x xmlns:o="urn:o"><ft:pair` + declared + ` mode="protected"/></o:x>`),
	} {
		if a, ok, err := ReadAnnotation(dom); ok || err != nil {
			t.Errorf("%s: got %+v, %v, %v", name, a, ok, err)
		}
	}
}

// invalidAnnotations are refused, for the attribute.
var invalidAnnotations = map[string]string{
	`<ft:pair` + declared + ` mode="protectd"/>`:                                             "mode",
	`<ft:pair` + declared + ` peer="b"/>`:                                                    "mode",
	`<ft:pair` + declared + ` mode="protected" pear="b"/>`:                                   "pear",
	`<ft:pair` + declared + ` mode="protected" peer="a b"/>`:                                 "peer",
	`<ft:pair` + declared + ` mode="protected" peer=""/>`:                                    "peer",
	`<ft:pair` + declared + ` mode="protected" peer="` + strings.Repeat("b", 65) + `"/>`:     "peer",
	`<ft:pair` + declared + ` mode="protected" role="primary"/>`:                             "role",
	`<ft:pair` + declared + ` mode="protected" role="backup"/>`:                              "epoch",
	`<ft:pair` + declared + ` mode="protected" epoch="3"/>`:                                  "epoch",
	`<ft:pair` + declared + ` mode="protected" role="backup" epoch="0"/>`:                    "epoch",
	`<ft:pair` + declared + ` mode="protected" role="backup" epoch="-1"/>`:                   "epoch",
	`<ft:pair` + declared + ` mode="protected" mode="protected"/>`:                           "mode",
	`<ft:pair` + declared + ` mode="protected">text</ft:pair>`:                               "",
	`<ft:pair` + declared + ` mode="protected"><ft:x/></ft:pair>`:                            "",
	`<ft:par` + declared + ` mode="protected"/>`:                                             "",
	`<ft:pair mode="protected"/>`:                                                            "",
	`<ft:pair` + declared + ` mode="protected"/><ft:pair` + declared + ` mode="protected"/>`: "",
}

func TestReadAnnotationIsStrict(t *testing.T) {
	t.Parallel()
	for raw, attribute := range invalidAnnotations {
		_, _, err := ReadAnnotation(withMetadata(raw))
		var e *AnnotationError
		if !errors.As(err, &e) || !errors.Is(err, ErrAnnotation) || e.Attribute != attribute {
			t.Errorf("%s: got %v", raw, err)
		}
	}
	for _, raw := range []string{"<a", "<a></b>", "<a>&nope;</a>", strings.Repeat(" ", maxMetadata+1)} {
		if _, _, err := ReadAnnotation(withMetadata(raw)); !errors.Is(err, ErrMetadata) {
			t.Errorf("%.20q: got %v", raw, err)
		}
	}
}

// The schema for editors and others' tools says what the parser does.
func TestAnnotationSchema(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	valid := func(name, raw string) bool {
		t.Helper()
		file := filepath.Join(dir, name+".xml")
		if err := os.WriteFile(file, []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "xmllint", "--noout", "--relaxng", "annotation.rng", file).CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatalf("%v; run make deps", err)
		}
		if err != nil && !strings.Contains(string(out), "fails to validate") && !strings.Contains(string(out), "parser error") {
			t.Fatalf("%s: %v: %s", raw, err, out)
		}
		return err == nil
	}
	for name, tc := range validAnnotations {
		if name != "other prefix" && !valid(name, tc.raw) {
			t.Errorf("%s is not valid", tc.raw)
		}
	}
	for raw := range invalidAnnotations {
		if valid("invalid", raw) {
			t.Errorf("%s is valid", raw)
		}
	}
	written := Annotation{ModeProtected, "hostb", plugin.RoleBackup, 9}
	if !valid("written", written.String()) {
		t.Errorf("%s is not valid", written)
	}
}

func TestAnnotationKeepsOtherMetadata(t *testing.T) {
	t.Parallel()
	others := "\n    <o:a xmlns:o=\"urn:o\"  x='1'><![CDATA[<pair/>]]>&#x41;</o:a>\n    <!-- note --><p:b xmlns:p='urn:p'/>\n  "
	dom := withMetadata(others)
	want := Annotation{ModeProtected, "hostb", plugin.RoleNone, 0}
	if err := WriteAnnotation(dom, want); err != nil {
		t.Fatal(err)
	}
	if a, ok, err := ReadAnnotation(dom); a != want || !ok || err != nil {
		t.Fatalf("got %+v, %v, %v", a, ok, err)
	}
	if got := strings.Replace(dom.Metadata.XML, "\n    "+want.String(), "", 1); got != others {
		t.Errorf("others' metadata changed: %q", got)
	}
	want.Role, want.Epoch = plugin.RoleBackup, 9
	if err := WriteAnnotation(dom, want); err != nil {
		t.Fatal(err)
	}
	if strings.Count(dom.Metadata.XML, Namespace) != 1 {
		t.Errorf("not replaced: %s", dom.Metadata.XML)
	}
	if err := RemoveAnnotation(dom); err != nil {
		t.Fatal(err)
	}
	if dom.Metadata.XML != others {
		t.Errorf("others' metadata changed: %q", dom.Metadata.XML)
	}

	alone := &libvirtxml.Domain{}
	if err := WriteAnnotation(alone, want); err != nil {
		t.Fatal(err)
	}
	if err := RemoveAnnotation(alone); err != nil || alone.Metadata != nil {
		t.Errorf("left %+v, %v", alone.Metadata, err)
	}
}

func TestWriteAnnotationRefuses(t *testing.T) {
	t.Parallel()
	for _, a := range []Annotation{
		{}, {Mode: "x"}, {Mode: ModeProtected, Peer: "a b"}, {Mode: ModeProtected, Role: plugin.RolePrimary},
		{Mode: ModeProtected, Epoch: 3}, {Mode: ModeProtected, Role: plugin.RoleBackup},
	} {
		dom := &libvirtxml.Domain{}
		if err := WriteAnnotation(dom, a); !errors.Is(err, ErrAnnotation) || dom.Metadata != nil {
			t.Errorf("%+v: %v", a, err)
		}
	}
}

// Whatever the metadata is, reading does not fail otherwise than by an error,
// and writing keeps what was there.
func FuzzMetadata(f *testing.F) {
	f.Add(`<a/><ft:pair` + declared + ` mode="protected" peer="hostb"/>`)
	f.Add(`<ft:pair mode="protected"/>`)
	f.Add("<o:a xmlns:o=\"urn:o\"><![CDATA[<pair/>]]></o:a> text <!-- x -->")
	f.Add(`<fto:original xmlns:fto="urn:ftvirt:original:1">AAAA</fto:original>`)
	f.Fuzz(func(t *testing.T, raw string) {
		dom := withMetadata(raw)
		before, had, err := ReadAnnotation(dom)
		if err != nil {
			return
		}
		want := Annotation{ModeProtected, "hostb", plugin.RoleBackup, 7}
		if err := WriteAnnotation(dom, want); err != nil {
			t.Fatalf("%q: %v", raw, err)
		}
		if got, ok, err := ReadAnnotation(dom); got != want || !ok || err != nil {
			t.Fatalf("%q: read back %+v, %v, %v", raw, got, ok, err)
		}
		if had {
			if err := WriteAnnotation(dom, before); err != nil {
				t.Fatal(err)
			}
			return
		}
		if err := RemoveAnnotation(dom); err != nil {
			t.Fatal(err)
		}
		left := ""
		if dom.Metadata != nil {
			left = dom.Metadata.XML
		}
		if strings.TrimSpace(left) != strings.TrimSpace(raw) {
			t.Fatalf("%q became %q", raw, left)
		}
		if _, err := readOriginal(dom); err != nil && !errors.Is(err, ErrOriginal) && !errors.Is(err, ErrMetadata) {
			t.Fatal(err)
		}
	})
}
