// SPDX-License-Identifier: Apache-2.0

package labcli_test

import (
	"bytes"
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
	if _, err := run(os.Args[1:]...); err != nil {
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
		cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"lab", "exec", "--name", l.Name()}, test.args...)...)
		cmd.Env = append(os.Environ(), "LABCLI_TEST_MAIN=1")
		out, err := cmd.CombinedOutput()
		if string(out) != test.output || (err != nil) != test.fails {
			t.Errorf("%v: %q, %v; want %q", test.args, out, err, test.output)
		}
	}
	out, err := run("lab", "guest", "--name", l.Name(), "--number", "3", "--disk-format", "raw", "hostb", "g")
	if err != nil || !strings.Contains(out, lab.GuestAddr(3).Addr().String()) {
		t.Errorf("lab guest: %q, %v", out, err)
	}
}
