// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// maxFile bounds the file, which a hook reads while libvirt waits.
const maxFile = 64 << 10

// ErrUnknownKey is wrapped by an UnknownKeyError.
var ErrUnknownKey = errors.New("unknown key")

// UnknownKeyError names a key of the file that ftvirt does not know.
type UnknownKeyError struct {
	File string
	// Line is 0 if the file is too long to look for it.
	Line int
	Key  string
	// Similar is the known key that was most likely meant, or empty.
	Similar string
}

func (e *UnknownKeyError) Error() string {
	at := e.File
	if e.Line > 0 {
		at += ":" + strconv.Itoa(e.Line)
	}
	msg := fmt.Sprintf("%s: unknown key %s; ", at, e.Key)
	if e.Similar != "" {
		return msg + "did you mean " + e.Similar + "?"
	}
	return msg + "remove it, or see ftvirt.toml.example for the known ones"
}

// Is makes errors.Is find ErrUnknownKey.
func (e *UnknownKeyError) Is(target error) bool { return target == ErrUnknownKey }

// SyntaxError tells where the file is not TOML, or has a value of a wrong type.
type SyntaxError struct {
	File string
	// Line is 0 if it is not known.
	Line int
	Err  error
}

func (e *SyntaxError) Error() string {
	if e.Line > 0 {
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.message())
	}
	return fmt.Sprintf("%s: %s", e.File, e.message())
}

func (e *SyntaxError) message() string {
	if p, ok := errors.AsType[toml.ParseError](e.Err); ok && p.Message != "" {
		return p.Message
	}
	return strings.TrimPrefix(e.Err.Error(), "toml: ")
}

// Unwrap gives the decoder's error.
func (e *SyntaxError) Unwrap() error { return e.Err }

var typeError = regexp.MustCompile(`(?s)^toml: line (\d+) \(last key "(.*?)"\): (.*)$`)

// Load reads, completes and validates the file. A missing file is
// fs.ErrNotExist; all that Validate finds is reported at once, joined.
func Load(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return Config{}, fmt.Errorf("%w; copy ftvirt.toml.example there, or name another file in %s", err, PathEnv)
		}
		return Config{}, err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	c, err := Parse(path, text)
	if err != nil {
		return Config{}, err
	}
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Parse decodes text over Default, without validating. The name is used in
// errors only.
func Parse(name string, text []byte) (Config, error) {
	if len(text) > maxFile {
		return Config{}, &SyntaxError{File: name, Err: fmt.Errorf("the file is larger than %d KiB", maxFile>>10)}
	}
	c := Default()
	c.Agent.AdminSocket, c.Agent.PluginSocket = "", ""
	md, err := toml.Decode(string(text), &c)
	if err != nil {
		line := 0
		if p, ok := errors.AsType[toml.ParseError](err); ok {
			line = p.Position.Line
		} else if m := typeError.FindStringSubmatch(err.Error()); m != nil {
			// A value of a wrong type is reported as text only.
			line, _ = strconv.Atoi(m[1])
			err = errors.New(m[2] + ": " + m[3])
		}
		return Config{}, &SyntaxError{File: name, Line: line, Err: err}
	}
	if unknown := md.Undecoded(); len(unknown) > 0 {
		return Config{}, unknownKeys(name, string(text), unknown)
	}
	c.deriveSockets()
	return c, nil
}

// maxUnknown bounds how many unknown keys are told of: more are another kind of
// file.
const maxUnknown = 50

// unknownKeys builds one error for each key, in the order of the file.
func unknownKeys(name, text string, keys []toml.Key) error {
	keys = keys[:min(len(keys), maxUnknown)]
	lines := keyLines(text, keys)
	var all []*UnknownKeyError
	for i, k := range keys {
		// A table that is unknown says it all; its keys need no line each.
		inside := slices.ContainsFunc(keys, func(o toml.Key) bool {
			return len(o) < len(k) && slices.Equal(o, k[:len(o)])
		})
		if !inside {
			all = append(all, &UnknownKeyError{File: name, Line: lines[i], Key: k.String(), Similar: similar(k)})
		}
	}
	slices.SortStableFunc(all, func(a, b *UnknownKeyError) int { return a.Line - b.Line })
	errs := make([]error, len(all))
	for i, e := range all {
		errs[i] = e
	}
	return errors.Join(errs...)
}

// maxLooks bounds what is spent on telling lines: the time for each grows with the
// file.
const maxLooks = 500

// keyLines finds the line that defines each key, by decoding ever longer parts
// of the text: the decoder does not tell positions, and a parser of our own
// would not agree with it about quoting and inline tables.
func keyLines(text string, keys []toml.Key) []int {
	found := make([]int, len(keys))
	end, statement := 0, 1 // statement is the line after the last whole one
	whole := true
	looks := 0
	for n, line := range strings.SplitAfter(text, "\n") {
		end += len(line)
		if bare := strings.TrimSpace(line); whole && (bare == "" || bare[0] == '#') {
			statement = n + 2
			continue
		}
		if looks++; looks > maxLooks {
			break
		}
		var discard map[string]any
		md, err := toml.Decode(text[:end], &discard)
		if whole = err == nil; !whole {
			continue // inside a value of several lines
		}
		for i, k := range keys {
			if found[i] == 0 && md.IsDefined(k...) {
				found[i] = statement
			}
		}
		statement = n + 2
	}
	return found
}

// similar finds the known key that k most likely means.
func similar(k toml.Key) string {
	best, distance := "", 4 // more edits than three are another word
	for _, known := range knownKeys(reflect.TypeFor[Config](), nil) {
		if len(known) > 2 && known[0] == "peers" && len(k) > 2 && k[0] == "peers" {
			known = toml.Key{"peers", k[1], known[2]}
		}
		if d := editDistance(k.String(), known.String()); d < distance {
			best, distance = known.String(), d
		}
		// A key under the wrong table is meant for the right one.
		if distance > 1 && len(known) == 2 && known[1] == k[len(k)-1] {
			best, distance = known.String(), 1
		}
	}
	return best
}

// knownKeys lists all keys of a structure; map keys are given as "NAME".
func knownKeys(t reflect.Type, prefix toml.Key) []toml.Key {
	var keys []toml.Key
	for f := range t.Fields() {
		key := append(slices.Clone(prefix), f.Tag.Get("toml"))
		keys = append(keys, key)
		switch f.Type.Kind() {
		case reflect.Struct:
			keys = append(keys, knownKeys(f.Type, key)...)
		case reflect.Map:
			keys = append(keys, knownKeys(f.Type.Elem(), append(key, "NAME"))...)
		}
	}
	return keys
}

func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// tomlKey quotes a name where TOML needs it.
func tomlKey(name string) string {
	k := toml.Key{name}.String()
	if k == "" {
		return strconv.Quote(name)
	}
	return k
}
