// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// maxMetadata bounds what is looked at for the annotation. libvirt itself takes
// 16 MiB of XML; metadata of that size is not meant.
const maxMetadata = 4 << 20

// element is one child of <metadata>, with its place in the raw text: other
// applications' elements are kept byte for byte.
type element struct {
	name       xml.Name
	attrs      []xml.Attr
	text       string
	children   []string
	start, end int
}

// metadataElements lists the children of a domain's metadata that are in
// namespace space. The XML of other applications is read past, not judged,
// beyond being well-formed.
func metadataElements(dom *libvirtxml.Domain, space string) ([]element, error) {
	if dom.Metadata == nil {
		return nil, nil
	}
	raw := dom.Metadata.XML
	if len(raw) > maxMetadata {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", ErrMetadata, len(raw), maxMetadata)
	}
	var found []element
	dec := xml.NewDecoder(strings.NewReader(raw))
	for {
		start := int(dec.InputOffset())
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMetadata, err)
		}
		el, ok := tok.(xml.StartElement)
		if !ok {
			continue
		}
		if el.Name.Space != space {
			if el.Name.Space == prefix && !bound(el, prefix) {
				return nil, &AnnotationError{Reason: fmt.Sprintf("the prefix %s is not declared; write xmlns:%s=%q in the element", prefix, prefix, space)}
			}
			if err := dec.Skip(); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrMetadata, err)
			}
			continue
		}
		e := element{name: el.Name, attrs: slices.Clone(el.Attr), start: start}
		if err := e.readBody(dec); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMetadata, err)
		}
		e.end = int(dec.InputOffset())
		found = append(found, e)
	}
}

// bound tells whether el itself declares the prefix.
func bound(el xml.StartElement, prefix string) bool {
	return slices.ContainsFunc(el.Attr, func(a xml.Attr) bool {
		return a.Name.Space == "xmlns" && a.Name.Local == prefix
	})
}

func (e *element) readBody(dec *xml.Decoder) error {
	var text strings.Builder
	for {
		tok, err := dec.Token()
		if err != nil {
			return err
		}
		switch t := tok.(type) {
		case xml.EndElement:
			e.text = strings.TrimSpace(text.String())
			return nil
		case xml.CharData:
			text.Write(t)
		case xml.StartElement:
			e.children = append(e.children, t.Name.Local)
			if err := dec.Skip(); err != nil {
				return err
			}
		}
	}
}

// setMetadata replaces the elements of namespace space by the text, in the
// place of the first one or at the end; an empty text removes them. All other
// bytes stay.
func setMetadata(dom *libvirtxml.Domain, space, text string) error {
	old, err := metadataElements(dom, space)
	if err != nil {
		return err
	}
	raw := ""
	if dom.Metadata != nil {
		raw = dom.Metadata.XML
	}
	for i, e := range slices.Backward(old) {
		if i == 0 && text != "" {
			raw = raw[:e.start] + text + raw[e.end:]
			continue
		}
		// The white space before an element belongs to it.
		raw = strings.TrimRight(raw[:e.start], " \t\r\n") + raw[e.end:]
	}
	if len(old) == 0 && text != "" {
		body := strings.TrimRight(raw, " \t\r\n")
		tail := raw[len(body):]
		if body == "" || tail == "" {
			tail = "\n  "
		}
		raw = body + "\n    " + text + tail
	}
	if strings.TrimSpace(raw) == "" {
		dom.Metadata = nil
		return nil
	}
	dom.Metadata = &libvirtxml.DomainMetadata{XML: raw}
	return nil
}

// attr formats an attribute.
func attr(name, value string) string {
	var b strings.Builder
	b.WriteString(" " + name + `="`)
	_ = xml.EscapeText(&b, []byte(value)) // a Builder does not fail
	b.WriteByte('"')
	return b.String()
}
