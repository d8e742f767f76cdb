// SPDX-License-Identifier: Apache-2.0

// Command ftvirt-docs writes the manual pages and the shell completions of
// ftvirt into a directory.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"ftvirt.org/ftvirt/plugin/cli"
	"ftvirt.org/ftvirt/plugin/clidoc"
	"ftvirt.org/ftvirt/plugin/config"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: ftvirt-docs DIRECTORY")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"ftvirt.8":      clidoc.Man(cli.App()),
		"ftvirt.toml.5": clidoc.ManConfig("ftvirt.toml", config.DefaultPath, config.Example),
		"ftvirt.bash":   clidoc.Bash(cli.App()),
		"ftvirt.zsh":    clidoc.Zsh(cli.App()),
		"ftvirt.fish":   clidoc.Fish(cli.App()),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
