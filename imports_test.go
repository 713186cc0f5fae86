// Package house_test holds the directions of imports that docs/DESIGN.md
// lays down.
package house_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/keycustody/custodian"

// A goPackage is what go list says of one package; tests are not in it.
type goPackage struct {
	ImportPath string
	Imports    []string // its own
	Deps       []string // and theirs
}

// A rule says what packages may import.
type rule struct {
	// pkg is a folder, or with "/..." a folder and all below it.
	pkg string
	// ours are the packages of this module that it may import; "*" is every
	// package but test kits.
	ours []string
	// never are the packages, ours or not, that it may not even depend on by
	// way of others. Test kits are among them for all but test kits.
	never []string
}

// testKits serve tests only. What is shipped does not depend on them.
var testKits = []string{"custodian/custodiantest", "testservers", "internal/bench", "softhsm/fault"}

// sdks are what the domain leaves to others.
var sdks = []string{
	"google.golang.org/grpc/...", "google.golang.org/protobuf/...", "google.golang.org/genproto/...",
	"github.com/miekg/pkcs11/...", "github.com/ThalesIgnite/...", "go.etcd.io/...", "github.com/hashicorp/...",
	"github.com/aws/...", "cloud.google.com/...", "github.com/prometheus/...", "github.com/spf13/...", "github.com/twmb/...", "net/http/...", "C",
}

// house are the rules; the first that fits a package is its rule.
var house = []rule{
	{pkg: "api/..."},
	{pkg: "certs"},
	{pkg: "internal/anchor", ours: []string{"custodian", "internal/checkpoint"}, never: []string{"google.golang.org/grpc/...", "github.com/prometheus/..."}},
	{pkg: "internal/kafka", ours: []string{"custodian", "internal/anchor"}, never: []string{"google.golang.org/grpc/...", "github.com/prometheus/..."}},
	{pkg: "internal/secret"},
	{pkg: "internal/admission"},
	{pkg: "internal/checkpoint"},
	{pkg: "internal/sealing"},
	{pkg: "internal/audit", ours: []string{"internal/checkpoint"}},
	{pkg: "hsm", ours: []string{"internal/admission", "internal/secret"}},
	{pkg: "custodian", ours: []string{"internal/admission", "internal/audit", "internal/checkpoint", "internal/sealing", "internal/secret"}, never: sdks},
	{pkg: "custodian/custodiantest", ours: []string{"custodian"}},
	{pkg: "store", ours: []string{"custodian"}},
	{pkg: "kms", ours: []string{"custodian", "hsm"}},
	{pkg: "softhsm", ours: []string{"hsm", "internal/secret"}},
	{pkg: "softhsm/fault"},
	{pkg: "client", ours: []string{"api/...", "certs", "internal/checkpoint", "internal/sealing"}},
	{pkg: "internal/rpc", ours: []string{"custodian", "api/...", "certs", "internal/secret"}},
	{pkg: "internal/packager", ours: []string{"custodian", "internal/rpc"}},
	{pkg: "internal/bench/...", ours: []string{"*", "custodian/custodiantest", "testservers", "softhsm/fault", "internal/bench"}},
	{pkg: "cmd/custodiand", ours: []string{"*"}, never: []string{"testing/..."}},
	{pkg: "cmd/custodianctl", ours: []string{"client", "api/...", "certs", "custodian", "internal/anchor", "internal/audit", "internal/checkpoint", "internal/packager", "hsm"}, never: []string{"testing/..."}},
	{pkg: "testservers/...", ours: []string{"testservers"}},
}

// violations names every import that the house does not allow, and every
// package that has no place in it.
func violations(packages []goPackage) []string {
	var found []string
	for _, p := range packages {
		pkg, ours := strings.CutPrefix(p.ImportPath, module+"/")
		if !ours {
			found = append(found, p.ImportPath+" has no place in the house")
			continue
		}
		i := slices.IndexFunc(house, func(r rule) bool { return matches(r.pkg, pkg) })
		if i < 0 {
			found = append(found, pkg+" has no place in the house")
			continue
		}
		r := house[i]
		for _, imported := range p.Imports {
			if to, ours := strings.CutPrefix(imported, module+"/"); ours && !r.allows(to) {
				found = append(found, pkg+" imports "+to)
			}
		}
		for _, dep := range p.Deps {
			if name := strings.TrimPrefix(dep, module+"/"); r.forbids(name) {
				found = append(found, pkg+" depends on "+name)
			}
		}
	}
	return found
}

func (r rule) allows(to string) bool {
	for _, pattern := range r.ours {
		if matches(pattern, to) || pattern == "*" && !isTestKit(to) {
			return true
		}
	}
	return false
}

func (r rule) forbids(dep string) bool {
	if isTestKit(dep) && !isTestKit(strings.TrimSuffix(r.pkg, "/...")) {
		return true
	}
	return slices.ContainsFunc(r.never, func(pattern string) bool { return matches(pattern, dep) })
}

func isTestKit(pkg string) bool {
	return slices.ContainsFunc(testKits, func(kit string) bool { return matches(kit+"/...", pkg) })
}

func matches(pattern, pkg string) bool {
	folder, all := strings.CutSuffix(pattern, "/...")
	return pkg == folder || all && strings.HasPrefix(pkg, folder+"/")
}

func TestImports(t *testing.T) {
	for _, v := range violations(listPackages(t)) {
		t.Error(v)
	}
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Imports,Deps", "./...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var packages []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		if p.ImportPath != module { // this folder, which holds this test only
			packages = append(packages, p)
		}
	}
	for _, must := range []string{"custodian", "store", "hsm", "cmd/custodiand"} {
		if !slices.ContainsFunc(packages, func(p goPackage) bool { return p.ImportPath == module+"/"+must && len(p.Imports) > 0 }) {
			t.Fatalf("go list does not show %s and its imports; the rules would hold of nothing", must)
		}
	}
	return packages
}

func TestViolations(t *testing.T) {
	for _, test := range []struct {
		pkg, imports string
		want         string // "": allowed
	}{
		{"custodian", "internal/audit", ""},
		{"custodian", "internal/secret", ""},
		{"custodian", "store", "custodian imports store"},
		{"custodian", "api/custodian/v1", "custodian imports api/custodian/v1"},
		{"custodian", "go.etcd.io/bbolt", "custodian depends on go.etcd.io/bbolt"},
		{"custodian", "google.golang.org/grpc", "custodian depends on google.golang.org/grpc"},
		{"custodian", "google.golang.org/grpc/codes", "custodian depends on google.golang.org/grpc/codes"},
		{"custodian", "github.com/miekg/pkcs11", "custodian depends on github.com/miekg/pkcs11"},
		{"custodian", "filippo.io/age", ""},
		{"custodian", "github.com/twmb/franz-go/pkg/kgo", "custodian depends on github.com/twmb/franz-go/pkg/kgo"},
		{"internal/kafka", "custodian", ""},
		{"internal/kafka", "store", "internal/kafka imports store"},
		{"store", "custodian", ""},
		{"store", "go.etcd.io/bbolt", ""},
		{"store", "hsm", "store imports hsm"},
		{"hsm", "internal/secret", ""},
		{"hsm", "custodian", "hsm imports custodian"},
		{"certs", "internal/secret", "certs imports internal/secret"},
		{"internal/secret", "internal/audit", "internal/secret imports internal/audit"},
		{"internal/audit", "custodian", "internal/audit imports custodian"},
		{"api/custodian/v1", "custodian", "api/custodian/v1 imports custodian"},
		{"client", "api/custodian/v1", ""},
		{"client", "custodian", "client imports custodian"},
		{"internal/rpc", "certs", ""},
		{"internal/rpc", "store", "internal/rpc imports store"},
		{"internal/packager", "store", "internal/packager imports store"},
		{"internal/bench", "custodian/custodiantest", ""},
		{"internal/bench/load", "testservers", ""},
		{"cmd/custodiand", "internal/rpc", ""},
		{"cmd/custodiand", "softhsm", ""},
		{"cmd/custodiand", "testing", "cmd/custodiand depends on testing"},
		{"cmd/custodiand", "testing/iotest", "cmd/custodiand depends on testing/iotest"},
		{"cmd/custodianctl", "hsm", ""},
		{"cmd/custodianctl", "store", "cmd/custodianctl imports store"},
		{"testservers/cmd/ensure", "testservers", ""},
		{"softhsm", "hsm", ""},
		{"softhsm/fault", "hsm", "softhsm/fault imports hsm"},
		{"internal/misc", "fmt", "internal/misc has no place in the house"},
	} {
		path := test.imports
		if !strings.Contains(strings.Split(path, "/")[0], ".") && path != "fmt" && !strings.HasPrefix(path, "testing") {
			path = module + "/" + path
		}
		p := goPackage{ImportPath: module + "/" + test.pkg, Imports: []string{path}, Deps: []string{path}}
		var want []string
		if test.want != "" {
			want = []string{test.want}
		}
		if got := violations([]goPackage{p}); !slices.Equal(got, want) {
			t.Errorf("%s imports %s: got %q, want %q", test.pkg, test.imports, got, want)
		}
	}
	for _, kit := range testKits {
		for _, pkg := range []string{"cmd/custodiand", "cmd/custodianctl", "internal/rpc", "softhsm"} {
			// By way of another package, so that it is no import of its own.
			p := goPackage{ImportPath: module + "/" + pkg, Deps: []string{module + "/" + kit}}
			want := []string{fmt.Sprintf("%s depends on %s", pkg, kit)}
			if got := violations([]goPackage{p}); !slices.Equal(got, want) {
				t.Errorf("%s depends on %s: got %q, want %q", pkg, kit, got, want)
			}
		}
	}
	if got := violations([]goPackage{{ImportPath: "example.org/else"}}); len(got) != 1 {
		t.Errorf("a package of another module: got %q, want one violation", got)
	}
}
