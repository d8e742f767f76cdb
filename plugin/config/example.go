// SPDX-License-Identifier: Apache-2.0

package config

import _ "embed"

// Example is ftvirt.toml.example: every key, with its default, explained. It
// lies here, and the top of the repository links to it, because a program can
// carry with it only what lies below its package.
//
//go:embed ftvirt.toml.example
var Example string
