// SPDX-License-Identifier: Apache-2.0

package clidoc

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// domains prints the names of a host's domains. It asks libvirt, which may hang,
// and needs no agent.
const domains = "timeout 2 virsh --readonly list --all --name 2>/dev/null"

// words are the commands below c, or its flags.
func (c command) words() []string {
	var list []string
	for _, sub := range c.commands {
		list = append(list, sub.path[len(sub.path)-1])
	}
	return list
}

func (c command) flagNames() []string {
	list := []string{"--help"}
	for _, f := range c.flags {
		list = append(list, f.names...)
	}
	slices.Sort(list)
	return list
}

// key is a command's path as the scripts hold it.
func (c command) key() string { return strings.Join(c.path, " ") }

// quoted is for between single quotes.
func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Bash gives the completion for bash.
func Bash(app *cli.App) []byte {
	root := describe(app)
	all := root.all()
	var b strings.Builder
	fmt.Fprintf(&b, "# SPDX-License-Identifier: Apache-2.0\n# bash completion for %s, made from the command.\n\n", app.Name)
	fmt.Fprintf(&b, "_%s() {\n", app.Name)
	b.WriteString(`	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path= i flags= words= takes=
	# Bash takes --output=json for three words.
	if [[ $cur == = ]]; then
		cur=
	elif [[ $prev == = && COMP_CWORD -gt 1 ]]; then
		prev=${COMP_WORDS[COMP_CWORD-2]}
	fi
	for ((i = 1; i < COMP_CWORD; i++)); do
		case "${path:+$path }${COMP_WORDS[i]}" in
`)
	var paths []string
	for _, c := range all[1:] {
		paths = append(paths, quoted(c.key()))
	}
	fmt.Fprintf(&b, "\t\t%s) path=\"${path:+$path }${COMP_WORDS[i]}\" ;;\n", strings.Join(paths, " | "))
	b.WriteString("\t\tesac\n\tdone\n\tCOMPREPLY=()\n\tcase \"$path|$prev\" in\n")
	for _, c := range all {
		for _, f := range c.flags {
			var patterns []string
			for _, n := range f.names {
				patterns = append(patterns, quoted(c.key()+"|"+n))
			}
			do := ""
			switch {
			case f.value == "":
				continue
			case f.takes() == choice:
				do = fmt.Sprintf(`mapfile -t COMPREPLY < <(compgen -W %s -- "$cur"); `, quoted(strings.Join(f.choices, " ")))
			case f.takes() == file:
				do = `mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null; `
			}
			fmt.Fprintf(&b, "\t%s) %sreturn ;;\n", strings.Join(patterns, " | "), do)
		}
	}
	b.WriteString("\tesac\n\tcase $path in\n")
	for _, c := range all {
		fmt.Fprintf(&b, "\t%s) flags=%s", quoted(c.key()), quoted(strings.Join(c.flagNames(), " ")))
		if len(c.commands) > 0 {
			fmt.Fprintf(&b, " words=%s", quoted(strings.Join(c.words(), " ")))
		}
		switch c.takes() {
		case file:
			b.WriteString(" takes=file")
		case domain:
			b.WriteString(" takes=domain")
		}
		b.WriteString(" ;;\n")
	}
	fmt.Fprintf(&b, `	esac
	if [[ $cur == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$flags" -- "$cur")
	elif [[ $takes == file ]]; then
		mapfile -t COMPREPLY < <(compgen -f -- "$cur")
		compopt -o filenames 2>/dev/null
	elif [[ $takes == domain ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$(%s)" -- "$cur")
	else
		mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
	fi
}

complete -F _%s %s
`, domains, app.Name, app.Name)
	return []byte(b.String())
}

// zshText is for within the brackets of _arguments.
func zshText(s string) string {
	return strings.NewReplacer(`[`, `\[`, `]`, `\]`, `:`, `\:`, `'`, `'\''`, "`", "\\`", "$", `\$`).Replace(s)
}

// Zsh gives the completion for zsh.
func Zsh(app *cli.App) []byte {
	root := describe(app)
	all := root.all()
	var b strings.Builder
	fmt.Fprintf(&b, "#compdef %s\n# SPDX-License-Identifier: Apache-2.0\n# zsh completion for %s, made from the command.\n\n", app.Name, app.Name)
	fmt.Fprintf(&b, `_%[1]s_domains() {
	local -a names
	names=(${(f)"$(%[2]s)"})
	compadd -a names
}

_%[1]s() {
	local cmd= i
	local -a commands
	integer depth=0
	for ((i = 2; i < CURRENT; i++)); do
		case "${cmd:+$cmd }$words[i]" in
`, app.Name, domains)
	var paths []string
	for _, c := range all[1:] {
		paths = append(paths, "("+strings.ReplaceAll(c.key(), " ", `\ `)+")")
	}
	fmt.Fprintf(&b, "\t\t%s) cmd=\"${cmd:+$cmd }$words[i]\"; depth=$((i - 1)) ;;\n\t\tesac\n\tdone\n", strings.Join(paths, " | "))
	b.WriteString("\t# What is before its arguments is known: _arguments needs the rest alone.\n" +
		"\twords=(\"$words[1]\" \"${(@)words[depth+2,-1]}\")\n\tCURRENT=$((CURRENT - depth))\n\tcase $cmd in\n")
	for _, c := range all {
		fmt.Fprintf(&b, "\t%s)\n", quoted(c.key()))
		if len(c.commands) > 0 {
			b.WriteString("\t\tcommands=(\n")
			for _, sub := range c.commands {
				fmt.Fprintf(&b, "\t\t\t%s\n", quoted(sub.path[len(sub.path)-1]+":"+strings.ReplaceAll(sub.usage, ":", `\:`)))
			}
			b.WriteString("\t\t)\n\t\t_describe -t commands command commands\n\t\t;;\n")
			continue
		}
		b.WriteString("\t\t_arguments '--help[show help]'")
		for _, f := range c.flags {
			spec := ""
			if f.value != "" {
				spec = ":" + f.value + ":"
				switch f.takes() {
				case choice:
					spec += "(" + strings.Join(f.choices, " ") + ")"
				case file:
					spec += "_files"
				}
			}
			for _, n := range f.names {
				eq := ""
				if f.value != "" && strings.HasPrefix(n, "--") {
					eq = "="
				}
				fmt.Fprintf(&b, " \\\n\t\t\t'(%s)%s%s[%s]%s'", strings.Join(f.names, " "), n, eq, zshText(f.usage), spec)
			}
		}
		switch c.takes() {
		case file:
			b.WriteString(" \\\n\t\t\t'*:FILE:_files'")
		case domain:
			fmt.Fprintf(&b, " \\\n\t\t\t'*:DOMAIN:_%s_domains'", app.Name)
		}
		b.WriteString("\n\t\t;;\n")
	}
	fmt.Fprintf(&b, "\tesac\n}\n\n# Sourced or autoloaded, it does what it must.\nif [[ $zsh_eval_context[-1] == loadautofunc ]]; then\n\t_%[1]s \"$@\"\nelse\n\tcompdef _%[1]s %[1]s\nfi\n", app.Name)
	return []byte(b.String())
}

// Fish gives the completion for fish.
func Fish(app *cli.App) []byte {
	root := describe(app)
	var b strings.Builder
	fmt.Fprintf(&b, `# SPDX-License-Identifier: Apache-2.0
# fish completion for %[1]s, made from the command.

# Tells whether the words so far name exactly this command.
function __%[1]s_at
	set -l path
	for word in (commandline -opc)[2..-1]
		if contains -- (string join ' ' $path $word) $__%[1]s_paths
			set -a path $word
		end
	end
	test "$path" = "$argv"
end

`, app.Name)
	fmt.Fprintf(&b, "set -g __%s_paths", app.Name)
	for _, c := range root.all()[1:] {
		fmt.Fprintf(&b, " %s", quoted(c.key()))
	}
	fmt.Fprintf(&b, "\n\ncomplete -c %s -f\n", app.Name)
	for _, c := range root.all() {
		at := fmt.Sprintf("complete -c %s -n %s", app.Name, quoted(strings.TrimRight("__"+app.Name+"_at "+c.key(), " ")))
		for _, sub := range c.commands {
			fmt.Fprintf(&b, "%s -a %s -d %s\n", at, sub.path[len(sub.path)-1], fishText(sub.usage))
		}
		fmt.Fprintf(&b, "%s -l help -d 'show help'\n", at)
		for _, f := range c.flags {
			b.WriteString(at)
			for _, n := range f.names {
				if strings.HasPrefix(n, "--") {
					fmt.Fprintf(&b, " -l %s", n[2:])
				} else {
					fmt.Fprintf(&b, " -s %s", n[1:])
				}
			}
			if f.value != "" {
				b.WriteString(" -x")
			}
			switch f.takes() {
			case choice:
				fmt.Fprintf(&b, " -a %s", fishText(strings.Join(f.choices, " ")))
			case file:
				b.WriteString(" -a '(__fish_complete_path)'")
			}
			fmt.Fprintf(&b, " -d %s\n", fishText(f.usage))
		}
		switch c.takes() {
		case file:
			fmt.Fprintf(&b, "%s -F\n", at)
		case domain:
			fmt.Fprintf(&b, "%s -a %s -d domain\n", at, quoted("("+domains+")"))
		}
	}
	return []byte(b.String())
}

// fishText quotes as fish does: there a backslash quotes within quotes, too.
func fishText(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}
