// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"text/template"

	"github.com/goccy/go-yaml"
	"github.com/urfave/cli/v2"
)

// The formats of -o.
const (
	formatTable = "table"
	formatText  = "text"
	formatJSON  = "json"
	formatYAML  = "yaml"
	formatCSV   = "csv"
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

// writeCSV writes one line for each value, below one of their keys, which are
// those of JSON, in the same order. What may be left out there is empty here.
func writeCSV[T any](w io.Writer, list []T) error {
	out := csv.NewWriter(w)
	var keys []string
	for f := range reflect.TypeFor[T]().Fields() {
		key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		keys = append(keys, key)
	}
	rows := [][]string{keys}
	for _, v := range list {
		fields, err := asMap(v)
		if err != nil {
			return err
		}
		row := make([]string, len(keys))
		for i, k := range keys {
			if v, ok := fields[k]; ok {
				row[i] = printable(fmt.Sprint(v)) // a line for each
			}
		}
		rows = append(rows, row)
	}
	return out.WriteAll(rows)
}

// asMap gives a value by the keys that it has as JSON, numbers as they are
// written there.
func asMap(v any) (map[string]any, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	m := map[string]any{}
	return m, dec.Decode(&m)
}

func templateFlag() cli.Flag {
	return &cli.StringFlag{Name: "format", Usage: "print by a `TEMPLATE` instead"}
}

// outputTemplate is what --format names.
type outputTemplate struct{ t *template.Template }

func parseTemplate(text string) (outputTemplate, error) {
	t, err := template.New("--format").Funcs(template.FuncMap{
		"json": func(v any) (string, error) { b, err := json.Marshal(v); return string(b), err },
	}).Parse(text)
	if err != nil {
		return outputTemplate{}, usagef("%w", err)
	}
	return outputTemplate{t}, nil
}

// write executes it for one value. A key that there is not is a mistake, but one
// that is left out when it is empty is not.
func (o outputTemplate) write(w io.Writer, v any) error {
	fields, err := asMap(v)
	if err != nil {
		return err
	}
	for f := range reflect.TypeOf(v).Fields() {
		key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if _, ok := fields[key]; !ok {
			fields[key] = ""
		}
	}
	for k, v := range fields {
		if text, ok := v.(string); ok {
			fields[k] = printable(text)
		}
	}
	var b bytes.Buffer
	if err := o.t.Option("missingkey=error").Execute(&b, fields); err != nil {
		return usagef("%w", err)
	}
	_, err = io.WriteString(w, b.String()+"\n")
	return err
}
