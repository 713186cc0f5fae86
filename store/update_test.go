package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/store"
)

// hold makes an update hold the writer until the returned function is called,
// which returns the result of that update.
func hold(t *testing.T, s *store.Store) (release func() error) {
	t.Helper()
	holds, goOn, result := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		result <- s.Update(t.Context(), func(tx custodian.UpdateTx) error {
			close(holds)
			<-goOn
			return tx.PutCursor("hold", []byte{1})
		})
	}()
	<-holds
	return func() error {
		close(goOn)
		return <-result
	}
}

var errRefused = errors.New("refused")

// TestNeighbours lets updates of every outcome share one transaction: they
// all wait while another one holds the writer.
func TestNeighbours(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.db")
	s := create(t, path)
	release := hold(t, s)
	const n = 60
	results := make([]error, n)
	panics := make([]any, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			defer func() { panics[i] = recover() }()
			results[i] = s.Update(t.Context(), func(tx custodian.UpdateTx) error {
				if err := tx.InsertContentKey(benchKey(uint32(i))); err != nil {
					return err
				}
				switch i % 3 {
				case 1:
					return errRefused
				case 2:
					panic(i)
				}
				return nil
			})
		})
	}
	// Their order does not matter, but that they wait does.
	time.Sleep(50 * time.Millisecond)
	if err := release(); err != nil {
		t.Errorf("the update that held the writer: %v", err)
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	for i := range n {
		wantKept := i%3 == 0
		switch {
		case wantKept && (results[i] != nil || panics[i] != nil):
			t.Errorf("update %d: got %v, panic %v, want none", i, results[i], panics[i])
		case i%3 == 1 && !errors.Is(results[i], errRefused):
			t.Errorf("update %d: got %v, want %v", i, results[i], errRefused)
		case i%3 == 2 && panics[i] != i:
			t.Errorf("update %d: got panic %v, want its own", i, panics[i])
		}
		err := s.View(t.Context(), func(tx custodian.Tx) error {
			_, err := tx.ContentKey(benchKid(uint32(i)))
			return err
		})
		if kept := err == nil; kept != wantKept {
			t.Errorf("key of update %d: got %v, want kept %v", i, err, wantKept)
		}
	}
	stats, err := s.Stats(t.Context())
	if err != nil || stats.ContentKeys != n/3 || stats.Sequence != n/3 {
		t.Errorf("stats: got %+v, %v, want %d keys at sequence %d", stats, err, n/3, n/3)
	}
}

// TestWithdraw: an update whose context ends while it waits never runs.
func TestWithdraw(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	release := hold(t, s)
	var waiting []chan error
	var cancels []context.CancelFunc
	for i := range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		waiting, cancels = append(waiting, result), append(cancels, cancel)
		go func() {
			result <- s.Update(ctx, func(tx custodian.UpdateTx) error { return tx.InsertContentKey(benchKey(uint32(i))) })
		}()
	}
	for i, cancel := range cancels {
		if i%2 == 0 {
			cancel()
			if err := <-waiting[i]; !errors.Is(err, context.Canceled) {
				t.Errorf("update %d: got %v, want %v", i, err, context.Canceled)
			}
		}
	}
	if err := release(); err != nil {
		t.Errorf("the update that held the writer: %v", err)
	}
	for i, cancel := range cancels {
		if i%2 == 1 {
			if err := <-waiting[i]; err != nil {
				t.Errorf("update %d: %v", i, err)
			}
			cancel()
		}
	}
	if stats, err := s.Stats(t.Context()); err != nil || stats.ContentKeys != 10 {
		t.Errorf("stats: got %+v, %v, want 10 content keys", stats, err)
	}
}

// TestGoexit: a function that ends its goroutine takes nothing with it but
// the transaction, and nobody waits for ever.
func TestGoexit(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err := s.Update(t.Context(), func(tx custodian.UpdateTx) error {
			if err := tx.InsertContentKey(benchKey(1)); err != nil {
				t.Errorf("insert: %v", err)
			}
			runtime.Goexit()
			return nil
		})
		t.Errorf("update returned %v", err)
	}()
	<-ended
	seed(t, s, 2, 1, 1)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	if stats, err := s.Stats(t.Context()); err != nil || stats.ContentKeys != 1 {
		t.Errorf("stats: got %+v, %v, want 1 content key", stats, err)
	}
}

// TestNestedFunctions: the caller's functions may use the transaction in the
// midst of a listing, and their panics stay their own.
func TestNestedFunctions(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	seed(t, s, 0, 12, 12)
	func() {
		defer func() {
			if p := recover(); p != "mine" {
				t.Errorf("panic: got %v, want the caller's", p)
			}
		}()
		err := s.View(t.Context(), func(tx custodian.Tx) error {
			return tx.ContentKeys("movies", nil, nil, 100, func(k custodian.SealedKey) error {
				return tx.ContentKeys("movies", k.Key.ContentID, nil, 100, func(k custodian.SealedKey) error {
					if _, err := tx.ContentKey(k.Key.KID); err != nil {
						return err
					}
					panic("mine")
				})
			})
		})
		t.Errorf("view returned %v", err)
	}()
	if err := s.Close(); err != nil {
		t.Errorf("close after a panic in a view: %v", err)
	}
}

// TestWriteInView: a read transaction that is taken for an update refuses.
func TestWriteInView(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	err := s.View(t.Context(), func(tx custodian.Tx) error {
		u, ok := tx.(custodian.UpdateTx)
		if !ok {
			return nil
		}
		return u.PutCursor("rewrap", []byte{1})
	})
	if err == nil {
		t.Error("a write in a read transaction: no error")
	}
}

// TestGrowBesideBackup: a backup that stands still for long keeps neither
// readers nor writers waiting, although the file grows meanwhile.
func TestGrowBesideBackup(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	seed(t, s, 0, 100, 100)
	r, w := io.Pipe()
	result := make(chan error, 1)
	go func() {
		err := s.Backup(t.Context(), w)
		result <- errors.Join(err, w.Close())
	}()
	var copied bytes.Buffer
	if _, err := io.CopyN(&copied, r, 1); err != nil {
		t.Fatal(err)
	}
	seed(t, s, 100, 20_000, 5_000)
	err := s.View(t.Context(), func(tx custodian.Tx) error {
		_, err := tx.ContentKey(benchKid(20_000))
		return err
	})
	if err != nil {
		t.Errorf("read beside a backup: %v", err)
	}
	if _, err := io.Copy(&copied, r); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err != nil {
		t.Fatalf("backup: %v", err)
	}
	restored := open(t, write(t, copied.Bytes()))
	if err := restored.Check(t.Context()); err != nil {
		t.Errorf("check of the backup: %v", err)
	}
	if stats, err := restored.Stats(t.Context()); err != nil || stats.ContentKeys != 100 {
		t.Errorf("stats of the backup: got %+v, %v, want 100 content keys", stats, err)
	}
}

// TestCloseWaits: Close lets open transactions end.
func TestCloseWaits(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	release := hold(t, s)
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	select {
	case err := <-closed:
		t.Errorf("close returned %v with an update open", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := release(); err != nil {
		t.Errorf("the update that was open: %v", err)
	}
	if err := <-closed; err != nil {
		t.Errorf("close: %v", err)
	}
}

// TestBatchedRace compares the outcome of many updates at once with what
// each was told.
func TestBatchedRace(t *testing.T) {
	s := create(t, filepath.Join(t.TempDir(), "keys.db"))
	var mu sync.Mutex
	told := map[custodian.KID]bool{}
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 30 {
				// Every key is tried by four workers.
				k := benchKey(uint32(w/4*1000 + i))
				err := s.Update(t.Context(), func(tx custodian.UpdateTx) error { return tx.InsertContentKey(k) })
				if err != nil && !errors.Is(err, custodian.ErrNaturalKey) {
					t.Errorf("update: %v", err)
				}
				mu.Lock()
				if err == nil && told[k.Key.KID] {
					t.Errorf("%s inserted twice", k.Key.KID)
				}
				told[k.Key.KID] = told[k.Key.KID] || err == nil
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for kid, ok := range told {
		if !ok {
			t.Errorf("%s: nobody was told that he inserted it", kid)
		}
	}
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	if stats, err := s.Stats(t.Context()); err != nil || stats.ContentKeys != uint64(len(told)) || stats.Sequence != uint64(len(told)) {
		t.Errorf("stats: got %+v, %v, want %s", stats, err, fmt.Sprint(len(told)))
	}
}
