package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/keycustody/custodian/certs"
	"github.com/keycustody/custodian/custodian"
)

// heedHangups reloads at each SIGHUP until ctx ends, whether there is service
// yet or not.
func (d *daemon) heedHangups(ctx context.Context, hup <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			if err := d.reload(ctx); err != nil {
				d.log.Error("reload: the last good configuration stays", "err", err)
			} else {
				d.log.Info("reloaded grants, budgets, signers, recipients and certificates")
			}
		}
	}
}

// reload takes grants, rules, budgets, signers, recipients, sealing and certificates anew.
// Everything else of the file needs a restart, and the log says what of it has
// changed.
func (d *daemon) reload(ctx context.Context) error {
	if err := d.certs.Reload(); err != nil {
		return err
	}
	c, err := LoadConfig(d.path)
	if err != nil {
		return err
	}
	if err := certs.CheckCAs(c.serverCerts(d.log).CAs); err != nil {
		return fmt.Errorf("config %s: tls.client_cas: %w", d.path, err)
	}
	signers, err := c.Packagers.signers()
	if err != nil {
		return fmt.Errorf("config %s: %w", d.path, err)
	}
	speke, recipients, err := c.CPIX.load()
	if err != nil {
		return fmt.Errorf("config %s: %w", d.path, err)
	}
	keys, err := restartKeys(d.config, c)
	if err != nil {
		return fmt.Errorf("config %s: compare with the one in force: %w", d.path, err)
	}
	next, err := c.policy(nil) // that of a restart, which may be refused for what is not taken now
	if err != nil {
		return err
	}
	c.Tokens = d.config.Tokens // until the restart that the log asks for
	policy, err := c.policy(d.tokenKeys)
	if err != nil {
		return err
	}
	if len(keys) > 0 {
		d.log.Warn("what has changed in the configuration beside grants, rules, budgets, signers, cpix and sealing is not in force before a restart", "keys", strings.Join(keys, " "))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.adopted {
		if err := d.custody.MayLoad(ctx, next); err != nil {
			return err
		}
		if err := d.custody.SetPolicy(ctx, policy); errors.Is(err, custodian.ErrConditions) {
			return fmt.Errorf("config %s has what the officers have signed, but tokens are taken at a start only: restart custodiand: %w", d.path, err)
		} else if err != nil {
			return err
		}
	}
	d.policy = policy
	d.exports.Set(recipients)
	if d.packagers != nil {
		d.packagers.SetSPEKE(speke)
		return d.packagers.SetSigners(signers)
	}
	return nil
}

// adopt gives a custody that was opened with the policy the one that was loaded
// meanwhile, if there is one. From here on, reload does.
func (d *daemon) adopt(ctx context.Context, opened *custodian.Policy) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.policy != opened {
		// Where officers decide, another policy is refused and written down, and theirs stays.
		if err := d.custody.SetPolicy(ctx, d.policy); err != nil && !errors.Is(err, custodian.ErrQuorum) {
			return err
		}
	}
	d.adopted = true
	return nil
}

func (d *daemon) lastPolicy() *custodian.Policy {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.policy
}

// restartKeys names the keys that differ between two configurations, but for
// those that are taken without a restart.
func restartKeys(inForce, loaded *Config) ([]string, error) {
	was, err := tree(inForce)
	if err != nil {
		return nil, err
	}
	is, err := tree(loaded)
	if err != nil {
		return nil, err
	}
	for _, t := range []map[string]any{was, is} {
		delete(t, "grants")
		delete(t, "cpix")
		delete(t, "sealing")
		delete(t, "policy")
		delete(t, "budgets")
		if packagers, ok := t["packagers"].(map[string]any); ok {
			delete(packagers, "signers")
		}
	}
	return changedKeys("", was, is), nil
}

// tree is a configuration by the names of its keys.
func tree(c *Config) (map[string]any, error) {
	raw, err := yaml.Marshal(c)
	if err != nil {
		return nil, err
	}
	var t map[string]any
	return t, yaml.Unmarshal(raw, &t)
}

// changedKeys names the smallest parts that differ between two trees, or a list
// as a whole where its length does.
func changedKeys(key string, was, is any) []string {
	if reflect.DeepEqual(was, is) {
		return nil
	}
	var changed []string
	switch was := was.(type) {
	case map[string]any:
		is, ok := is.(map[string]any)
		if !ok {
			break
		}
		all := maps.Clone(was)
		maps.Copy(all, is)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			changed = append(changed, changedKeys(strings.TrimPrefix(key+"."+name, "."), was[name], is[name])...)
		}
		return changed
	case []any:
		is, ok := is.([]any)
		if !ok || len(is) != len(was) {
			break
		}
		for i := range was {
			changed = append(changed, changedKeys(fmt.Sprintf("%s[%d]", key, i), was[i], is[i])...)
		}
		return changed
	}
	return []string{key}
}
