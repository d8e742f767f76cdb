// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/goccy/go-yaml"
	"github.com/urfave/cli/v2"
)

// The formats of -o.
const (
	formatTable = "table"
	formatText  = "text"
	formatJSON  = "json"
	formatYAML  = "yaml"
)

// outputFlag offers the formats, of which the first is the default.
func outputFlag(formats ...string) cli.Flag {
	return &cli.StringFlag{
		Name: "output", Aliases: []string{"o"}, Usage: "the `FORMAT`: " + strings.Join(formats, ", "), Value: formats[0],
	}
}

func outputFormat(c *cli.Context, formats ...string) (string, error) {
	f := c.String("output")
	if !slices.Contains(formats, f) {
		return "", usagef("unknown output format %q; use one of %s", f, strings.Join(formats, ", "))
	}
	return f, nil
}

// write writes v as JSON or YAML, which have the same keys, or calls table.
func write(w io.Writer, format string, v any, table func(io.Writer) error) error {
	if format != formatJSON && format != formatYAML {
		return table(w)
	}
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	text = append(text, '\n')
	if format == formatYAML {
		if text, err = yaml.JSONToYAML(text); err != nil {
			return fmt.Errorf("YAML: %w", err)
		}
	}
	_, err = w.Write(text)
	return err
}

// table has a line of headings and aligned columns.
type table struct{ tw *tabwriter.Writer }

func newTable(w io.Writer, headings ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)}
	t.row(headings...)
	return t
}

func (t table) row(cells ...string) {
	for i := range cells {
		cells[i] = dash(printable(cells[i]))
	}
	// tabwriter keeps its first error for Flush.
	_, _ = io.WriteString(t.tw, strings.Join(cells, "\t")+"\n")
}

func (t table) flush() error { return t.tw.Flush() }

// fields has one name and value on each line, as virsh dominfo.
type fields struct{ tw *tabwriter.Writer }

func newFields(w io.Writer) fields { return fields{tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)} }

func (f fields) add(name, value string) {
	_, _ = fmt.Fprintf(f.tw, "%s:\t%s\n", name, dash(printable(value)))
}

func (f fields) flush() error { return f.tw.Flush() }

// printable keeps control characters of names and messages out of terminals
// and table cells.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func milliseconds(ms float64) string {
	if ms >= 10 || ms == 0 {
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f ms", ms)
}

func byteRate(perSecond float64) string {
	switch {
	case perSecond >= 1<<20:
		return fmt.Sprintf("%.1f MiB/s", perSecond/(1<<20))
	case perSecond >= 1<<10:
		return fmt.Sprintf("%.1f KiB/s", perSecond/(1<<10))
	}
	return fmt.Sprintf("%.0f B/s", perSecond)
}
