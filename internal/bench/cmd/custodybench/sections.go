package main

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
)

// prepare makes a custody with keys in it, in a child.
func (r *rig) prepare(ctx context.Context, dir string, keys int) (seeded, error) {
	var s seeded
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return s, err
	}
	err := call(ctx, &s, rolePrepare, "-dir", dir, "-keys", strconv.Itoa(keys))
	return s, err
}

// callback is the speed of the callback beside that of the echoes.
func (r *rig) callback(ctx context.Context) error {
	data := filepath.Join(r.dir, "callback")
	if _, err := r.prepare(ctx, data, r.scale.keys); err != nil {
		return err
	}
	appendDir := filepath.Join(r.dir, "echo-append")
	if err := os.Mkdir(appendDir, 0o700); err != nil {
		return err
	}
	echo, err := r.serve(ctx, roleEcho, "echo")
	if err != nil {
		return err
	}
	tuned, err := r.serve(ctx, roleEcho, "echo-tuned", "-tuned")
	if err != nil {
		return err
	}
	echoAppend, err := r.serve(ctx, roleEchoAppend, "echo-append", "-dir", appendDir)
	if err != nil {
		return err
	}
	real, err := r.serve(ctx, roleCallback, "callback", "-dir", data)
	if err != nil {
		return err
	}
	unsignedData := filepath.Join(r.dir, "callback-unsigned")
	if _, err := r.prepare(ctx, unsignedData, r.scale.keys); err != nil {
		return err
	}
	unsigned, err := r.serve(ctx, roleCallback, "callback-unsigned", "-dir", unsignedData, "-unsigned")
	if err != nil {
		return err
	}
	kids := kidsFile(data)
	runs := []comparison{
		{"echo", "_c32", echo, loadSpec{methodRetrieve, 32, 1, kids}},
		{"callback", "_c32", real, loadSpec{methodRetrieve, 32, 1, kids}},
		{"echo", "_c128", echo, loadSpec{methodRetrieve, 128, 1, kids}},
		{"tuned_echo", "_c128", tuned, loadSpec{methodRetrieve, 128, 1, kids}},
		{"echo_append", "_c128", echoAppend, loadSpec{methodRetrieve, 128, 1, kids}},
		{"callback", "_c128", real, loadSpec{methodRetrieve, 128, 1, kids}},
		{"callback_unsigned", "_c128", unsigned, loadSpec{methodRetrieve, 128, 1, kidsFile(unsignedData)}},
		{"callback_8kid", "_c128", real, loadSpec{methodRetrieve, 128, 8, kids}},
	}
	if r.memory == "" {
		note("no tmpfs at %s: no callback_vs_echo_c128_tmpfs", shm)
	} else {
		data := filepath.Join(r.memory, "callback")
		if _, err := r.prepare(ctx, data, r.scale.keys); err != nil {
			return err
		}
		memory, err := r.serve(ctx, roleCallback, "callback-tmpfs", "-dir", data)
		if err != nil {
			return err
		}
		runs = append(runs, comparison{"callback_tmpfs", "_c128", memory, loadSpec{methodRetrieve, 128, 1, kidsFile(data)}})
	}
	for range r.scale.rounds {
		if err := r.callbackRound(ctx, runs, filepath.Join(r.dir, "token")); err != nil {
			return err
		}
	}
	return r.stopAll()
}

// A comparison is one of the runs of a round. Its figures are named name,
// _per_s, _p50_us and so on, and suffix.
type comparison struct {
	name, suffix string
	server       *server
	spec         loadSpec
}

func (r *rig) callbackRound(ctx context.Context, runs []comparison, tokenDir string) error {
	got := map[string]loadResult{}
	for _, c := range runs {
		l, err := r.load(ctx, c.server, c.spec)
		if err != nil {
			return err
		}
		got[c.name+c.suffix] = l
		r.table.add(c.name+"_per_s"+c.suffix, l.callsPerSecond())
		r.table.add(c.name+"_p50_us"+c.suffix, l.P50)
		r.table.add(c.name+"_p99_us"+c.suffix, l.P99)
	}
	var decrypts float64
	if err := call(ctx, &decrypts, roleToken, "-dir", tokenDir, "-time", (r.scale.time / 2).String()); err != nil {
		return err
	}
	r.table.add("token_decrypt_per_s", decrypts)

	ratio := func(name, of, to string) {
		r.table.add(name, got[of].callsPerSecond()/got[to].callsPerSecond())
	}
	ratio("callback_vs_echo_c32", "callback_c32", "echo_c32")
	ratio("callback_vs_echo_c128", "callback_c128", "echo_c128")
	ratio("callback_vs_echo_c128_unsigned", "callback_unsigned_c128", "echo_c128")
	ratio("callback_vs_tuned_echo_c128", "callback_c128", "tuned_echo_c128")
	ratio("callback_vs_echo_append_c128", "callback_c128", "echo_append_c128")
	if _, ok := got["callback_tmpfs_c128"]; ok {
		ratio("callback_vs_echo_c128_tmpfs", "callback_tmpfs_c128", "echo_c128")
	}
	one, eight := got["callback_c128"], got["callback_8kid_c128"]
	r.table.add("keys_per_s_8kid", eight.keysPerSecond())
	r.table.add("keys_per_s_8kid_vs_1kid", eight.keysPerSecond()/one.keysPerSecond())
	r.table.add("server_cpu_us_per_key", one.ServerCPU/float64(one.Keys))
	r.table.add("server_cpu_us_per_key_8kid", eight.ServerCPU/float64(eight.Keys))
	for _, c := range []string{"echo", "tuned_echo", "echo_append"} {
		l := got[c+"_c128"]
		r.table.add(c+"_server_cpu_us_per_call", l.ServerCPU/float64(l.Calls))
	}
	r.table.add("client_cpu_us_per_call", one.ClientCPU/float64(one.Calls))
	r.table.add("echo_client_cpu_us_per_call", got["echo_c128"].ClientCPU/float64(got["echo_c128"].Calls))
	r.table.add("callback_response_bytes", float64(one.ResponseBytes))
	r.table.add("echo_response_bytes", float64(got["echo_c128"].ResponseBytes))
	return nil
}

// issue is the speed at which new content keys are made and stored.
func (r *rig) issue(ctx context.Context) error {
	data := filepath.Join(r.dir, "issue")
	if _, err := r.prepare(ctx, data, 1); err != nil {
		return err
	}
	s, err := r.serve(ctx, roleCallback, "issue", "-dir", data)
	if err != nil {
		return err
	}
	for range r.scale.rounds {
		for _, c := range []comparison{
			{"issue", "", s, loadSpec{method: methodIssue, inFlight: 32, batch: 1}},
			{"issue", "_batch50", s, loadSpec{method: methodIssue, inFlight: 8, batch: 50}},
		} {
			l, err := r.load(ctx, c.server, c.spec)
			if err != nil {
				return err
			}
			r.table.add("issue_ceks_per_s"+c.suffix, l.keysPerSecond())
			r.table.add("issue_p50_us"+c.suffix, l.P50)
			r.table.add("issue_p99_us"+c.suffix, l.P99)
		}
	}
	return r.stopAll()
}

// million is how the callback does with a big store.
func (r *rig) million(ctx context.Context) error {
	small, big := filepath.Join(r.dir, "small"), filepath.Join(r.dir, "big")
	if _, err := r.prepare(ctx, small, r.scale.keys); err != nil {
		return err
	}
	made, err := r.prepare(ctx, big, r.scale.million)
	if err != nil {
		return err
	}
	r.table.add("seeded_keys", float64(made.Keys))
	r.table.add("seed_ceks_per_s", float64(made.Keys)/made.Seconds)
	smallServer, err := r.serve(ctx, roleCallback, "small", "-dir", small)
	if err != nil {
		return err
	}
	bigServer, err := r.serve(ctx, roleCallback, "big", "-dir", big)
	if err != nil {
		return err
	}
	for range r.scale.rounds {
		few, err := r.load(ctx, smallServer, loadSpec{methodRetrieve, 32, 1, kidsFile(small)})
		if err != nil {
			return err
		}
		many, err := r.load(ctx, bigServer, loadSpec{methodRetrieve, 32, 1, kidsFile(big)})
		if err != nil {
			return err
		}
		r.table.add("retrieve_p50_us_10k", few.P50)
		r.table.add("retrieve_p50_us_1m", many.P50)
		r.table.add("retrieve_p50_1m_vs_10k", many.P50/few.P50)
		bytes, err := bigServer.anonymous()
		if err != nil {
			return err
		}
		r.table.add("rss_anon_mb_1m", bytes/1e6)
	}
	return r.stopAll()
}
