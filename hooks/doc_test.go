// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const devicesHead = `# What a protected domain may have

Made from the table in [devices.go](devices.go) by ` + "`go test ./hooks -run TestDevicesDocument -update`" + `.

- **supported**: as it is.
- **adapted**: ` + "`ftvirt enable`" + ` on a domain that is off changes its definition as told.
- **taken out**: the same; what the operator wrote is noted in the metadata, and ` + "`ftvirt disable`" + ` on a domain that is off gives it back.
- **supported if**: the condition is the operator's to keep.
- **refused**: ` + "`ftvirt check`" + ` tells, with the place and what to do.

` + "`ftvirt check`" + ` and ` + "`ftvirt xml DOMAIN --diff`" + ` tell what applies to a domain. A running domain is never changed: a device that is
added to it and would be taken out is refused. The tests named last run guests with the device, but for TestReal, which compares
definitions as virt-install writes them with what becomes of them.

| device or setting | | why | what is done, or to do | code | shown by |
| --- | --- | --- | --- | --- | --- |
`

// DEVICES.md is what the code says.
func TestDevicesDocument(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	b.WriteString(devicesHead)
	cell := strings.NewReplacer("|", `\|`, "<", "`<", ">", ">`", "\n", " ")
	for _, r := range Rules() {
		proof := r.Proof()
		if proof == "" {
			proof = "refused"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", cell.Replace(r.Subject), r.Support, cell.Replace(r.Reason), cell.Replace(r.Remedy), r.Code, proof)
	}
	if *update {
		if err := os.WriteFile("DEVICES.md", b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile("DEVICES.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Error("DEVICES.md is not what the table says; write it with go test ./hooks -run TestDevicesDocument -update")
	}
}

// A row that names a test must name one that there is.
func TestProofsExist(t *testing.T) {
	t.Parallel()
	var text strings.Builder
	for _, pattern := range []string{"*_test.go", "../plugin/e2e/*_test.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			source, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			text.Write(source)
		}
	}
	codes := map[string]bool{}
	for _, r := range Rules() {
		codes[r.Code] = true
	}
	for code, proof := range proofs {
		name, part, _ := strings.Cut(proof, "/")
		found := regexp.MustCompile(`(?m)^func ` + name + `\(t \*testing\.T\)`).MatchString(text.String())
		if part != "" {
			found = found && strings.Contains(text.String(), `"`+part+`"`)
		}
		if !found || !codes[code] {
			t.Errorf("%s: there is no such row, or no test %s", code, proof)
		}
	}
}
