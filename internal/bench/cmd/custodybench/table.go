package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
)

// A bar is what a figure is held against.
type bar struct {
	op    string // >=, <=, <
	value float64
}

func (b bar) met(v float64) bool {
	switch b.op {
	case ">=":
		return v >= b.value
	case "<=":
		return v <= b.value
	case "<":
		return v < b.value
	}
	return false
}

// bars of the custody core, of packagers, of the KMS's bad days, of rotations and of the audit
// log.
var bars = map[string]bar{
	"callback_vs_echo_c128":        {">=", 0.4},
	"callback_vs_echo_append_c128": {">=", 0.6},
	"keys_per_s_8kid_vs_1kid":      {">=", 2},
	"retrieve_p50_1m_vs_10k":       {"<=", 1.2},
	"rss_anon_mb_1m":               {"<", 200},

	"issue_ceks_per_s_batch50": {">=", 4000},

	"callback_p99_kms_hang_vs_quiet": {"<=", 1.2},

	"rewrap_vs_token_rate":         {">=", 0.4},
	"callback_p99_rewrap_vs_quiet": {"<=", 1.5},
	"rewrap_progress_off":          {"<=", 0.01},

	"policy_cpu_share":      {"<=", 0.10},
	"token_verify_vs_ecdsa": {"<=", 1.3},

	"goodput_10x_vs_1x":             {">=", 0.8},
	"goodput_closed_10x_vs_1x":      {">=", 0.8},
	"goodput_closed_slow_10x_vs_1x": {">=", 0.8},
	"modest_goodput_under_greedy":   {">=", 0.8},
	"overload_wrong_keys":           {"<=", 0},
	"overload_peak_mb":              {"<", 400},
	"overload_peak_mb_closed":       {"<", 400},

	// Memory while a log is verified does not grow with the log.
	"audit_verify_peak_1m_vs_100k": {"<=", 1.2},
}

// A table collects figures in the order in which they first come.
type table struct {
	names  []string
	values map[string][]float64 // one of each round
}

func newTable() *table { return &table{values: map[string][]float64{}} }

// add adds the figure of one round.
func (t *table) add(name string, v float64) {
	if t.values[name] == nil {
		t.names = append(t.names, name)
	}
	t.values[name] = append(t.values[name], v)
}

// count adds to a figure that is a sum.
func (t *table) count(name string, v float64) {
	if t.values[name] == nil {
		t.add(name, 0)
	}
	t.values[name][0] += v
}

// print writes the table for people.
func (t *table) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "figure\tmedian\tmin..max\tbar\t")
	for _, name := range t.names {
		v := t.values[name]
		spread, verdict := "", ""
		if len(v) > 1 {
			spread = number(slices.Min(v)) + ".." + number(slices.Max(v))
		}
		if b, ok := bars[name]; ok {
			verdict = fmt.Sprintf("%s %s met", b.op, number(b.value))
			if !b.met(median(v)) {
				verdict = fmt.Sprintf("%s %s MISSED", b.op, number(b.value))
			}
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t\n", name, number(median(v)), spread, verdict)
	}
	tw.Flush()
}

// writeJSON writes one flat object: the median under the figure's name, and
// where there were several rounds, also name_min and name_max.
func (t *table) writeJSON(path string) error {
	flat := map[string]float64{}
	for name, v := range t.values {
		flat[name] = median(v)
		if len(v) > 1 {
			flat[name+"_min"], flat[name+"_max"] = slices.Min(v), slices.Max(v)
		}
	}
	b, err := json.MarshalIndent(flat, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// number writes three digits, or the whole number.
func number(v float64) string {
	if v == math.Trunc(v) || math.Abs(v) >= 1000 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

// median is the one in the middle, or the mean of the two there.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s) == 0 {
		return math.NaN()
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// quantile is the smallest value that at least the share q of v does not
// exceed. v is sorted.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	return v[min(len(v)-1, max(0, int(math.Ceil(q*float64(len(v))))-1))]
}
