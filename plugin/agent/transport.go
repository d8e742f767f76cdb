// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"log/slog"

	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
)

// What the status tells of the logging channel.
const (
	channelTLS       = "tls"
	channelPlaintext = "plaintext"
)

func newTransport(cfg config.Config, log *slog.Logger) (channel.Transport, error) {
	c := cfg.Channel
	if c.Plaintext {
		log.Warn("the logging channel is in plaintext: who reads it sees the memory of guests, who writes to it controls them; " +
			"remove plaintext from [channel] unless nobody else can reach its network")
		return channel.Plain(), nil
	}
	t, err := channel.TLS(channel.PKI{
		CACert: c.CACert, CRL: c.CRL, ServerCert: c.ServerCert, ServerKey: c.ServerKey, ClientCert: c.ClientCert, ClientKey: c.ClientKey,
	}, cfg.CertificateName, log)
	if err != nil {
		return nil, fmt.Errorf("TLS of the logging channel: %w; install certificates ('ftvirt pki --help' tells how), "+
			"or name other files in [channel]", err)
	}
	return t, nil
}

// channelSecurity is how the channel of this host is secured.
func (a *Agent) channelSecurity() string {
	if a.cfg.Channel.Plaintext {
		return channelPlaintext
	}
	return channelTLS
}
