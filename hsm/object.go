package hsm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// An Object is a token object as a search shows it.
type Object struct {
	Class string // "secret key", "private key", "public key", "certificate", "data" or a number
	Label string
	ID    []byte
}

// Objects lists every token object that the user may see, in no order, so that
// a caller can report what it does not know.
func (t *Token) Objects(ctx context.Context) ([]Object, error) {
	var list []Object
	err := t.again(ctx, func() error {
		var found []Object
		err := t.do(ctx, t.control, func(w *worker) error {
			found = nil
			handles, err := w.find(template{flag(pkcs11.CKA_TOKEN, true)})
			if err != nil {
				return err
			}
			for _, h := range handles {
				o, err := w.object(h)
				if err != nil {
					return err
				}
				found = append(found, o)
			}
			// A token that was taken away shows none.
			return w.probe()
		})
		if err == nil {
			list = found
		}
		return err
	})
	return list, t.named("list objects", err)
}

// DestroyLeftovers destroys what a module leaves in the token when its process
// is killed while it makes an object: the objects with one of the IDs, and those
// without ID that have one of the labels. It is for a caller who knows that
// nothing was ever used under these names. The label "" is an object that has
// none: so is a loaded Key, so only who has loaded none yet gives it. It returns
// how many objects there were.
func (t *Token) DestroyLeftovers(ctx context.Context, labels []string, ids [][16]byte) (int, error) {
	n := 0
	err := t.do(ctx, t.control, func(w *worker) error {
		// An object that is half made may not even say that it is a token object.
		handles, err := w.find(nil)
		if err != nil {
			return err
		}
		for _, h := range handles {
			if h == w.t.probing.key {
				continue // the one session object there is while no Key is loaded
			}
			o, err := w.object(h)
			if hasCode(err, ckrObjectHandleInvalid) {
				continue // a Key that was released: it is gone since the search
			}
			if err != nil && !hasCode(err, ckrValueInvalid) { // that of an object without any attribute
				return err
			}
			named := slices.ContainsFunc(ids, func(id [16]byte) bool { return bytes.Equal(o.ID, id[:]) })
			unnamed := len(o.ID) == 0 && slices.Contains(labels, o.Label)
			if !named && !unnamed {
				continue
			}
			switch err := faultOf(callDestroy, w.t.lib.p.DestroyObject(w.session, pkcs11.ObjectHandle(h))); {
			case err == nil:
				n++
			case !hasCode(err, ckrObjectHandleInvalid): // then it is gone, too
				return err
			}
		}
		return w.probe()
	})
	return n, t.named("destroy what was left of an interrupted start", err)
}

func (w *worker) object(h handle) (Object, error) {
	var o Object
	class, err := w.attribute(h, pkcs11.CKA_CLASS)
	if err != nil {
		return o, err
	}
	o.Class = className(class)
	label, err := w.optional(h, pkcs11.CKA_LABEL)
	if err != nil {
		return o, err
	}
	o.Label = string(label)
	o.ID, err = w.optional(h, pkcs11.CKA_ID)
	return o, err
}

func className(b []byte) string {
	if len(b) != 8 {
		return "?"
	}
	switch n := binary.NativeEndian.Uint64(b); n {
	case pkcs11.CKO_DATA:
		return "data"
	case pkcs11.CKO_CERTIFICATE:
		return "certificate"
	case pkcs11.CKO_PUBLIC_KEY:
		return "public key"
	case pkcs11.CKO_PRIVATE_KEY:
		return "private key"
	case pkcs11.CKO_SECRET_KEY:
		return "secret key"
	default:
		return fmt.Sprintf("0x%X", n)
	}
}

// find searches for objects; the search is closed on every path.
func (w *worker) find(tpl template) (found []handle, err error) {
	p := w.t.lib.p
	var attrs []*pkcs11.Attribute
	for _, a := range tpl {
		attrs = append(attrs, &pkcs11.Attribute{Type: a.typ, Value: a.value})
	}
	if err := p.FindObjectsInit(w.session, attrs); err != nil {
		return nil, faultOf(callFind, err)
	}
	defer func() {
		if ferr := p.FindObjectsFinal(w.session); ferr != nil && err == nil {
			err = faultOf(callFind, ferr)
		}
	}()
	for {
		batch, _, err := p.FindObjects(w.session, 64)
		if err != nil {
			return nil, faultOf(callFind, err)
		}
		if len(batch) == 0 {
			return found, nil
		}
		for _, h := range batch {
			found = append(found, handle(h))
		}
	}
}

func (w *worker) attribute(h handle, typ uint) ([]byte, error) {
	list, err := w.t.lib.p.GetAttributeValue(w.session, pkcs11.ObjectHandle(h), []*pkcs11.Attribute{{Type: typ}})
	if err != nil {
		return nil, faultOf(callAttribute, err)
	}
	return list[0].Value, nil
}

// optional is an attribute that this kind of object need not have.
func (w *worker) optional(h handle, typ uint) ([]byte, error) {
	v, err := w.attribute(h, typ)
	if hasCode(err, ckrTypeInvalid) {
		return nil, nil
	}
	return v, err
}

func (w *worker) destroy(h handle) {
	// Nothing to do about an error: the object ends with the anchor's session.
	_ = w.t.lib.p.DestroyObject(w.session, pkcs11.ObjectHandle(h))
}

// one finds the object of a class with this label and ID. Another object with
// only the one or the other makes it ErrDuplicate: no choice is made.
// ErrNotFound is only said after the probe has shown that the token is there.
func (w *worker) one(class uint, label string, id [16]byte) (handle, error) {
	kind := number(pkcs11.CKA_CLASS, class)
	byID, err := w.find(template{kind, {typ: pkcs11.CKA_ID, value: id[:]}})
	if err != nil {
		return 0, err
	}
	byLabel, err := w.find(template{kind, {typ: pkcs11.CKA_LABEL, value: []byte(label)}})
	if err != nil {
		return 0, err
	}
	what := className(kind.value)
	switch {
	case len(byID) == 0 && len(byLabel) == 0:
		if err := w.probe(); err != nil {
			return 0, err
		}
		return 0, fmt.Errorf("%s %s with ID %x: %w", what, label, id, ErrNotFound)
	case len(byID) > 1:
		return 0, fmt.Errorf("%d objects, each a %s with ID %x: %w", len(byID), what, id, ErrDuplicate)
	case len(byLabel) > 1:
		return 0, fmt.Errorf("%d objects, each a %s with label %s: %w", len(byLabel), what, label, ErrDuplicate)
	case len(byID) == 0:
		return 0, fmt.Errorf("%s %s: has not ID %x but another: %w", what, label, id, ErrDuplicate)
	case len(byLabel) == 0:
		return 0, fmt.Errorf("%s with ID %x: has not label %s but another: %w", what, id, label, ErrDuplicate)
	case byID[0] != byLabel[0]:
		return 0, fmt.Errorf("%s %s and the one with ID %x are two: %w", what, label, id, ErrDuplicate)
	}
	return byID[0], nil
}

// compare holds an object against what it must be. All deviations are told.
func (w *worker) compare(h handle, want template) (map[string]string, error) {
	got := map[string]string{}
	var wrong []string
	for _, a := range want {
		name := attributeName(a.typ)
		if a.nested != nil {
			ok, text, err := w.compareNested(h, a)
			if err != nil {
				return nil, err
			}
			got[name] = text
			if !ok {
				wrong = append(wrong, fmt.Sprintf("%s is {%s}, want {%s}", name, text, a.nested))
			}
			continue
		}
		v, err := w.optional(h, a.typ)
		if err != nil {
			return nil, err
		}
		got[name] = showValue(a.typ, v)
		if !bytes.Equal(v, a.value) {
			wrong = append(wrong, fmt.Sprintf("%s is %s, want %s", name, got[name], showValue(a.typ, a.value)))
		}
	}
	if wrong != nil {
		return got, fmt.Errorf("%s: %w", strings.Join(wrong, "; "), ErrUnfit)
	}
	return got, nil
}

// compareNested compares templates as sets: a module may keep its own order.
func (w *worker) compareNested(h handle, want attribute) (bool, string, error) {
	got, rv := w.t.lib.nested(w.session, h, want.typ, want.nested)
	if rv != ckrOK {
		err := newFault(callAttribute, rv)
		if hasClass(err, classPolicy) {
			return false, "not readable: " + codeName(rv), nil
		}
		return false, "", err
	}
	byType := func(a, b attribute) int { return cmp.Compare(a.typ, b.typ) }
	g, n := slices.Clone(got), slices.Clone(want.nested)
	slices.SortFunc(g, byType)
	slices.SortFunc(n, byType)
	same := slices.EqualFunc(g, n, func(a, b attribute) bool { return a.typ == b.typ && bytes.Equal(a.value, b.value) })
	return same, g.String(), nil
}

// String lists the attributes of a template for evidence and messages.
func (tpl template) String() string {
	var parts []string
	for _, a := range tpl {
		parts = append(parts, attributeName(a.typ)+"="+showValue(a.typ, a.value))
	}
	return strings.Join(parts, " ")
}

// showValue writes an attribute for people. Values of keys never come here.
func showValue(typ uint, v []byte) string {
	switch typ {
	case pkcs11.CKA_LABEL, pkcs11.CKA_START_DATE, pkcs11.CKA_END_DATE:
		return string(v)
	case pkcs11.CKA_CLASS:
		return className(v)
	case pkcs11.CKA_ID, pkcs11.CKA_EC_PARAMS:
		return hex.EncodeToString(v)
	case pkcs11.CKA_ALLOWED_MECHANISMS:
		var names []string
		for ; len(v) >= 8; v = v[8:] {
			names = append(names, mechanismName(uint(binary.NativeEndian.Uint64(v))))
		}
		return strings.Join(names, ",")
	}
	switch len(v) {
	case 0:
		return "missing"
	case 1:
		return map[bool]string{true: "true", false: "false"}[v[0] != 0]
	case 8:
		return fmt.Sprint(binary.NativeEndian.Uint64(v))
	}
	return hex.EncodeToString(v)
}

// isNotFound tells a clear "not there" from everything else.
func isNotFound(err error) bool { return errors.Is(err, ErrNotFound) }
