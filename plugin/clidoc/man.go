// SPDX-License-Identifier: Apache-2.0

package clidoc

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/urfave/cli/v2"
)

// page writes in the man(7) language.
type page struct{ b strings.Builder }

func newPage(name string, section int) *page {
	p := &page{}
	p.b.WriteString(".\\\" SPDX-License-Identifier: Apache-2.0\n.\\\" Generated; do not edit.\n")
	// Without a date: a page must not differ with each build.
	fmt.Fprintf(&p.b, ".TH %s %d \"\" ftvirt \"ftvirt manual\"\n.nh\n.ad l\n", strings.ToUpper(name), section)
	return p
}

func (p *page) section(title string)    { fmt.Fprintf(&p.b, ".SH %s\n", escape(title)) }
func (p *page) subsection(title string) { fmt.Fprintf(&p.b, ".SS %s\n", literal(title)) }
func (p *page) request(line string)     { p.b.WriteString(line + "\n") }
func (p *page) term(term, text string)  { fmt.Fprintf(&p.b, ".TP\n%s\n%s\n", term, lines(text)) }
func (p *page) text(text string)        { p.b.WriteString(lines(text) + "\n") }
func (p *page) verbatim(text string)    { fmt.Fprintf(&p.b, ".PP\n.nf\n%s\n.fi\n", lines(text)) }
func (p *page) bytes() []byte           { return []byte(p.b.String()) }
func bold(s string) string              { return `\fB` + literal(s) + `\fP` }
func italic(s string) string            { return `\fI` + literal(s) + `\fP` }
func escape(s string) string            { return strings.ReplaceAll(s, `\`, `\e`) }

// literal is for what is typed: its dashes are ASCII's.
func literal(s string) string { return strings.ReplaceAll(escape(s), "-", `\-`) }

// lines escapes text, in which a line must not begin as a request.
func lines(text string) string {
	all := strings.Split(strings.Trim(text, "\n"), "\n")
	for i, l := range all {
		l = strings.TrimRight(escape(l), " ")
		// Options and commands that text names.
		l = dashes.ReplaceAllStringFunc(l, func(s string) string { return strings.ReplaceAll(s, "-", `\-`) })
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			l = `\&` + l
		}
		all[i] = l
	}
	return strings.Join(all, "\n")
}

var dashes = regexp.MustCompile(`(^|[ '"(\[])--?[a-z]`)

// paragraphs writes text whose paragraphs are parted by empty lines. One whose
// lines are indented keeps its lines.
func (p *page) paragraphs(text string) {
	for i, par := range strings.Split(strings.Trim(text, "\n"), "\n\n") {
		if i > 0 {
			p.request(".PP")
		}
		var plain, list []string
		for _, l := range strings.Split(par, "\n") {
			if strings.HasPrefix(l, "  ") {
				list = append(list, strings.TrimPrefix(l, "   "))
			} else {
				plain = append(plain, l)
			}
		}
		if len(plain) > 0 {
			p.text(strings.Join(plain, "\n"))
		}
		if len(list) > 0 {
			p.verbatim(strings.Join(list, "\n"))
		}
	}
}

// Man gives the manual page of a program, for section 8.
func Man(app *cli.App) []byte {
	root := describe(app)
	p := newPage(app.Name, 8)
	p.section("NAME")
	p.text(fmt.Sprintf(`%s - %s`, app.Name, app.Usage))
	p.section("SYNOPSIS")
	p.request(bold(app.Name) + " " + italic("COMMAND") + " [" + italic("OPTION") + "...] [" + italic("ARGUMENT") + "...]")
	p.section("DESCRIPTION")
	text, codes, _ := strings.Cut(app.Description, "\n\nExit codes:\n")
	p.paragraphs(text)
	p.request(".PP")
	p.text("Options may stand before and behind arguments. Each command has --help.")
	p.section("COMMANDS")
	for _, c := range root.all()[1:] {
		if len(c.commands) > 0 {
			continue // its commands tell
		}
		p.command(app.Name, c)
	}
	if codes != "" {
		p.section("EXIT STATUS")
		for _, l := range strings.Split(strings.TrimSpace(codes), "\n") {
			code, meaning, _ := strings.Cut(strings.TrimSpace(l), " ")
			p.term(bold(code), strings.TrimSpace(meaning))
		}
	}
	env := map[string]bool{}
	for _, c := range root.all() {
		for _, f := range c.flags {
			for _, e := range f.env {
				if len(env) == 0 {
					p.section("ENVIRONMENT")
				}
				if !env[e] {
					env[e] = true
					p.term(bold(e), "stands for "+f.names[0]+": "+f.usage)
				}
			}
		}
	}
	p.section("FILES")
	p.term(italic("/etc/ftvirt/ftvirt.toml"), "the configuration, see ftvirt.toml(5)")
	p.term(italic("/run/ftvirt/agent.sock"), "where the command reaches the agent")
	p.term(italic("/var/lib/ftvirt"), "what the agent keeps over a reboot")
	p.section("SEE ALSO")
	p.request(".BR ftvirt.toml (5),\n.BR ftvirt\\-domain (7),\n.BR virsh (1)")
	return p.bytes()
}

func (p *page) command(program string, c command) {
	p.subsection(c.name(program) + strings.TrimRight(" "+c.args, " "))
	text := strings.ToUpper(c.usage[:1]) + c.usage[1:] + "."
	p.text(text)
	if c.description != "" {
		p.request(".PP")
		p.paragraphs(c.description)
	}
	for _, f := range c.flags {
		var names []string
		for _, n := range f.names {
			names = append(names, bold(n))
		}
		term := strings.Join(names, ", ")
		if f.value != "" {
			term += " " + italic(f.value)
		}
		text := f.usage
		if f.deflt != "" && f.deflt != "0" {
			text += " (default: " + f.deflt + ")"
		}
		p.term(term, text)
	}
}

var (
	tomlKey   = regexp.MustCompile(`^(# )?([a-z_]+) = (.*)$`)
	tomlTable = regexp.MustCompile(`^\[+([^\]]+)\]+$`)
)

// ManConfig gives the manual page of the configuration file, for section 5, from
// its example: each key stands below the comment that explains it.
func ManConfig(name, path, example string) []byte {
	p := newPage(name, 5)
	p.section("NAME")
	p.text(name + " - configuration of a host's ftvirt")
	p.section("SYNOPSIS")
	p.request(italic(path))
	p.section("DESCRIPTION")
	var comment []string
	described := false
	flush := func() {
		if len(comment) > 0 {
			if described {
				p.request(".PP")
			}
			described = true
			p.paragraphs(strings.Join(comment, "\n"))
		}
		comment = nil
	}
	table := ""
	for _, l := range strings.Split(example, "\n") {
		key := tomlKey.FindStringSubmatch(l)
		head := tomlTable.FindStringSubmatch(l)
		switch {
		case strings.Contains(l, "SPDX-License-Identifier"):
		case head != nil:
			table = head[1]
			p.section("[" + table + "]")
			if len(comment) > 0 { // it is about the table
				p.paragraphs(strings.Join(comment, "\n"))
				comment = nil
			}
		case key != nil:
			p.term(bold(key[2])+" = "+literal(key[3]), strings.Join(comment, "\n"))
			comment = nil
		case strings.HasPrefix(l, "#"):
			comment = append(comment, strings.TrimPrefix(strings.TrimPrefix(l, "#"), " "))
		case l == "":
			// A comment that no key follows. One before a table is about that.
			if table == "" && len(comment) > 0 {
				flush()
			}
		default: // the rest of a value of several lines
			p.verbatim(l)
		}
	}
	flush()
	p.section("SEE ALSO")
	p.request(".BR ftvirt (8),\n.BR ftvirt\\-domain (7)")
	return p.bytes()
}
