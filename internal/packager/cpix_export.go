package packager

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/keycustody/custodian/custodian"
)

// An ExportRecipient is somebody who takes keys by push.
type ExportRecipient struct {
	Name string
	Recipient
	Categories []custodian.CategoryName // whose keys it may have; none: it may have none
}

// Exports encrypts exported keys to the recipients that the configuration
// pins.
type Exports struct {
	recipients atomic.Pointer[[]ExportRecipient]
}

// NewExports takes the recipients, whose names are unique.
func NewExports(recipients []ExportRecipient) *Exports {
	e := &Exports{}
	e.Set(recipients)
	return e
}

// Set replaces the recipients.
func (e *Exports) Set(recipients []ExportRecipient) { e.recipients.Store(&recipients) }

// Recipient is the SHA-256 of the certificate of the recipient with that name,
// where keys of the category may be exported to it.
func (e *Exports) Recipient(name string, category custodian.CategoryName) (certificate string, ok bool) {
	for _, r := range *e.recipients.Load() {
		if r.Name == name && slices.Contains(r.Categories, category) {
			return r.Fingerprint(), true
		}
	}
	return "", false
}

// Document encrypts the keys of one content item to the recipient with that
// name and certificate, in a CPIX 2.3 document that says what each key is for.
func (e *Exports) Document(name, certificate string, keys []custodian.ExportedKey) ([]byte, error) {
	recipients := *e.recipients.Load()
	i := slices.IndexFunc(recipients, func(r ExportRecipient) bool { return r.Name == name && r.Fingerprint() == certificate })
	if i < 0 || len(keys) == 0 {
		return nil, fmt.Errorf("export of %d keys to %q, certificate %s: the configuration does not have it (any more), or there is no key", len(keys), name, certificate)
	}
	to := recipients[i].Recipient
	if id := keys[0].ContentID; !isXMLText(id) {
		return nil, &custodian.InvalidError{Field: "content_id", Err: errors.New("it is not text that XML can hold, so no CPIX document can name it")}
	}
	root := newElement(nsCPIX, "CPIX")
	root.setAttr("contentId", string(keys[0].ContentID))
	root.setAttr("version", "2.3")
	delivery := root.add(nsCPIX, "DeliveryDataList").add(nsCPIX, "DeliveryData")
	delivery.add(nsCPIX, "DeliveryKey").add(nsDSig, "X509Data").add(nsDSig, "X509Certificate").text = encodeBase64(to.der)
	s := newSealer(to.wrap)
	defer s.close()
	if err := s.deliver(delivery, to, "2.3"); err != nil {
		return nil, fmt.Errorf("export to %s: %w", name, err)
	}
	list := root.add(nsCPIX, "ContentKeyList")
	for _, k := range keys {
		ck := list.add(nsCPIX, "ContentKey")
		ck.setAttr("kid", k.KID.String())
		ck.setAttr("commonEncryptionScheme", string(k.Scheme))
		if len(k.IV) > 0 {
			ck.setAttr("explicitIV", string(encodeBase64(k.IV)))
		}
		var err error
		k.Key.Use(func(cek []byte) { err = s.seal(ck, cek) })
		if err != nil {
			return nil, fmt.Errorf("export to %s: content key %s: %w", name, k.KID, err)
		}
	}
	addRules(root, keys)
	return root.write(), nil
}

// addRules says what each key is for, and when the periods are.
func addRules(root *element, keys []custodian.ExportedKey) {
	rules := newElement(nsCPIX, "ContentKeyUsageRuleList")
	var periods *element
	seen := map[uint32]bool{}
	for _, k := range keys {
		rule := rules.add(nsCPIX, "ContentKeyUsageRule")
		rule.setAttr("kid", k.KID.String())
		rule.setAttr("intendedTrackType", string(k.TrackType))
		if !k.HasPeriod {
			continue
		}
		index := strconv.FormatUint(uint64(k.Period), 10)
		rule.add(nsCPIX, "KeyPeriodFilter").setAttr("periodId", "period-"+index)
		if seen[k.Period] {
			continue
		}
		seen[k.Period] = true
		if periods == nil {
			periods = root.add(nsCPIX, "ContentKeyPeriodList")
		}
		p := periods.add(nsCPIX, "ContentKeyPeriod")
		p.setAttr("id", "period-"+index)
		p.setAttr("index", index)
		for _, t := range []struct {
			name string
			when time.Time
		}{{"start", k.PeriodStart}, {"end", k.PeriodEnd}} {
			if !t.when.IsZero() {
				p.setAttr(t.name, t.when.UTC().Format(time.RFC3339Nano))
			}
		}
	}
	root.children = append(root.children, rules)
}

// isXMLText says whether b is characters of XML 1.0, section 2.2.
func isXMLText(b []byte) bool {
	if !utf8.Valid(b) {
		return false
	}
	for _, r := range string(b) {
		if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == 0xfffe || r == 0xffff {
			return false
		}
	}
	return true
}
