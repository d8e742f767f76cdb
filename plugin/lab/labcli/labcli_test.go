// SPDX-License-Identifier: Apache-2.0

package labcli_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/labcli"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
)

// TestMain makes the test binary a stand-in for ftvirt: "lab exec" becomes
// another program, which a test cannot do to itself.
func TestMain(m *testing.M) {
	if os.Getenv("LABCLI_TEST_MAIN") == "" {
		os.Exit(m.Run())
	}
	out, err := run(os.Args[1:]...)
	fmt.Print(out)
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(args ...string) (string, error) {
	var out bytes.Buffer
	app := &cli.App{
		Name: "ftvirt", Writer: &out, Commands: []*cli.Command{labcli.Command()},
		ExitErrHandler: func(*cli.Context, error) {},
	}
	err := app.Run(append([]string{"ftvirt"}, args...))
	return out.String(), err
}

func TestErrors(t *testing.T) {
	for _, test := range []struct {
		args string
		want error
	}{
		{"lab up extra", labcli.ErrUsage},
		{"lab down extra", labcli.ErrUsage},
		{"lab exec hosta", labcli.ErrUsage},
		{"lab guest hosta", labcli.ErrUsage},
		{"lab up --no-guest --hosts 9 --name clierr", lab.ErrInvalidOptions},
		{"lab down --name clierr", lab.ErrNotUp},
		{"lab exec --name clierr hosta true", lab.ErrNotUp},
		{"lab guest --name clierr hosta g", lab.ErrNotUp},
	} {
		if _, err := run(strings.Fields(test.args)...); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", test.args, err, test.want)
		}
	}
}

// TestUpDown checks that a lab outlives the command that started it, and that
// another command finds and ends it.
func TestUpDown(t *testing.T) {
	const name = "clitest"
	t.Cleanup(func() {
		if err := lab.Remove(context.WithoutCancel(t.Context()), name); err != nil && !errors.Is(err, lab.ErrNotUp) {
			t.Error(err)
		}
	})
	out, err := ftvirt(t, "lab", "up", "--no-guest", "--no-agent", "--hosts", "3", "--name", name)
	if err != nil || !strings.Contains(out, "hostc") || !strings.Contains(out, "qemu+unix:///system?socket=/") {
		t.Fatalf("lab up: %q, %v", out, err)
	}
	if out, err := ftvirt(t, "lab", "up", "--no-guest", "--name", name); err == nil || !strings.Contains(out, "error: lab clitest: lab already up since") {
		t.Errorf("second lab up: %q, %v", out, err)
	}
	if out, err := ftvirt(t, "lab", "exec", "--name", name, "hostc", "virsh", "-q", "list", "--all"); err != nil || strings.TrimSpace(out) != "" {
		t.Errorf("virsh list on hostc: %q, %v", out, err)
	}
	if out, err := ftvirt(t, "lab", "down", "--name", name); err != nil {
		t.Fatalf("lab down: %q, %v", out, err)
	}
	if _, err := lab.Open(t.Context(), name); !errors.Is(err, lab.ErrNotUp) {
		t.Errorf("after lab down: %v, want %v", err, lab.ErrNotUp)
	}
}

// ftvirt runs the command in a process of its own and returns all its output.
func ftvirt(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), "LABCLI_TEST_MAIN=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestExec(t *testing.T) {
	l := labtest.Up(t, lab.Options{NoAgent: true})
	for _, test := range []struct {
		args   []string
		output string
		fails  bool
	}{
		{[]string{"hosta", "hostname"}, "hosta\n", false},
		{[]string{"client", "hostname"}, "client\n", false},
		{[]string{"hostb", "sh", "-c", "echo out; exit 3"}, "out\n", true},
		{[]string{"hostx", "true"}, "error: no such host in the lab: \"hostx\"; there are hosta, hostb, client\n", true},
	} {
		out, err := ftvirt(t, append([]string{"lab", "exec", "--name", l.Name()}, test.args...)...)
		if out != test.output || (err != nil) != test.fails {
			t.Errorf("%v: %q, %v; want %q", test.args, out, err, test.output)
		}
	}
	out, err := run("lab", "guest", "--name", l.Name(), "--number", "3", "--disk-format", "raw", "hostb", "g")
	if err != nil || !strings.Contains(out, lab.GuestAddr(3).Addr().String()) {
		t.Errorf("lab guest: %q, %v", out, err)
	}
}
