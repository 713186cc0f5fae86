package kms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/hashicorp/vault/api"

	"github.com/keycustody/custodian/custodian"
)

// login logs in by the method that is configured.
func (v *vault) login(ctx context.Context) (*session[*api.Client], error) {
	switch v.method {
	case "token_file":
		return v.byTokenFile(ctx)
	case "cert":
		return v.by(ctx, v.c.Cert.Mount, map[string]any{"name": v.c.Cert.Role})
	case "kubernetes":
		return v.byKubernetes(ctx)
	}
	return v.byAppRole(ctx)
}

func (v *vault) byAppRole(ctx context.Context) (*session[*api.Client], error) {
	role, err := readSecretLine(v.c.AppRole.RoleIDFile)
	if err != nil {
		return nil, err
	}
	secret, err := readSecretLine(v.c.AppRole.SecretIDFile)
	if err != nil {
		return nil, err
	}
	return v.by(ctx, v.c.AppRole.Mount, map[string]any{"role_id": role, "secret_id": secret})
}

func (v *vault) byKubernetes(ctx context.Context) (*session[*api.Client], error) {
	jwt, err := readSecretLine(v.c.Kubernetes.JWTFile)
	if err != nil {
		return nil, err
	}
	return v.by(ctx, v.c.Kubernetes.Mount, map[string]any{"role": v.c.Kubernetes.Role, "jwt": jwt})
}

// by logs in with the auth method at mount.
func (v *vault) by(ctx context.Context, mount string, body map[string]any) (*session[*api.Client], error) {
	client, err := v.client("")
	if err != nil {
		return nil, err
	}
	begin := v.now()
	answer, err := client.Logical().WriteWithContext(ctx, "auth/"+mount+"/login", body)
	if err != nil {
		return nil, err
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return nil, errors.New("the answer has no token")
	}
	client.SetToken(answer.Auth.ClientToken)
	return lasting(&session[*api.Client]{client: client}, begin, int64(answer.Auth.LeaseDuration)), nil
}

// byTokenFile takes the token of the file and asks Vault about it. The answer
// needs Vault's default policy: a token without it is used all the same, but
// no refusal counts as proved then, because a dead token looks no different.
func (v *vault) byTokenFile(ctx context.Context) (*session[*api.Client], error) {
	token, err := readSecretLine(v.c.TokenFile)
	if err != nil {
		return nil, err
	}
	client, err := v.client(token)
	if err != nil {
		return nil, err
	}
	begin := v.now()
	self, err := client.Logical().ReadWithContext(ctx, "auth/token/lookup-self")
	if forbidden(err) {
		doubt := fmt.Errorf("kms %s: log in to vault: the token of %s is refused: %w", v.name, v.c.TokenFile, custodian.ErrProviderLogin)
		return &session[*api.Client]{client: client, doubt: doubt}, nil
	}
	if err != nil {
		return nil, err
	}
	if self == nil {
		return nil, errors.New("the answer about the token is empty")
	}
	ttl, ok := self.Data["ttl"].(json.Number)
	if !ok {
		return nil, errors.New("the answer about the token has no ttl")
	}
	seconds, err := ttl.Int64()
	if err != nil {
		return nil, errors.New("the answer about the token has no ttl")
	}
	if renewable, _ := self.Data["renewable"].(bool); renewable && seconds > 0 {
		// Best effort: the token is good for what is left of it.
		if renewed, err := client.Logical().WriteWithContext(ctx, "auth/token/renew-self", nil); err == nil && renewed != nil && renewed.Auth != nil {
			seconds = int64(renewed.Auth.LeaseDuration)
		}
	}
	return lasting(&session[*api.Client]{client: client}, begin, seconds), nil
}

// refusal is a failed login in a sentence. Whatever the reason, it is an
// outage: only a call that is forbidden after a good login is a denial.
func (v *vault) refusal(err error) error {
	answer := answerOf(err)
	switch {
	case answer == nil:
		return fmt.Errorf("kms %s: log in to vault: %w: %w", v.name, custodian.ErrProviderUnavailable, err)
	case answer.StatusCode == http.StatusTooManyRequests:
		return fmt.Errorf("kms %s: log in to vault: %s: %w", v.name, says(answer), custodian.ErrProviderThrottled)
	case refused(answer):
		return fmt.Errorf("kms %s: log in to vault: %s: %w", v.name, says(answer), custodian.ErrProviderLogin)
	}
	return fmt.Errorf("kms %s: log in to vault: %s: %w", v.name, says(answer), custodian.ErrProviderUnavailable)
}

func (v *vault) refused(err error) bool {
	answer := answerOf(err)
	return answer != nil && refused(answer)
}

func refused(answer *api.ResponseError) bool {
	return !answer.RawError && (answer.StatusCode == http.StatusBadRequest || answer.StatusCode == http.StatusForbidden)
}
