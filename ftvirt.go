// SPDX-License-Identifier: Apache-2.0

// Package ftvirt carries the files at the top of the repository that the
// program must have with it.
package ftvirt

import _ "embed"

// ExampleConfig is ftvirt.toml.example: every key, with its default, explained.
//
//go:embed ftvirt.toml.example
var ExampleConfig string
