// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// module is one kernel module, uncompressed.
type module struct {
	name    string // with '_', as the kernel names it
	content []byte
}

func (m module) file() string { return m.name + ".ko" }

// modulesFor returns the modules that the guest loads, each after those that
// it depends on. The dependencies are read from the modules themselves: the
// package ships no modules.dep, and depmod is not always installed.
func modulesFor(ctx context.Context, root, release string) ([]module, error) {
	files, err := moduleFiles(root)
	if err != nil {
		return nil, err
	}
	builtin, err := builtinModules(root, release)
	if err != nil {
		return nil, err
	}
	var loaded []module
	seen := map[string]bool{}
	var load func(name string) error
	load = func(name string) error {
		name = kernelName(name)
		if seen[name] || builtin[name] {
			return nil
		}
		seen[name] = true
		path, ok := files[name]
		if !ok {
			return fmt.Errorf("kernel %s has no module %s", release, name)
		}
		content, err := readModule(ctx, path)
		if err != nil {
			return err
		}
		depends, err := moduleDepends(content)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, d := range depends {
			if err := load(d); err != nil {
				return fmt.Errorf("needed by %s: %w", name, err)
			}
		}
		loaded = append(loaded, module{name: name, content: content})
		return nil
	}
	for _, name := range optionalModules {
		if _, ok := files[kernelName(name)]; ok {
			if err := load(name); err != nil {
				return nil, err
			}
		}
	}
	for _, name := range rootModules {
		if err := load(name); err != nil {
			return nil, err
		}
	}
	return loaded, nil
}

// moduleFiles maps the names of all modules under root to their files.
func moduleFiles(root string) (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, _, ok := strings.Cut(d.Name(), ".ko"); ok && d.Type().IsRegular() {
			files[kernelName(name)] = path
		}
		return nil
	})
	return files, err
}

func builtinModules(root, release string) (map[string]bool, error) {
	// Debian 13 merged /lib into /usr/lib.
	var list []byte
	var err error
	for _, lib := range []string{"lib", "usr/lib"} {
		list, err = os.ReadFile(filepath.Join(root, lib, "modules", release, "modules.builtin"))
		if err == nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	builtin := map[string]bool{}
	for line := range strings.Lines(string(list)) {
		name := strings.TrimSuffix(filepath.Base(strings.TrimSpace(line)), ".ko")
		builtin[kernelName(name)] = true
	}
	return builtin, nil
}

// readModule returns a module as the kernel wants it; newer Debian kernels
// compress theirs.
func readModule(ctx context.Context, path string) ([]byte, error) {
	if strings.HasSuffix(path, ".xz") {
		return run(ctx, "", "xz", "-dc", path)
	}
	return os.ReadFile(path)
}

// moduleDepends reads the "depends=" entry of a
// module's .modinfo section.
func moduleDepends(content []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var depends []string
	for _, entry := range strings.Split(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			depends = append(depends, strings.Split(list, ",")...)
		}
	}
	slices.Sort(depends)
	return slices.Compact(depends), nil
}

func kernelName(name string) string { return strings.ReplaceAll(name, "-", "_") }
