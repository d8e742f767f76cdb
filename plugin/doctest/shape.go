// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"regexp"
	"strings"
)

var (
	uuid   = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
	number = regexp.MustCompile(`\d+(\.\d+)?`)
	// unit is what may change with the size of a number.
	unit = regexp.MustCompile(`0 (ns|us|µs|ms|s|min|B|KiB|MiB|GiB|B/s|KiB/s|MiB/s)\b`)
)

// shape is what a line of output has in common with the next one of its kind.
func shape(line string) string {
	line = strings.Join(strings.Fields(line), " ")
	line = uuid.ReplaceAllString(line, "UUID")
	line = number.ReplaceAllString(line, "0")
	return unit.ReplaceAllString(line, "0 unit")
}

// sameShape compares what was printed with what a document shows. Empty lines at
// the end do not count.
func sameShape(want []string, printed string) bool {
	var w, p []string
	for _, line := range want {
		w = append(w, shape(line))
	}
	for line := range strings.Lines(printed) {
		p = append(p, shape(line))
	}
	return match(trim(w), trim(p))
}

func trim(lines []string) []string {
	for len(lines) > 0 && lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

func match(want, printed []string) bool {
	for len(want) > 0 {
		if want[0] == "..." {
			for i := range len(printed) + 1 {
				if match(want[1:], printed[i:]) {
					return true
				}
			}
			return false
		}
		if len(printed) == 0 || want[0] != printed[0] {
			return false
		}
		want, printed = want[1:], printed[1:]
	}
	return len(printed) == 0
}
