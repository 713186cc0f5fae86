// Package testservers builds and runs the real servers that Custodian's tests
// talk to. Each server's module files lie in a folder of their own here (vault/),
// a module apart, so that none of its dependencies reach the product's go.mod;
// this package only calls the go command on them and starts what it built.
//
// It decides how a server is built, started and prepared. What a test does with
// it is the test's own business. Nothing of the product imports this package.
package testservers

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// lockPoll is how often a process that waits for another one's build looks
// again; buildNews is how often a build that takes minutes says that it goes on.
const (
	lockPoll  = 200 * time.Millisecond
	buildNews = 30 * time.Second
)

// EnsureVault returns the path of the Vault server program. The first call on a
// machine builds it, which takes minutes; it lies then in the user's cache
// folder, under the hash of vault/go.sum, and later calls return at once. Two
// processes never build at the same time: the second waits for the first.
//
// The working directory must be inside a checkout of Custodian, as it is for
// every test. The function log hears a line when something takes long; it may
// be nil.
func EnsureVault(ctx context.Context, log func(string)) (string, error) {
	if log == nil {
		log = func(string) {}
	}
	source, err := moduleDir("vault")
	if err != nil {
		return "", err
	}
	cache, err := cacheDir(source)
	if err != nil {
		return "", err
	}
	binary := filepath.Join(cache, "vault")
	if built(binary) {
		return binary, nil
	}

	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("build vault: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(cache, "lock"), log)
	if err != nil {
		return "", fmt.Errorf("build vault: %w", err)
	}
	defer unlock()
	if built(binary) { // by the process that we have waited for
		return binary, nil
	}
	if err := buildVault(ctx, source, binary, log); err != nil {
		return "", err
	}
	return binary, nil
}

// moduleDir finds testservers/name in the checkout around the working directory.
func moduleDir(name string) (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find testservers/%s: %w", name, err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		candidate := filepath.Join(dir, "testservers", name)
		if _, err := os.Stat(filepath.Join(candidate, "go.sum")); err == nil {
			return candidate, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("find testservers/%s: %s is not inside a checkout of custodian", name, start)
		}
	}
}

// cacheDir names the folder for what the module in source builds. It depends on
// go.sum, so that a new version of the server gets a folder of its own.
func cacheDir(source string) (string, error) {
	user, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w", err)
	}
	sums, err := os.ReadFile(filepath.Join(source, "go.sum"))
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w", err)
	}
	hash := sha256.Sum256(sums)
	return filepath.Join(user, "custodian-testservers", hex.EncodeToString(hash[:])), nil
}

// built says whether binary is there. Builds are renamed into place when they
// are whole, so a file that exists is a finished one.
func built(binary string) bool {
	info, err := os.Stat(binary)
	return err == nil && info.Mode().IsRegular()
}

// lock takes the advisory lock on path. The kernel drops it when a process ends,
// so a killed build locks nobody out.
func lock(ctx context.Context, path string, log func(string)) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	said := false
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if !said {
			log("another process builds the same server: waiting for it")
			said = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: another process holds it: %w", path, context.Cause(ctx))
		case <-time.After(lockPoll):
		}
	}
}

// buildVault builds the official server with its own "minimal" tag: transit, kv,
// pki, AppRole and certificate logins, inmem and raft storage, the whole CLI.
func buildVault(ctx context.Context, source, binary string, log func(string)) error {
	log("building the Vault test server: once per machine, about six minutes on two cores")
	begin := time.Now()
	partial := binary + ".partial"
	defer os.Remove(partial)

	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", "build", "-mod=readonly", "-buildvcs=false",
		"-tags", "minimal", "-trimpath", "-ldflags=-s -w", "-o", partial, "github.com/hashicorp/vault")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	cmd.Stdout, cmd.Stderr = &out, &out
	// The compilers that go starts share its output pipe; they must not make
	// Wait outlive a cancelled context.
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("build vault in %s: %w", source, err)
	}

	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	news := time.NewTicker(buildNews)
	defer news.Stop()
	for {
		select {
		case <-news.C:
			log(fmt.Sprintf("still building Vault: %s", time.Since(begin).Round(time.Second)))
		case err := <-done:
			if err != nil {
				return fmt.Errorf("build vault in %s: %s: %w", source, lastLines(out.Bytes(), 15), err)
			}
			if err := os.Rename(partial, binary); err != nil {
				return fmt.Errorf("build vault: %w", err)
			}
			log(fmt.Sprintf("Vault is built: %s", time.Since(begin).Round(time.Second)))
			return nil
		}
	}
}

// lastLines returns the last n lines of out, for an error message.
func lastLines(out []byte, n int) string {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return string(bytes.Join(lines, []byte("\n")))
}
