// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

func TestVirshHasOurCommands(t *testing.T) {
	t.Parallel()
	f := serve(t, map[string]any{"GET /v1/status/web": client.Status{Domain: "web", State: "protected"}, "GET /v1/status": []client.Status{}})
	plain := run(t, "", "status", "web", "--socket", f.socket)
	if plain.code != exitOK || !strings.Contains(plain.out, "protected") {
		t.Fatalf("got %+v", plain)
	}
	for _, args := range [][]string{
		{"virsh", "ft-status", "web", "--socket", f.socket}, {"virsh", "-q", "-d", "0", "--log=/dev/null", "ft-status", "--socket", f.socket, "web"},
	} {
		if r := run(t, "", args...); r != plain {
			t.Errorf("%v: got %+v, want %+v", args, r, plain)
		}
	}
	r := run(t, "", "virsh", "ft-help")
	for _, name := range []string{"ft-enable", "ft-disable", "ft-status", "ft-failover", "ft-check", "ft-xml", "ft-migrate-backup"} {
		if r.code != exitOK || !strings.Contains(r.out, name) {
			t.Errorf("%s is not in %+v", name, r)
		}
	}
	if strings.Contains(r.out, "ft-agent") || strings.Contains(r.out, "ft-lab") {
		t.Errorf("got %s", r.out)
	}
	for _, args := range [][]string{
		{"virsh", "ft-nothing"}, {"virsh", "ft-agent"}, {"virsh", "-c", "qemu+ssh://b/system", "ft-status"}, {"virsh", "--connect=qemu:///system", "ft-status"},
		{"virsh", "ft-status", "a", "b"},
	} {
		if r := run(t, "", args...); r.code != exitUsage || r.errors == "" {
			t.Errorf("%v: got %+v", args, r)
		}
	}
}

// asProgram makes the test's binary behave as ftvirt.
const asProgram = "FTVIRT_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(Run(context.Background(), App(), os.Args))
	}
	os.Exit(m.Run())
}

// All else is virsh's, which takes the place of the program: its terminal, its
// exit code and its arguments as they are.
func TestVirshIsExecuted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	script := "#!/bin/sh\nprintf '<%s>' \"$@\"; echo; cat; exit 7\n"
	if err := os.WriteFile(filepath.Join(dir, "virsh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"list", "--all"}, {"-c", "qemu:///system", "start", "web"}, {}, {"--help"}, {"dumpxml", "web", "--inactive"},
		{"list; ft-status"}, {"-r", "domstate", "ft-web"}, {"-e", "ft-x"},
	} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"virsh"}, args...)...)
		cmd.Env = append(os.Environ(), asProgram+"=1", "PATH="+dir+":"+os.Getenv("PATH"))
		cmd.Stdin = strings.NewReader("typed\n")
		out, _ := cmd.CombinedOutput()
		want := "<" + strings.Join(args, "><") + ">"
		if cmd.ProcessState.ExitCode() != 7 || !strings.HasPrefix(string(out), want) || !strings.HasSuffix(string(out), "typed\n") {
			t.Errorf("%v: exit %d: %q, want %q", args, cmd.ProcessState.ExitCode(), out, want)
		}
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "virsh", "list")
	cmd.Env = []string{asProgram + "=1", "PATH=/nonexistent"}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "libvirt-clients") {
		t.Errorf("without virsh: %v: %s", err, out)
	}
}
