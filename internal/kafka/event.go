package kafka

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"strings"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/keycustody/custodian/custodian"
)

// maxEventSize is the largest event that is read, in bytes.
const maxEventSize = 64 << 10

var (
	// errMalformed: it will never be an event of ours.
	errMalformed = errors.New("malformed event")
	// errPassedOver: it is an event of another type.
	errPassedOver = errors.New("an event of another type")
)

// decode makes a domain event of a record.
func (t TopicConfig) decode(r *kgo.Record) (custodian.Event, error) {
	if len(r.Value) > maxEventSize {
		return custodian.Event{}, fmt.Errorf("%w: %d bytes: must be %d at most", errMalformed, len(r.Value), maxEventSize)
	}
	read := t.readCloudEvent
	if t.Format == FormatJSON {
		read = t.readJSON
	}
	m, err := read(r)
	if err != nil {
		return custodian.Event{}, fmt.Errorf("%w: %w", errMalformed, err)
	}
	kind, known := t.Types[m.kind]
	if !known {
		kind, known = t.Types["*"]
	}
	if !known {
		return custodian.Event{}, fmt.Errorf("%w, %.80q", errPassedOver, m.kind)
	}
	ev := custodian.Event{ID: m.id, Kind: kind}
	fields := map[string]*string{t.Fields.Session: &ev.SessionID}
	var category, content string
	if kind != custodian.EventSessionRevoked {
		fields = map[string]*string{t.Fields.Category: &category}
	}
	if kind == custodian.EventPackaged {
		fields[t.Fields.Content] = &content
	}
	for name, to := range fields {
		if *to, err = text(m.data, name); err != nil {
			return custodian.Event{}, fmt.Errorf("%w: %w", errMalformed, err)
		}
	}
	ev.Category, ev.ContentID = custodian.CategoryName(category), custodian.ContentID(content)
	if err := ev.Check(); err != nil {
		return custodian.Event{}, fmt.Errorf("%w: %w", errMalformed, err)
	}
	return ev, nil
}

// A message is an event as it was sent.
type message struct {
	id, kind string
	data     map[string]any
}

func (t TopicConfig) readJSON(r *kgo.Record) (m message, err error) {
	if m.data, err = object(r.Value); err != nil {
		return m, err
	}
	if m.id, err = text(m.data, t.Fields.ID); err != nil {
		return m, err
	}
	// Without a type it may be what "*" says.
	m.kind, _ = text(m.data, t.Fields.Type)
	return m, nil
}

// readCloudEvent reads both forms of the Kafka binding of CloudEvents 1.0.
func (t TopicConfig) readCloudEvent(r *kgo.Record) (m message, err error) {
	attributes := map[string]string{}
	if kind, _, _ := mime.ParseMediaType(header(r, "content-type")); kind == "application/cloudevents+json" {
		envelope, err := object(r.Value)
		if err != nil {
			return m, err
		}
		for _, name := range []string{"specversion", "id", "source", "type"} {
			if attributes[name], err = text(envelope, name); err != nil {
				return m, err
			}
		}
		data, ok := envelope["data"].(map[string]any)
		if !ok {
			return m, errors.New("data: must be a JSON object")
		}
		m.data = data
	} else {
		for _, name := range []string{"specversion", "id", "source", "type"} {
			if attributes[name] = header(r, "ce_"+name); attributes[name] == "" {
				return m, fmt.Errorf("no CloudEvent: no header ce_%s, and its content-type is not application/cloudevents+json", name)
			}
		}
		if m.data, err = object(r.Value); err != nil {
			return m, err
		}
	}
	if attributes["specversion"] != "1.0" {
		return m, fmt.Errorf("specversion %.20q: must be 1.0", attributes["specversion"])
	}
	// Source and ID together name an event (CloudEvents 1.0, section 3.1).
	m.id, m.kind = attributes["source"]+"#"+attributes["id"], attributes["type"]
	if len(m.id) > custodian.MaxRequestIDSize {
		sum := sha256.Sum256([]byte(m.id))
		m.id = "sha256:" + hex.EncodeToString(sum[:])
	}
	return m, nil
}

func header(r *kgo.Record, name string) string {
	for _, h := range r.Headers {
		if strings.EqualFold(h.Key, name) {
			return string(h.Value)
		}
	}
	return ""
}

// object reads one JSON object, and nothing behind it.
func object(b []byte) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	var v map[string]any
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("no JSON object: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one JSON value")
	}
	return v, nil
}

// text is the text at a path of names.
func text(data map[string]any, path string) (string, error) {
	names := strings.Split(path, ".")
	for _, name := range names[:len(names)-1] {
		inner, ok := data[name].(map[string]any)
		if !ok {
			return "", fmt.Errorf("%s: %s is no object", path, name)
		}
		data = inner
	}
	s, ok := data[names[len(names)-1]].(string)
	if !ok || s == "" {
		return "", fmt.Errorf("%s: must be a text", path)
	}
	return s, nil
}
