# What a person types here. `make help` lists it; `make demo` and `make test`
# also install what a fresh Debian-like machine lacks (scripts/setup.sh).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# A Go that setup.sh has fetched comes first, where there is one.
export PATH := $(shell sh scripts/setup.sh --go-bin):$(PATH)

N ?= 200
BENCH ?=
QUICK ?= 0
FUZZTIME ?= 60s

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  %-10s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: setup setup-media build ## a film clip, encrypted and played with a key from an HSM, end to end
	@scripts/setup.sh shaka || echo "make: the demo goes on without Shaka Packager"
	@bash scripts/demo.sh

.PHONY: test
test: setup setup-media setup-shaka servers ## everything that must hold; log in bin/test.log
	@echo "make: go build"; go build ./...
	@echo "make: go vet"; go vet ./...
	@echo "make: go test"; scripts/gotest.sh -count=1 -timeout 20m ./...

.PHONY: check
check: setup format vet lint generated unit ## the fast loop: format, vet, lint, generated code, unit tests with -race

.PHONY: crash
crash: setup ## kill the daemon N times (N=200) and look at what is left
	go test -count=1 -v -timeout 6h ./cmd/custodiand -run '^TestCrash' -crash.n=$(N)

.PHONY: bench
bench: setup ## measure; BENCH=section,... QUICK=1; writes bench.json
	go run ./internal/bench/cmd/custodybench -sections "$(BENCH)" -quick=$(QUICK) -out bench.json

.PHONY: long
long: setup setup-media setup-shaka servers ## the tests named TestLong..., hours: million-record runs
	CUSTODIAN_LONG=1 scripts/gotest.sh -count=1 -timeout 12h -run '^TestLong' ./...

.PHONY: fuzz
fuzz: setup ## every fuzz target for FUZZTIME (60s)
	@scripts/fuzz.sh $(FUZZTIME)

.PHONY: build
build: setup ## the programs, in bin/
	@mkdir -p bin
	go build -trimpath -o bin/ ./cmd/...

.PHONY: generate
generate: setup tools ## the Go code of api/, from its protos
	bin/tools/buf generate

.PHONY: clean
clean: ## remove what was built here; caches outside the checkout stay
	rm -rf bin bench.json

# Steps of the targets above.

.PHONY: setup setup-media setup-shaka servers format vet lint generated unit tools
setup:
	@scripts/setup.sh base

setup-media:
	@scripts/setup.sh media

setup-shaka:
	@scripts/setup.sh shaka

servers:
	@go run ./testservers/cmd/ensure

format:
	@files=$$(git ls-files -co --exclude-standard -- '*.go' | xargs -r ls -d 2>/dev/null | xargs -r gofmt -l); \
		if [ -n "$$files" ]; then echo "gofmt would change:"; echo "$$files"; exit 1; fi

vet:
	go vet ./...

lint: tools
	bin/tools/staticcheck ./...
	bin/tools/buf lint

generated: tools
	@scripts/generated.sh

unit:
	go test -race -short -timeout 20m ./...

# The lint tools have a module of their own. protoc-gen-go comes from the
# product's module instead: so it has always the version of the library that the
# generated code runs with. go build does nothing where the tools are current.
tools:
	@mkdir -p bin/tools
	@[ -x bin/tools/buf ] || echo "make: building the lint tools: once, about two minutes"
	@go build -C tools -o ../bin/tools/ tool
	@go build -o bin/tools/ google.golang.org/protobuf/cmd/protoc-gen-go
