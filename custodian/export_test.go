package custodian

import (
	"context"
	"fmt"
	"reflect"
	"time"

	"github.com/keycustody/custodian/internal/audit"
	"github.com/keycustody/custodian/internal/secret"
)

// MoveBatch is how many content keys a rotation moves in one store update.
const MoveBatch = moveBatch

// An Alteration is a record's body with one field changed.
type Alteration struct {
	Field string
	Body  []byte
}

// AlterControl returns the body of a control record in every version in
// which one field differs. The fields are found by reflection, so that one
// that is added later is among them. A field whose change does not show in
// the encoding is an error: nothing would authenticate it.
func AlterControl(r ControlRecord) ([]Alteration, error) {
	switch r.Kind {
	case 0:
		return alter(r.Body, decodeHead, encodeHead)
	case ControlMEK:
		return alter(r.Body, decodeMEK, encodeMEK)
	case ControlKEK:
		return alter(r.Body, decodeKEK, encodeKEK)
	case ControlHelper:
		return alter(r.Body, decodeHelper, encodeHelper)
	case ControlSigner:
		return alter(r.Body, decodeSigner, encodeSigner)
	case ControlCategory:
		return alter(r.Body, decodeCategory, encodeCategory)
	case ControlException:
		return alter(r.Body, decodeException, encodeException)
	case ControlRotation:
		return alter(r.Body, decodeRotation, encodeRotation)
	case ControlRewrap:
		return alter(r.Body, decodeRewrap, encodeRewrap)
	case ControlCategoryPolicy:
		return alter(r.Body, decodeCategoryPolicy, encodeCategoryPolicy)
	case ControlRekey:
		return alter(r.Body, decodeRekey, encodeRekey)
	case ControlFrozenCaller:
		return alter(r.Body, decodeFrozenCaller, encodeFrozenCaller)
	case ControlAuthority:
		return alter(r.Body, decodeAuthority, encodeAuthority)
	case ControlCeremony:
		return alter(r.Body, decodeCeremony, encodeCeremony)
	case ControlRevocation:
		return alter(r.Body, decodeRevocation, encodeRevocation)
	}
	return nil, fmt.Errorf("kind %d has no decoder here", r.Kind)
}

// RotateAged is what RunRotations does beside AdvanceRotations.
func (c *Custodian) RotateAged(ctx context.Context) error { return c.rotateAged(ctx) }

// AlterContentKey is AlterControl for content keys.
func AlterContentKey(body []byte) ([]Alteration, error) {
	return alter(body, DecodeContentKey, EncodeContentKey)
}

func alter[T any](body []byte, decode func([]byte) (T, error), encode func(T) []byte) ([]Alteration, error) {
	decoded, err := decode(body)
	if err != nil {
		return nil, err
	}
	if string(encode(decoded)) != string(body) {
		return nil, fmt.Errorf("%T: decoded and encoded again, it is another", decoded)
	}
	var out []Alteration
	for n := 0; ; n++ {
		v, err := decode(append([]byte(nil), body...))
		if err != nil {
			return nil, err
		}
		left, name := n, ""
		if !changeLeaf(reflect.ValueOf(&v).Elem(), "", &left, &name) {
			return out, nil
		}
		changed := encode(v)
		if string(changed) == string(body) {
			return nil, fmt.Errorf("%T: field %s is not in the encoding", v, name)
		}
		out = append(out, Alteration{name, changed})
	}
}

// changeLeaf changes the field that comes after left others, and says
// whether there is one.
func changeLeaf(v reflect.Value, path string, left *int, name *string) bool {
	if t, ok := v.Interface().(time.Time); ok {
		return mine(left, name, path, func() { v.Set(reflect.ValueOf(laterTime(t))) })
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if changeLeaf(v.Field(i), path+"."+v.Type().Field(i).Name, left, name) {
				return true
			}
		}
		return false
	case reflect.Bool:
		return mine(left, name, path, func() { v.SetBool(!v.Bool()) })
	case reflect.Uint8, reflect.Uint32, reflect.Uint64:
		return mine(left, name, path, func() { v.SetUint(v.Uint() + 1) })
	case reflect.Int64:
		return mine(left, name, path, func() { v.SetInt(v.Int() + 1) })
	case reflect.String:
		return mine(left, name, path, func() { v.SetString(v.String() + "x") })
	case reflect.Array: // of bytes
		return mine(left, name, path, func() { v.Index(v.Len() - 1).SetUint(v.Index(v.Len()-1).Uint() ^ 1) })
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return changeBytes(v, path, left, name)
		}
		for i := range v.Len() {
			if changeLeaf(v.Index(i), fmt.Sprintf("%s[%d]", path, i), left, name) {
				return true
			}
		}
		if mine(left, name, path+" longer", func() { v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem()))) }) {
			return true
		}
		return v.Len() > 0 && mine(left, name, path+" shorter", func() { v.SetLen(v.Len() - 1) })
	}
	panic(fmt.Sprintf("%s: no way to change a %s", path, v.Kind()))
}

func changeBytes(v reflect.Value, path string, left *int, name *string) bool {
	b := v.Bytes()
	if mine(left, name, path+" longer", func() { v.SetBytes(append(append([]byte(nil), b...), 0)) }) {
		return true
	}
	if len(b) == 0 {
		return false
	}
	return mine(left, name, path+" shorter", func() { v.SetBytes(b[:len(b)-1]) }) ||
		mine(left, name, path, func() { b = append([]byte(nil), b...); b[0] ^= 1; v.SetBytes(b) })
}

func laterTime(t time.Time) time.Time {
	if t.IsZero() {
		return time.Unix(1, 0)
	}
	return t.Add(time.Nanosecond)
}

// mine counts a field, and changes it where it is its turn.
func mine(left *int, name *string, path string, change func()) bool {
	if *left > 0 {
		*left--
		return false
	}
	*name = path
	change()
	return true
}

// PutException records the state of a content key, as a ceremony will.
func (c *Custodian) PutException(ctx context.Context, x Exception) error {
	return c.change(ctx, func(*controlSet, time.Time) (change, error) {
		return change{put: []ControlRecord{exceptionRecord(x)}, entry: audit.Entry{Action: "test.exception"}}, nil
	})
}

// RemoveException takes it away again.
func (c *Custodian) RemoveException(ctx context.Context, kid KID) error {
	return c.change(ctx, func(*controlSet, time.Time) (change, error) {
		return change{remove: []controlKey{{ControlException, kid.String()}}, entry: audit.Entry{Action: "test.exception"}}, nil
	})
}

// KeptForTest are the slots of the kept CEKs, as they lie in the arena.
func (c *Custodian) KeptForTest() (slots [][]byte) {
	c.hot.mu.RLock()
	defer c.hot.mu.RUnlock()
	for _, e := range c.hot.kept {
		slots = append(slots, e.slot)
	}
	return slots
}

// NewFlights returns a flight that nobody joins.
func NewFlights() func(KID) {
	h, _ := newHotTitles(nil, nil)
	c := &Custodian{hot: h}
	return func(kid KID) {
		f, _, _ := c.board(nil, SealedKey{Key: ContentKey{KID: kid}})
		if f != nil {
			h.land(f, secret.Secret{}, 0, ErrDenied)
		}
	}
}

// ForgeRevocations has the log know of n revocations that no store has, and of
// one that does not say when it ends, in the form of before that was logged.
func (l *Logged) ForgeRevocations(like audit.Ref, n int, until time.Time) {
	for i := range n + 1 {
		r := Revocation{Session: like, Until: until}
		r.Session.MAC[0], r.Session.MAC[1], r.Session.MAC[2] = 0xff, byte(i>>8), byte(i)
		detail := r.logged("forged")
		if i == n {
			detail = "of an older daemon"
		}
		l.Changes = append(l.Changes, ControlChange{Revision: l.Revision + 1, Action: string(ActionRevoke), Detail: detail, refs: []audit.Ref{r.Session}})
	}
}
