package custodian_test

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keycustody/custodian/custodian"
)

func base64Text(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

const goodPlan = `# Ticket 4711
plan: custodian/1
kind: unfreeze
reason: the screener was another film's
expires: 2026-11-24T12:00:00Z
categories:
- movies
`

func TestPlanDigest(t *testing.T) {
	digest := func(text string) [32]byte {
		t.Helper()
		p, err := custodian.ParsePlan([]byte(text))
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		return p.Digest()
	}
	good := digest(goodPlan)
	for name, same := range map[string]string{
		"another layout": "{kind: unfreeze, plan: custodian/1, expires: '2026-11-24T12:00:00Z', categories: [movies], reason: \"the screener was another film's\"}",
		"a comment":      goodPlan + "# read aloud by Anna\n",
	} {
		if digest(same) != good {
			t.Errorf("%s: the digest is another", name)
		}
	}
	for name, other := range map[string][2]string{
		"reason":     {"another film's", "another film"},
		"expires":    {"12:00:00Z", "12:00:01Z"},
		"categories": {"- movies", "- sport"},
		"more":       {"- movies\n", "- movies\n- sport\n"},
	} {
		changed := strings.Replace(goodPlan, other[0], other[1], 1)
		if changed != goodPlan && digest(changed) == good {
			t.Errorf("another %s: the digest is the same", name)
		}
	}
}

func TestPlanFaults(t *testing.T) {
	swap := func(from, to string) string { return strings.Replace(goodPlan, from, to, 1) }
	for name, test := range map[string]struct{ text, says string }{
		"empty":            {"", "the file is empty"},
		"unknown field":    {goodPlan + "mek: 2\n", "unknown field mek"},
		"repeated field":   {goodPlan + "kind: seal\n", "already defined"},
		"two documents":    {goodPlan + "---\n" + goodPlan, "more than one document"},
		"other format":     {swap("custodian/1", "custodian/2"), "plan: \"custodian/2\": must be custodian/1"},
		"no kind":          {swap("kind: unfreeze", "kind: thaw"), "kind: \"thaw\": must be one of"},
		"no reason":        {swap("reason: the screener was another film's", "reason: ''"), "reason: empty"},
		"a bell":           {swap("the screener", "\"\\a\" #"), "reason: must hold printable"},
		"no time":          {swap("2026-11-24T12:00:00Z", "tomorrow"), "expires: \"tomorrow\": must be a time"},
		"local time":       {swap("12:00:00Z", "12:00:00+01:00"), "expires:"},
		"names nothing":    {swap("categories:\n- movies\n", ""), "categories: a plan of kind unfreeze needs it"},
		"named twice":      {goodPlan + "- movies\n", "categories[1]: movies is named twice"},
		"bad name":         {swap("- movies", "- Movies!"), "categories[0]"},
		"foreign section":  {goodPlan + "quorum: {default: 2}\n", "quorum: a plan of kind unfreeze has none"},
		"too long":         {goodPlan + "#" + strings.Repeat("x", custodian.MaxPlanSize), "must be at most"},
		"all at once":      {swap("custodian/1", "x") + "quorum: {default: 2}\n", "quorum:"},
		"an officer short": {"plan: custodian/1\nkind: officers\nreason: r\nexpires: 2026-11-24T12:00:00Z\nquorum: {default: 2}\nofficers: [{name: a, key: x}]\n", "officers: 1 of them"},
		"a bad key":        {"plan: custodian/1\nkind: officers\nreason: r\nexpires: 2026-11-24T12:00:00Z\nquorum: {default: 2}\nofficers: [{name: a, key: x}]\n", "officers[0].key"},
	} {
		_, err := custodian.ParsePlan([]byte(test.text))
		wantErr(t, name, err, custodian.ErrInvalid)
		if err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %q, want it to say %q", name, err, test.says)
		}
	}
}

// FuzzParsePlan: whatever the file holds, the parser answers with a plan or
// an error; and the canonical form of a plan is that plan, with its digest.
func FuzzParsePlan(f *testing.F) {
	seeds, err := filepath.Glob("testdata/plans/*.yaml")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("plans in testdata: got %d and %v", len(seeds), err)
	}
	for _, name := range seeds {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, s := range []string{"", goodPlan, "a: &a [*a]", "--- {}\n--- {}", "\x00", "plan: custodian/1\nkind: seal\nreason: \"\\u2028\"\nexpires: 2026-11-24T12:00:00Z\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := custodian.ParsePlan(raw)
		if err != nil {
			return
		}
		canonical := p.Canonical()
		again, err := custodian.ParsePlan(canonical)
		if err != nil {
			t.Fatalf("the canonical form is no plan: %v\n%s", err, canonical)
		}
		if !bytes.Equal(again.Canonical(), canonical) || again.Digest() != p.Digest() {
			t.Fatalf("the canonical form is another plan:\n%s\n%s", canonical, again.Canonical())
		}
	})
}
