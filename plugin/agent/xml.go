// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net/http"
)

// DomainXML is the answer of GET /v1/xml/{domain}.
type DomainXML struct {
	Domain string `json:"domain"`
	// XML is the definition as libvirt has it; of a transient domain, its
	// description without what belongs to this run alone.
	XML string `json:"xml"`
	// PluginFile, PluginSocket and ICountShift are this host's hooks.Options.
	PluginFile   string `json:"plugin_file"`
	PluginSocket string `json:"plugin_socket"`
	ICountShift  int    `json:"icount_shift"`
}

// XML gives the definition of a domain and how this host would transform it.
func (a *Agent) XML(ctx context.Context, name string) (DomainXML, error) {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return DomainXML{}, err
	}
	text, err := a.virt.XML(ctx, info.UUID, true)
	o := a.transformOptions()
	return DomainXML{
		Domain: info.Name, XML: text, PluginFile: o.PluginFile, PluginSocket: o.PluginSocket, ICountShift: o.ICountShift,
	}, err
}

var errNoRoute = errors.New("this agent does not know the request; is it older than the command that asks?")

// adminDefinitions adds the requests about domains' definitions.
func (a *Agent) adminDefinitions(mux *http.ServeMux) {
	mux.HandleFunc("POST /v1/prepare", post(func(ctx context.Context, r EnableRequest) error { return a.Prepare(ctx, r.Domain, r.Peer) }))
	mux.HandleFunc("POST /v1/prepare-next", post(func(ctx context.Context, r EnableRequest) error { return a.PrepareNext(ctx, r.Domain, r.Peer) }))
	mux.HandleFunc("POST /v1/restore", post(func(ctx context.Context, r EnableRequest) error { return a.Restore(ctx, r.Domain) }))
	mux.HandleFunc("GET /v1/domains", func(w http.ResponseWriter, r *http.Request) {
		list, err := a.Domains(r.Context())
		reply(w, list, err)
	})
	mux.HandleFunc("GET /v1/domains/{domain}", func(w http.ResponseWriter, r *http.Request) {
		d, err := a.Domain(r.Context(), r.PathValue("domain"))
		reply(w, d, err)
	})
	mux.HandleFunc("GET /v1/xml/{domain}", func(w http.ResponseWriter, r *http.Request) {
		x, err := a.XML(r.Context(), r.PathValue("domain"))
		reply(w, x, err)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { reply(w, nil, errNoRoute) })
}
