package packager_test

import (
	"bytes"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/keycustody/custodian/internal/packager"
)

// TestLargeRequestsTogether: a hundred callers that each send a request of the
// largest size, but for its last byte, find room for a few. The others are told
// to come back, what the daemon keeps of all of them is bounded, and who asks
// for keys with an ordinary request has them meanwhile.
func TestLargeRequestsTogether(t *testing.T) {
	k := newDoorKit(t, func(c *packager.Config) { c.Hold = 300 * time.Millisecond })
	c := k.client(t, doorPackager)
	// In halves, so that the first one is there long before the second.
	document := []byte(strings.Repeat(" ", packager.MaxDocumentSize-1<<10))
	before := liveHeap()
	const callers = 100
	type answer struct {
		status int
		header http.Header
		err    error
	}
	answers := make(chan answer, callers)
	rest := make(chan struct{})
	for range callers {
		go func() {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, k.url+"speke", io.MultiReader(bytes.NewReader(document), heldBack{rest}))
			if err != nil {
				answers <- answer{err: err}
				return
			}
			req.Header = spekeHeader("2.0")
			res, err := c.Do(req)
			if err != nil {
				answers <- answer{err: err}
				return
			}
			res.Body.Close()
			answers <- answer{res.StatusCode, res.Header, nil}
		}()
	}
	const room = 8
	told := 0
	for told < callers-room {
		select {
		case a := <-answers:
			// A connection that is closed while its caller still sends is a refusal too.
			if a.err == nil && (a.status != http.StatusTooManyRequests || a.header.Get("Retry-After") == "") {
				t.Fatalf("got %d, %v, want 429 with Retry-After", a.status, a.header)
			}
			told++
		case <-time.After(10 * time.Second):
			t.Fatalf("%d callers were told to come back, want %d: there is room for all", told, callers-room)
		}
	}
	used := int64(liveHeap()) - int64(before)
	t.Logf("%d KiB are kept of %d KiB that callers sent", used>>10, callers*len(document)>>10)
	if used > 64<<20 {
		t.Errorf("that is more than 64 MiB")
	}
	_, inner := captured(t, "mt-cenc-aes")
	if status, raw := post(t, c, k.url+"widevine", wvBody(inner)); status != http.StatusOK || wvDecode(t, raw).Status != "OK" {
		t.Errorf("an ordinary request: got %d %s", status, raw)
	}
	for _, door := range []string{"widevine", "playready", "speke"} {
		if status := k.knock(t, doorPackager, door, "movies", "late", nil, document[:32<<10]); status != http.StatusTooManyRequests {
			t.Errorf("%s: a large request more: got %d, want 429", door, status)
		}
	}
	close(rest)
	for range room {
		if a := <-answers; a.err != nil || a.status != http.StatusUnprocessableEntity {
			t.Errorf("who found room: got %d, %v, want 422: it is no document", a.status, a.err)
		}
	}
	// And then there is room again.
	if status := k.knock(t, doorPackager, "speke", "movies", "again", spekeHeader("2.0"), document); status != http.StatusUnprocessableEntity {
		t.Errorf("afterwards: got %d, want 422", status)
	}
}

// heldBack is the end of a body, which comes when its channel is closed.
type heldBack struct{ until chan struct{} }

func (h heldBack) Read([]byte) (int, error) {
	<-h.until
	return 0, io.EOF
}

func liveHeap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
