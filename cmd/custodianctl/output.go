package main

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"
)

func (a *app) printf(format string, args ...any) error {
	_, err := fmt.Fprintf(a.out, format, args...)
	return err
}

// printJSON prints one value, each field on a line of its own.
func (a *app) printJSON(v any) error { return encodeJSON(a.out, v) }

func encodeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printTable prints rows under a header, in columns.
func (a *app) printTable(header []string, rows [][]string) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{header}, rows...) {
		if _, err := fmt.Fprintln(w, strings.Join(row, "\t")); err != nil {
			return err
		}
	}
	return w.Flush()
}

// printList prints messages: in JSON under a name, each as its view, or as the
// rows of a table.
func printList[M, V any](a *app, name string, all []M, view func(M) V, header []string, row func(M, V) []string) error {
	views, rows := make([]V, len(all)), make([][]string, len(all))
	for i, m := range all {
		views[i] = view(m)
		rows[i] = row(m, views[i])
	}
	if a.json {
		return a.printJSON(map[string][]V{name: views})
	}
	return a.printTable(header, rows)
}

// printFields prints names with their values, which are wrapped at 80 columns.
func (a *app) printFields(fields [][2]string) error {
	width := 0
	for _, f := range fields {
		width = max(width, len(f[0]))
	}
	for _, f := range fields {
		lines := wrap(f[1], 80-width-2)
		for i, line := range lines {
			name := f[0]
			if i > 0 {
				name = ""
			}
			if err := a.printf("%s\n", strings.TrimRight(fmt.Sprintf("%-*s  %s", width, name, line), " ")); err != nil {
				return err
			}
		}
	}
	return nil
}

// wrap breaks text at spaces, and words that are too long anywhere.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			lines = append(lines, line)
			line = ""
		}
		for utf8.RuneCountInString(word) > width {
			r := []rune(word)
			lines = append(lines, string(r[:width]))
			word = string(r[width:])
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}

// plain makes text from elsewhere safe to print: what could move a terminal's
// cursor, or look like another column, is quoted.
func plain(s string) string {
	if s == "" || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// short is plain, cut for a table.
func short(s string, limit int) string {
	s = plain(s)
	if r := []rune(s); len(r) > limit {
		return string(r[:limit-1]) + "…"
	}
	return s
}

// contentText shows a content ID: as text where it is some.
func contentText(id []byte) string {
	if len(id) == 0 {
		return "-"
	}
	if utf8.Valid(id) {
		return plain(string(id))
	}
	return "hex:" + hex.EncodeToString(id)
}

// readable is a content ID for JSON, empty where it is not text.
func readable(id []byte) string {
	if utf8.Valid(id) {
		return string(id)
	}
	return ""
}

// orDash shows that there is nothing.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return plain(s)
}

// stamp is a time in UTC, to the second.
func stamp(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// at is the time of a message, zero where it has none.
func at(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// bytesText is a size for people.
func bytesText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d bytes", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

// number is "1 key" or "2 keys".
func number[N ~int | ~int32 | ~int64 | ~uint32 | ~uint64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// hexBytes are hexadecimal in JSON.
type hexBytes []byte

func (b hexBytes) MarshalJSON() ([]byte, error) {
	out := make([]byte, 2*len(b)+2)
	out[0], out[len(out)-1] = '"', '"'
	hex.Encode(out[1:], b)
	return out, nil
}

func (b *hexBytes) UnmarshalJSON(text []byte) error {
	var s string
	if err := json.Unmarshal(text, &s); err != nil {
		return err
	}
	var err error
	*b, err = hex.DecodeString(s)
	return err
}

func (b hexBytes) String() string { return hex.EncodeToString(b) }

// enum is the name of a protobuf enum value without its prefix: frozen.
func enum(name, prefix string) string { return strings.ToLower(strings.TrimPrefix(name, prefix)) }

// names lists names from elsewhere.
func names(all []string) string {
	if len(all) == 0 {
		return "-"
	}
	safe := make([]string, len(all))
	for i, n := range all {
		safe[i] = plain(n)
	}
	return strings.Join(safe, ", ")
}

// timeOrNone is a time for JSON.
func timeOrNone(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	utc := t.AsTime()
	return &utc
}
