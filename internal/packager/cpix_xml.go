package packager

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Limits of a CPIX document. The largest that is meant is 600 keys with five
// DRM systems each: 1.4 MB and 16,000 elements.
const (
	MaxDocumentSize = 2 << 20 // bytes
	maxElements     = 32 << 10
	maxDepth        = 12 // DocumentKey's cipher value lies nine deep
	maxAttributes   = 16 // of one element
)

// The XML namespaces of CPIX (CPIX 2.4, section 3), RFC 6030, XML Signature
// and XML Encryption.
const (
	nsCPIX   = "urn:dashif:org:cpix"
	nsPSKC   = "urn:ietf:params:xml:ns:keyprov:pskc"
	nsDSig   = "http://www.w3.org/2000/09/xmldsig#"
	nsEnc    = "http://www.w3.org/2001/04/xmlenc#"
	nsSchema = "http://www.w3.org/2001/XMLSchema-instance"
)

// prefixes are how the namespaces are written. Readers match the namespace,
// but some match "cpix:" and "pskc:" themselves.
var prefixes = []struct{ prefix, space string }{{"cpix", nsCPIX}, {"pskc", nsPSKC}, {"ds", nsDSig}, {"enc", nsEnc}, {"xsi", nsSchema}, {"speke", nsSPEKE}}

func prefixOf(space string) string {
	for _, p := range prefixes {
		if p.space == space {
			return p.prefix
		}
	}
	return ""
}

func cpixName(local string) xml.Name { return xml.Name{Space: nsCPIX, Local: local} }
func pskcName(local string) xml.Name { return xml.Name{Space: nsPSKC, Local: local} }
func dsigName(local string) xml.Name { return xml.Name{Space: nsDSig, Local: local} }
func encName(local string) xml.Name  { return xml.Name{Space: nsEnc, Local: local} }

// An element is one XML element. Comments, whitespace between elements, and
// the prefixes that its writer chose are not kept.
type element struct {
	name     xml.Name // Space is the namespace
	attrs    []xml.Attr
	children []*element
	text     []byte // of an element without children
}

func newElement(space, local string) *element {
	return &element{name: xml.Name{Space: space, Local: local}}
}

// String is the name with the usual prefix.
func (e *element) String() string { return nameText(e.name) }

func nameText(n xml.Name) string {
	local := n.Local[:min(len(n.Local), 80)] // no name of ours is longer
	if n.Space == "" {
		return local
	}
	if p := prefixOf(n.Space); p != "" {
		return p + ":" + local
	}
	return fmt.Sprintf("{%.80s}%s", n.Space, local)
}

func (e *element) is(space, local string) bool {
	return e.name == xml.Name{Space: space, Local: local}
}

// attr is an attribute in no namespace.
func (e *element) attr(local string) (string, bool) {
	for _, a := range e.attrs {
		if a.Name.Space == "" && a.Name.Local == local {
			return a.Value, true
		}
	}
	return "", false
}

func (e *element) setAttr(local, value string) {
	for i, a := range e.attrs {
		if a.Name.Space == "" && a.Name.Local == local {
			e.attrs[i].Value = value
			return
		}
	}
	e.attrs = append(e.attrs, xml.Attr{Name: xml.Name{Local: local}, Value: value})
}

func (e *element) removeAttr(local string) {
	e.attrs = slices.DeleteFunc(e.attrs, func(a xml.Attr) bool { return a.Name.Space == "" && a.Name.Local == local })
}

// child is the first child of that name, nil if there is none.
func (e *element) child(space, local string) *element {
	for _, c := range e.children {
		if c.is(space, local) {
			return c
		}
	}
	return nil
}

// at follows a path of single children; nil where it ends early.
func (e *element) at(path ...xml.Name) *element {
	for _, n := range path {
		if e == nil {
			return nil
		}
		e = e.child(n.Space, n.Local)
	}
	return e
}

// add appends a new child and returns it.
func (e *element) add(space, local string) *element {
	c := newElement(space, local)
	e.children = append(e.children, c)
	return c
}

func (e *element) remove(space, local string) {
	e.children = slices.DeleteFunc(e.children, func(c *element) bool { return c.is(space, local) })
}

// wipe clears all text below e: an element with a key in it is wiped by
// whoever made it.
func (e *element) wipe() {
	clear(e.text[:cap(e.text)])
	for _, c := range e.children {
		c.wipe()
	}
}

// A grammar says what may be in an element: the schema of CPIX 2.4, with what
// 2.0 to 2.3 had and 2.4 has not, and what SPEKE 1.0 adds. The order of children is free: writers
// differ in it. Elements of other namespaces, which the schema leaves open,
// are refused: nothing is echoed or obeyed that is not understood.
type grammar struct {
	attrs    string // names with spaces between
	children string // prefixed names; "*" after one: any number of them
	text     bool
}

var schema = map[string]grammar{
	"cpix:CPIX": {attrs: "id contentId name version",
		children: "cpix:DeliveryDataList cpix:ContentKeyList cpix:DRMSystemList cpix:ContentKeyPeriodList cpix:ContentKeyUsageRuleList cpix:UpdateHistoryItemList"},

	"cpix:DeliveryDataList": {attrs: "id updateVersion", children: "cpix:DeliveryData*"},
	"cpix:DeliveryData": {attrs: "id updateVersion name",
		children: "cpix:DeliveryKey cpix:DocumentKey cpix:MACMethod cpix:Description cpix:SendingEntity cpix:SenderPointOfContact cpix:ReceivingEntity"},
	"cpix:DeliveryKey":          {attrs: "Id", children: "ds:X509Data"},
	"cpix:DocumentKey":          {attrs: "id Algorithm", children: "cpix:Data"},
	"cpix:MACMethod":            {attrs: "Algorithm", children: "cpix:Key pskc:MACKey"},
	"cpix:Key":                  {children: "enc:EncryptionMethod enc:CipherData pskc:EncryptedValue"},
	"cpix:Description":          {text: true},
	"cpix:SendingEntity":        {text: true},
	"cpix:SenderPointOfContact": {text: true},
	"cpix:ReceivingEntity":      {text: true},

	"cpix:ContentKeyList": {attrs: "id updateVersion", children: "cpix:ContentKey*"},
	"cpix:ContentKey": {attrs: "id contentId kid explicitIV commonEncryptionScheme Algorithm dependsOnKey",
		children: "cpix:Data cpix:HDCPData"},
	"cpix:Data":                     {children: "pskc:Secret"},
	"cpix:HDCPData":                 {attrs: "HLSHDCPLevel", children: "cpix:HDCPOutputProtectionData"},
	"cpix:HDCPOutputProtectionData": {text: true},

	"cpix:DRMSystemList": {attrs: "id updateVersion", children: "cpix:DRMSystem*"},
	"cpix:DRMSystem": {attrs: "id updateVersion systemId kid name HLSAllowedCPC",
		children: "cpix:PSSH cpix:ContentProtectionData cpix:HLSSignalingData* cpix:SmoothStreamingProtectionHeaderData cpix:URIExtXKey cpix:HDSSignalingData speke:KeyFormat speke:KeyFormatVersions speke:ProtectionHeader"},
	"cpix:PSSH":                                {text: true},
	"cpix:ContentProtectionData":               {attrs: "robustness", text: true},
	"cpix:HLSSignalingData":                    {attrs: "playlist allowedCPC", text: true},
	"cpix:SmoothStreamingProtectionHeaderData": {text: true},
	"cpix:URIExtXKey":                          {text: true},
	"cpix:HDSSignalingData":                    {text: true},
	"speke:KeyFormat":                          {text: true},
	"speke:KeyFormatVersions":                  {text: true},
	"speke:ProtectionHeader":                   {text: true},

	"cpix:ContentKeyPeriodList": {attrs: "id updateVersion", children: "cpix:ContentKeyPeriod*"},
	"cpix:ContentKeyPeriod":     {attrs: "id index label start end startOffset endOffset duration"},

	"cpix:ContentKeyUsageRuleList": {attrs: "id updateVersion", children: "cpix:ContentKeyUsageRule*"},
	"cpix:ContentKeyUsageRule": {attrs: "id kid intendedTrackType",
		children: "cpix:KeyPeriodFilter* cpix:LabelFilter* cpix:VideoFilter* cpix:AudioFilter* cpix:BitrateFilter*"},
	"cpix:KeyPeriodFilter": {attrs: "periodId"},
	"cpix:LabelFilter":     {attrs: "label"},
	"cpix:VideoFilter":     {attrs: "minPixels maxPixels hdr wcg minFps maxFps"},
	"cpix:AudioFilter":     {attrs: "minChannels maxChannels"},
	"cpix:BitrateFilter":   {attrs: "minBitrate maxBitrate"},

	"cpix:UpdateHistoryItemList": {attrs: "id", children: "cpix:UpdateHistoryItem*"},
	"cpix:UpdateHistoryItem":     {attrs: "id updateVersion index source date"},

	"pskc:Secret":         {children: "pskc:PlainValue pskc:EncryptedValue pskc:ValueMAC"},
	"pskc:PlainValue":     {text: true},
	"pskc:EncryptedValue": {attrs: "Id Type", children: "enc:EncryptionMethod enc:CipherData"},
	"pskc:ValueMAC":       {text: true},
	"pskc:MACKey":         {attrs: "Id Type", children: "enc:EncryptionMethod enc:CipherData"},

	"enc:EncryptionMethod": {attrs: "Algorithm", children: "ds:DigestMethod"},
	"enc:CipherData":       {children: "enc:CipherValue"}, // a CipherReference would point elsewhere
	"enc:CipherValue":      {text: true},
	"ds:DigestMethod":      {attrs: "Algorithm"},
	"ds:X509Data":          {children: "ds:X509Certificate"},
	"ds:X509Certificate":   {text: true},
}

// hasWord reports whether list has word, and whether it may be there again
// and again.
func hasWord(list, word string) (has, many bool) {
	for w := range strings.FieldsSeq(list) {
		if name, many := strings.CutSuffix(w, "*"); name == word {
			return true, many
		}
	}
	return false, false
}

// A reader turns XML into elements under the limits and the schema. It
// resolves nothing: there is no DTD, no entity beyond the five of XML itself,
// and no reference is ever followed.
type reader struct {
	dec   *xml.Decoder
	count int
	ids   map[string]bool
}

// parseXML reads one document, whose root must be cpix:CPIX.
func parseXML(doc []byte) (*element, error) {
	if len(doc) > MaxDocumentSize {
		return nil, fmt.Errorf("document of %d bytes: must be at most %d", len(doc), MaxDocumentSize)
	}
	doc = bytes.TrimPrefix(doc, []byte("\ufeff"))
	r := reader{dec: xml.NewDecoder(bytes.NewReader(doc)), ids: map[string]bool{}}
	var root *element
	for {
		tok, err := r.token()
		if errors.Is(err, io.EOF) && root != nil {
			return root, nil
		}
		if errors.Is(err, io.EOF) {
			return nil, errors.New("there is no cpix:CPIX element")
		}
		if err != nil {
			return nil, err
		}
		switch t := tok.(type) {
		case xml.StartElement:
			if root != nil || nameText(t.Name) != "cpix:CPIX" {
				return nil, r.fault("%s: the document must be one cpix:CPIX, in namespace %s", nameText(t.Name), nsCPIX)
			}
			if root, err = r.element(t, 1); err != nil {
				return nil, err
			}
		case xml.CharData:
			if len(bytes.TrimSpace(t)) > 0 {
				return nil, r.fault("text outside of cpix:CPIX")
			}
		}
	}
}

// fault is an error with its place in the document.
func (r *reader) fault(format string, args ...any) error {
	line, _ := r.dec.InputPos()
	return fmt.Errorf("line %d: %w", line, fmt.Errorf(format, args...))
}

// token returns the next token that means something. What could make a
// document mean more than it says is refused.
func (r *reader) token() (xml.Token, error) {
	for {
		tok, err := r.dec.Token()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil, err
			}
			return nil, r.fault("not well-formed XML in UTF-8: %w", err)
		}
		switch t := tok.(type) {
		case xml.Directive:
			return nil, r.fault("a document type or entity declaration is not allowed")
		case xml.ProcInst:
			if t.Target != "xml" {
				return nil, r.fault("the processing instruction %.40q is not allowed", t.Target)
			}
		case xml.Comment:
		default:
			return tok, nil
		}
	}
}

func (r *reader) element(start xml.StartElement, depth int) (*element, error) {
	e := &element{name: start.Name}
	if r.count++; r.count > maxElements {
		return nil, r.fault("more than %d elements", maxElements)
	}
	if depth > maxDepth {
		return nil, r.fault("%s: elements lie more than %d deep", e, maxDepth)
	}
	g, ok := schema[e.String()]
	if !ok {
		return nil, r.fault("%s: CPIX has no such element", e)
	}
	if err := r.attributes(e, start.Attr, g); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for {
		tok, err := r.token()
		if err != nil {
			return nil, err
		}
		switch t := tok.(type) {
		case xml.EndElement:
			if g.text {
				e.text = trimInPlace(e.text)
			}
			return e, nil
		case xml.CharData:
			if g.text {
				e.text = appendWiping(e.text, t)
			} else if len(bytes.TrimSpace(t)) > 0 {
				return nil, r.fault("%s: holds text", e)
			}
		case xml.StartElement:
			name := nameText(t.Name)
			has, many := hasWord(g.children, name)
			if !has {
				return nil, r.fault("%s: has no place in %s", name, e)
			}
			if seen[name] && !many {
				return nil, r.fault("%s: is in %s twice", name, e)
			}
			seen[name] = true
			c, err := r.element(t, depth+1)
			if err != nil {
				return nil, err
			}
			e.children = append(e.children, c)
		}
	}
}

// attributes takes what the schema knows, and what says where a schema lies,
// which nobody looks up.
func (r *reader) attributes(e *element, attrs []xml.Attr, g grammar) error {
	if len(attrs) > maxAttributes {
		return r.fault("%s: %d attributes: must be at most %d", e, len(attrs), maxAttributes)
	}
	for i, a := range attrs {
		name := nameText(a.Name)
		if a.Name.Space == "xmlns" || name == "xmlns" {
			continue
		}
		if slices.ContainsFunc(attrs[:i], func(b xml.Attr) bool { return b.Name == a.Name }) {
			return r.fault("%s@%s: is there twice", e, name)
		}
		known, _ := hasWord(g.attrs, name)
		if !known && a.Name.Space != nsSchema {
			return r.fault("%s@%s: CPIX has no such attribute", e, name)
		}
		if name == "id" || name == "Id" {
			if a.Value == "" || r.ids[a.Value] {
				return r.fault("%s@%s: %.80q is empty, or the id of another element", e, name, a.Value)
			}
			r.ids[a.Value] = true
		}
		e.attrs = append(e.attrs, a)
	}
	return nil
}

// appendWiping is append, but the bytes that it moves away from are wiped.
func appendWiping(to, more []byte) []byte {
	if len(to)+len(more) <= cap(to) {
		return append(to, more...)
	}
	grown := make([]byte, 0, 2*len(to)+len(more))
	grown = append(append(grown, to...), more...)
	clear(to)
	return grown
}

func trimInPlace(b []byte) []byte {
	t := bytes.TrimSpace(b)
	n := copy(b, t)
	clear(b[n:])
	return b[:n]
}

// write writes the document. It is written twice, at first only to be
// measured: so it lies in one array, which its reader can wipe.
func (e *element) write() []byte {
	var n counter
	e.writeDocument(&n)
	var out bytes.Buffer
	out.Grow(int(n))
	e.writeDocument(&out)
	return out.Bytes()
}

// A counter counts what is written to it.
type counter int

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

func (e *element) writeDocument(w io.Writer) {
	io.WriteString(w, `<?xml version="1.0" encoding="UTF-8"?>`+"\n")
	spaces := map[string]bool{nsCPIX: true, nsPSKC: true} // SPEKE wants both declared
	e.spaces(spaces)
	var declared strings.Builder
	for _, p := range prefixes {
		if spaces[p.space] {
			fmt.Fprintf(&declared, ` xmlns:%s="%s"`, p.prefix, p.space)
		}
	}
	e.writeTo(w, declared.String())
	io.WriteString(w, "\n")
}

// spaces notes the namespaces in use.
func (e *element) spaces(in map[string]bool) {
	in[e.name.Space] = true
	for _, a := range e.attrs {
		in[a.Name.Space] = true
	}
	for _, c := range e.children {
		c.spaces(in)
	}
}

func (e *element) writeTo(w io.Writer, declared string) {
	name := e.String()
	io.WriteString(w, "<"+name+declared)
	for _, a := range e.attrs {
		io.WriteString(w, " "+nameText(a.Name)+`="`)
		xml.EscapeText(w, []byte(a.Value)) // these writers take everything
		io.WriteString(w, `"`)
	}
	if len(e.children) == 0 && len(e.text) == 0 {
		io.WriteString(w, "/>")
		return
	}
	io.WriteString(w, ">")
	xml.EscapeText(w, e.text)
	for _, c := range e.children {
		c.writeTo(w, "")
	}
	io.WriteString(w, "</"+name+">")
}
