package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/softhsm"
)

// TestMain lets the test binary be the children that a benchmark starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "-role" {
		if err := dispatch(context.Background(), os.Args[1:]); err != nil {
			os.Stderr.WriteString("child: " + err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// figures that the issue of the custody core names.
var figures = []string{"callback_per_s_c32", "callback_per_s_c128", "echo_per_s_c32", "echo_per_s_c128", "echo_append_per_s_c128",
	"callback_p50_us_c32", "callback_p99_us_c128", "callback_vs_echo_c32", "callback_vs_echo_c128", "callback_vs_echo_append_c128", "callback_vs_tuned_echo_c128",
	"keys_per_s_8kid_vs_1kid", "token_decrypt_per_s", "server_cpu_us_per_key", "client_cpu_us_per_call",
	"issue_ceks_per_s", "issue_ceks_per_s_batch50", "widevine_ceks_per_s_batch50", "speke_ceks_per_s_batch50", "speke1_ceks_per_s", "playready_ceks_per_s", "seed_ceks_per_s", "retrieve_p50_1m_vs_10k", "rss_anon_mb_1m",
	"callback_p99_kms_hang_vs_quiet", "rewrap_vs_token_rate", "callback_p99_rewrap_vs_quiet", "callback_cold_p99_ms",
	"callback_vs_echo_c128_unsigned",
	"audit_entries_per_s_c1", "audit_entries_per_s_c32", "audit_entries_per_s_c128", "audit_verify_entries_per_s",
	"audit_verify_peak_mb_100k", "audit_verify_peak_mb_1m", "audit_proof_ms_1m", "audit_proof_check_us_1m", "audit_proof_bytes_1m",
	"policy_decision_us", "policy_cpu_share", "token_verify_vs_ecdsa", "overload_capacity_per_s", "overload_goodput_1x", "overload_shed_share_10x",
	"overload_goodput_closed_10x", "overload_goodput_closed_slow_10x", "overload_p99_ms_10x", "overload_peak_mb", "overload_peak_mb_closed",
	"modest_goodput_under_greedy", "hot_viewers_per_s_not_shared", "hot_viewers_per_s_not_kept", "hot_viewers_per_s_kept_1s", "hot_viewers_per_s_kept_60s"}

func TestAllSections(t *testing.T) {
	if testing.Short() {
		t.Skip("it starts servers and a token, and takes some seconds")
	}
	if _, err := softhsm.FindModule(); err != nil {
		t.Skip(err)
	}
	r, err := newRig(scale{warm: 200 * time.Millisecond, time: 600 * time.Millisecond, rounds: 1, keys: 100, million: 1300, rotated: 6000, connections: 2, lifetime: time.Second, overload: []int{1, 10}}, t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	all, err := choose("")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.run(t.Context(), all); err != nil {
		t.Error(err)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "bench.json")
	if err := r.table.writeJSON(path); err != nil {
		t.Fatal(err)
	}
	got := readJSON(t, path)
	for _, name := range figures {
		if got[name] <= 0 {
			t.Errorf("%s: got %v, want a positive number", name, got[name])
		}
	}
	if got["seeded_keys"] != 1300 {
		t.Errorf("seeded_keys: got %v, want 1300", got["seeded_keys"])
	}
	if got["modest_goodput_under_greedy"] <= got["greedy_goodput_beside_modest"] {
		t.Errorf("of the modest caller's calls %v were answered, of the greedy one's %v", got["modest_goodput_under_greedy"], got["greedy_goodput_beside_modest"])
	}
	if got["overload_wrong_keys"] != 0 {
		t.Errorf("under overload, %v answers had another key than was issued", got["overload_wrong_keys"])
	}
	// The echo is no comparison if it answers something of another size.
	if echo, callback := got["echo_response_bytes"], got["callback_response_bytes"]; echo < callback-8 || echo > callback+8 {
		t.Errorf("response: the echo's has %v bytes, the callback's %v", echo, callback)
	}
}

func readJSON(t *testing.T, path string) map[string]float64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var flat map[string]float64
	if err := json.Unmarshal(b, &flat); err != nil {
		t.Fatal(err)
	}
	return flat
}

func TestTable(t *testing.T) {
	tab := newTable()
	for _, v := range []float64{0.5, 0.3, 0.45} {
		tab.add("callback_vs_echo_c128", v)
	}
	tab.add("rss_anon_mb_1m", 200)
	tab.count("failed_calls", 2)
	tab.count("failed_calls", 3)
	var out bytes.Buffer
	tab.print(&out)
	lines := strings.Split(out.String(), "\n")
	for i, want := range [][]string{
		{"figure", "median", "min..max", "bar"},
		{"callback_vs_echo_c128", "0.45", "0.3..0.5", ">=", "0.4", "met"},
		{"rss_anon_mb_1m", "200", "<", "200", "MISSED"},
		{"failed_calls", "5"},
	} {
		if got := strings.Fields(lines[i]); !slices.Equal(got, want) {
			t.Errorf("line %d: got %q, want %q", i, got, want)
		}
	}
	path := filepath.Join(t.TempDir(), "bench.json")
	if err := tab.writeJSON(path); err != nil {
		t.Fatal(err)
	}
	got := readJSON(t, path)
	want := map[string]float64{"callback_vs_echo_c128": 0.45, "callback_vs_echo_c128_min": 0.3, "callback_vs_echo_c128_max": 0.5, "rss_anon_mb_1m": 200, "failed_calls": 5}
	if len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for name, v := range want {
		if got[name] != v {
			t.Errorf("%s: got %v, want %v", name, got[name], v)
		}
	}
}

func TestMedianAndQuantile(t *testing.T) {
	for _, c := range []struct {
		values []float64
		median float64
		p99    float64
	}{
		{[]float64{7}, 7, 7},
		{[]float64{4, 1}, 2.5, 4},
		{[]float64{9, 1, 5}, 5, 9},
	} {
		if got := median(c.values); got != c.median {
			t.Errorf("median %v: got %v, want %v", c.values, got, c.median)
		}
		sorted := slices.Sorted(slices.Values(c.values))
		if got := quantile(sorted, 0.99); got != c.p99 {
			t.Errorf("p99 of %v: got %v, want %v", c.values, got, c.p99)
		}
	}
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	if got := quantile(hundred, 0.99); got != 99 {
		t.Errorf("p99 of 1 to 100: got %v, want 99", got)
	}
}

func TestChoose(t *testing.T) {
	if got, err := choose(" issue,callback"); err != nil || !slices.Equal(got, []string{"issue", "callback"}) {
		t.Errorf("got %v %v", got, err)
	}
	if _, err := choose("callbacks"); err == nil {
		t.Error("an unknown section: got no error")
	}
}

func TestProcessTime(t *testing.T) {
	before, err := processTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	for start := time.Now(); time.Since(start) < 200*time.Millisecond; {
		sum++
	}
	after, err := processTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// On a busy machine we may get little of the time, but not nothing.
	if used := after - before; used <= 0 || used > time.Minute {
		t.Errorf("a busy loop of 200 ms (%d turns) used %s of CPU time", sum, used)
	}
}

// TestLongRotation moves a million content keys to a new KEK under callbacks.
func TestLongRotation(t *testing.T) {
	if os.Getenv("CUSTODIAN_LONG") != "1" {
		t.Skip("a million content keys, a quarter of an hour: set CUSTODIAN_LONG=1, or make long")
	}
	r, err := newRig(scale{warm: time.Second, time: 15 * time.Second, rounds: 5, rotated: 1_000_000, connections: 4}, t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.rotation(t.Context()); err != nil {
		t.Error(err)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
	var figures bytes.Buffer
	r.table.print(&figures)
	t.Logf("\n%s", &figures)
	if off := median(r.table.values["rewrap_progress_off"]); !(off <= 0.01) {
		t.Errorf("its progress was wrong by %.3f of all, want 0.01 at most", off)
	}
	// A list of the records would be some hundred MB.
	if grown := median(r.table.values["rss_rewrap_second_vs_first_half"]); !(grown <= 1.25) {
		t.Errorf("memory grew to %.2f times what it was in the first half", grown)
	}
}
