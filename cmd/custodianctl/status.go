package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/client"
)

func (a *app) statusCmd() *cobra.Command {
	return leaf(&cobra.Command{
		Use:   "status",
		Short: "Show how the daemon is doing, warnings first (operator, officer, auditor)",
		Long: `Show how the daemon is doing, warnings first. With --json it is the message
custodian.v1.Status in the JSON form of protobuf, under the names of its fields:
numbers of 64 bits are strings there.`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		s, err := ask(ctx, a, func(ctx context.Context, cl *client.Client) (*v1.Status, error) { return cl.Status(ctx) })
		if err != nil {
			return fmt.Errorf("get status: %w", err)
		}
		if a.json {
			return a.printMessage(s)
		}
		return a.printStatus(s)
	})
}

// printMessage prints a status as protobuf has it: whatever a later daemon adds
// to the message is shown without a change here.
func (a *app) printMessage(s *v1.Status) error {
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(s)
	if err != nil {
		return err
	}
	// protojson varies its white space from build to build.
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		return err
	}
	return a.printf("%s\n", out.Bytes())
}

func (a *app) printStatus(s *v1.Status) error {
	var fields [][2]string
	add := func(name, format string, args ...any) {
		fields = append(fields, [2]string{name, fmt.Sprintf(format, args...)})
	}
	for _, w := range s.GetWarnings() {
		add("WARNING", "%s", plain(w))
	}
	add("state", "%s, version %s", enum(s.GetState().String(), "SERVING_STATE_"), orDash(s.GetVersion()))
	add("time", "%s, serving since %s", stamp(at(s.GetTime())), stamp(at(s.GetStartTime())))
	if s.GetStoreId() == "" {
		return a.printFields(fields) // nothing else is there before init
	}
	add("authority", "%s, control revision %d", orDash(s.GetAuthority()), s.GetControlRevision())
	for _, m := range s.GetMeks() {
		line := fmt.Sprintf("%s, version %d, %s, %s", orDash(m.GetLabel()), m.GetVersion(), enum(m.GetState().String(), "KEY_STATE_"), orDash(m.GetProfile()))
		if m.GetState() == v1.KeyState_KEY_STATE_ACTIVE {
			line += fmt.Sprintf("; wraps new keys until %s, %s left", stamp(at(m.GetEndTime())), number(m.GetDaysLeft(), "day", "days"))
		}
		add("mek", "%s", line)
	}
	h := s.GetHsm()
	add("token", "%s: %s %s, serial %s, profile %s", orDash(h.GetLabel()), orDash(h.GetManufacturer()), orDash(h.GetModel()), orDash(h.GetSerial()), orDash(h.GetProfile()))
	add("", "connection %d, %d of %d sessions in use, %s", h.GetEpoch(), h.GetSessionsInUse(), h.GetSessionsMax(),
		number(h.GetAbandonedCalls(), "abandoned call", "abandoned calls"))
	if n := len(s.GetUnknownObjects()); n > 0 {
		add("", "%s not ours, never used", number(n, "object", "objects"))
	}
	for _, p := range s.GetProviders() {
		addProvider(add, p)
	}
	for _, j := range s.GetRewraps() {
		add("job", "outer wraps of %s to %s: %s keys", scopeOf(j.GetCategory()), names(j.GetProviders()), progress(j))
		if j.GetLastError() != "" {
			add("", "does not go on: %s", plain(j.GetLastError()))
		}
	}
	for _, r := range s.GetRotations() {
		v := viewRotation(r)
		add("rotation", "%s is at %s: %d of %d records, %.0f/s, remaining %s", plain(v.Name), v.Step, v.Done, v.Total, v.Rate, orDash(v.Remaining))
		if v.LastError != "" {
			add("", "does not go on: %s", plain(v.LastError))
		}
	}
	st, l := s.GetStore(), s.GetAudit()
	add("store", "%s, %s, %s, schema %d", number(st.GetContentKeys(), "content key", "content keys"), bytesText(st.GetSizeBytes()), orDash(st.GetEngine()), st.GetSchema())
	add("", "%s", orDash(st.GetPath()))
	add("", "id %s", orDash(s.GetStoreId()))
	add("keys", "%s, %d key-encryption keys loaded now and %s so far, %d content keys in clear now",
		number(s.GetCategories(), "category", "categories"), s.GetKeksLoaded(), number(s.GetKekLoads(), "load", "loads"), s.GetCeksInClear())
	if n := s.GetUnknownKidIncidents(); n > 0 {
		add("", "UNKNOWN KIDS asked for by callers who may know: %d", n)
	}
	add("audit log", "%s", number(l.GetEntries(), "entry", "entries"))
	add("", "root %s", orDash(l.GetRoot()))
	if l.GetBlocked() != "" {
		add("", "BLOCKED: %s", plain(l.GetBlocked()))
	}
	for _, n := range l.GetAnchors() {
		add("anchor", "%s (%s), %s", orDash(n.GetName()), orDash(n.GetKind()), confirmedOf(n))
		if n.GetLastError() != "" {
			add("", "%s failed, the last one: %s", number(n.GetFailures(), "try", "tries"), plain(n.GetLastError()))
		}
		if n.GetAlertTime() != nil {
			add("", "ALERT declared %s", stamp(at(n.GetAlertTime())))
		}
	}
	return a.printFields(fields)
}

// addProvider adds the lines of one KMS.
func addProvider(add func(name, format string, args ...any), p *v1.ProviderStatus) {
	add("kms", "%s (%s), %s", orDash(p.GetName()), orDash(p.GetKind()), layerOf(p))
	add("", "holds %s, %d of them alone", number(p.GetKeyVersions(), "key version", "key versions"), p.GetSoleKeyVersions())
	add("", "%s; %s, %d failed", contactOf(p), number(p.GetCalls(), "call", "calls"), p.GetFailures())
	add("", "%s", graceOf(p))
	if p.GetLoginRefused() != "" {
		add("", "LOGIN IS REFUSED: %s", plain(p.GetLoginRefused()))
	}
	if p.GetNextRenewalTime() != nil {
		add("", "login: renewed %s, ends %s", stamp(at(p.GetNextRenewalTime())), stamp(at(p.GetLoginEndTime())))
	}
	if p.GetIncidentTime() != nil {
		add("", "INCIDENT declared %s", stamp(at(p.GetIncidentTime())))
	}
	if calls := callsOf(p); calls != "" {
		add("", "calls: %s", calls)
	}
}

// confirmedOf says what an anchor has.
func confirmedOf(n *v1.AnchorStatus) string {
	if n.GetConfirmTime() == nil {
		return "NOTHING CONFIRMED since the start"
	}
	s := fmt.Sprintf("has %s since %s", number(n.GetSize(), "entry", "entries"), stamp(at(n.GetConfirmTime())))
	if n.GetLagEntries() > 0 {
		s += fmt.Sprintf(", %d behind for %s", n.GetLagEntries(), n.GetLag().AsDuration().Round(time.Second))
	}
	return s
}

func layerOf(p *v1.ProviderStatus) string {
	if !p.GetOuterLayer() {
		return "no outer layer"
	}
	return "outer layer under " + orDash(p.GetKeyRef())
}

func contactOf(p *v1.ProviderStatus) string {
	switch {
	case p.GetReachable():
		return "reachable, last contact " + stamp(at(p.GetLastContactTime()))
	case p.GetLastError() == "":
		return "not called yet"
	}
	return "OUT OF REACH since " + stamp(at(p.GetLastContactTime())) + ": " + plain(p.GetLastError())
}

// callsOf counts the calls by why they were made: to load 5 ok 1 held, to probe 2 ok.
func callsOf(p *v1.ProviderStatus) string {
	var out []string
	last := ""
	for _, c := range p.GetCallsByReason() {
		if c.GetReason() != last {
			last = c.GetReason()
			out = append(out, "to "+plain(last))
		}
		out[len(out)-1] += fmt.Sprintf(" %d %s", c.GetCount(), plain(c.GetResult()))
	}
	return strings.Join(out, ", ")
}

// graceOf says what would become of loaded keys.
func graceOf(p *v1.ProviderStatus) string {
	if p.GetRefused() != "" {
		return "no grace, ACCESS IS REFUSED: " + plain(p.GetRefused())
	}
	grace := "grace left for loaded keys: " + p.GetGraceLeft().AsDuration().Round(time.Second).String()
	if p.GetAwaySinceTime() == nil {
		return grace
	}
	return grace + ", AWAY since " + stamp(at(p.GetAwaySinceTime()))
}
