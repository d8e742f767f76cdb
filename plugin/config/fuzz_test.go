// SPDX-License-Identifier: Apache-2.0

package config

import "testing"

// FuzzParse: whatever the file holds, it is understood or refused, and what
// Validate accepts can be used.
func FuzzParse(f *testing.F) {
	f.Add([]byte(valid))
	f.Add([]byte(Example))
	f.Add([]byte("[peers.hostb]\nchannel = \"b:1\"\nheartbeat = \"b:2\"\ncertificate_name = \"192.0.2.1\"\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("f", text)
		if err != nil {
			if err.Error() == "" {
				t.Fatal("an error without words")
			}
			return
		}
		if c.Validate() != nil {
			return
		}
		for name := range c.Peers {
			if !ValidCertificateName(c.CertificateName(name)) {
				t.Fatalf("the certificate of %q would have to be for %q", name, c.CertificateName(name))
			}
		}
		if len(c.Agent.AdminSocket) > maxSocketPath || c.Agent.AdminSocket == c.Agent.PluginSocket {
			t.Fatalf("sockets %q and %q", c.Agent.AdminSocket, c.Agent.PluginSocket)
		}
	})
}
