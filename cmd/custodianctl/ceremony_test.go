package main

import (
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"github.com/ThalesIgnite/crypto11"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/softhsm"
)

// fill expands $NAME in files.
func fill(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(os.Expand(ts.ReadFile(name), ts.Getenv)), 0o600))
	}
}

// genesisPlan is the plan of assemble; testdata/script/ceremony-genesis.txtar
// shows each step that is taken here. Its grants are those of the configuration
// that custodiand dev makes, so that a reload is not refused.
const genesisPlan = `plan: custodian/1
kind: genesis
reason: the first day
expires: $TOMORROW
genesis: {mek_profile: sealed, nonce: $NONCE}
officers:
- {name: anna, key: "$ANNA"}
- {name: ben, key: "$BEN"}
- {name: cleo, key: "$CLEO"}
quorum: {default: 2}
recovery:
  quorum: 2
  keys:
  - {name: rita, key: "$RITA"}
  - {name: ron, key: "$RON"}
grants:
- {identity: spiffe://dev.custodian.internal/packager, role: packager, categories: ["*"]}
- {identity: spiffe://dev.custodian.internal/drm-provider, role: drm-provider, categories: ["*"]}
- {identity: spiffe://dev.custodian.internal/officer, role: officer, categories: ["*"], spki: $SPKI}
- {identity: spiffe://dev.custodian.internal/operator, role: operator, categories: ["*"]}
- {identity: spiffe://dev.custodian.internal/auditor, role: auditor, categories: ["*"]}
- {identity: spiffe://dev.custodian.internal/event-source, role: event-source, categories: ["*"]}
`

func assemble(ts *testscript.TestScript, _ bool, _ []string) {
	var trust strings.Builder
	for _, name := range []string{"anna", "ben", "cleo", "rita", "ron"} {
		ts.Check(ts.Exec("custodianctl", "ceremony", "keygen", "--out", name+".key", "--ed25519="+map[bool]string{true: "true", false: "false"}[name == "ben"]))
		trust.WriteString(ts.ReadFile("stdout"))
		ts.Check(ts.Exec("custodianctl", "ceremony", "key", "--officer-key", name+".key", "--json"))
		var o custodian.Officer
		ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &o))
		ts.Setenv(strings.ToUpper(name), o.Key)
	}
	ts.Check(os.WriteFile(ts.MkAbs("officers.pem"), []byte(trust.String()), 0o600))
	ts.Check(ts.Exec(daemon, "dev", "-dir", "dev", "-provision"))
	ts.Check(ts.Exec("custodianctl", "pki", "show", "dev/pki/officer.pem", "--json"))
	keep(ts, false, []string{"SPKI", "spki_sha256"})
	nonce := make([]byte, 32)
	_, err := rand.Read(nonce)
	ts.Check(err)
	ts.Setenv("NONCE", hex.EncodeToString(nonce))
	ts.Check(os.WriteFile(ts.MkAbs("genesis.yaml"), []byte(genesisPlan), 0o600))
	fill(ts, false, []string{"genesis.yaml"})
	init := []string{"init", "-config", "dev/custodiand.yaml", "-plan", "genesis.yaml"}
	for _, name := range []string{"anna", "ben", "cleo"} {
		ts.Check(ts.Exec("custodianctl", "ceremony", "sign", "genesis.yaml", "--officer-key", name+".key", "--out", name+".sig"))
		init = append(init, "-approval", name+".sig")
	}
	ts.Check(ts.Exec(daemon, init...))
}

// card makes a token in a SoftHSM of its own, as the smart card of a person.
func card(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: card NAME")
	}
	token, err := softhsm.Provision(context.Background(), softhsm.Options{Dir: ts.MkAbs("card-" + args[0]), Label: args[0]})
	ts.Check(err)
	pin, err := os.ReadFile(token.PINFile)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]+".pin"), pin, 0o600))
	ts.Check(os.Setenv("SOFTHSM2_CONF", token.ConfigFile)) // read once by the module in this process
	c, err := crypto11.Configure(&crypto11.Config{Path: token.Module, TokenLabel: args[0], Pin: strings.TrimSpace(string(pin))})
	ts.Check(err)
	defer c.Close()
	_, err = c.GenerateECDSAKeyPairWithLabel([]byte{1}, []byte("sign"), elliptic.P256())
	ts.Check(err)
	ts.Setenv("CARD", token.Module)
	ts.Setenv("SOFTHSM2_CONF", filepath.Clean(token.ConfigFile))
}
