# mvirt. "make help" lists what there is. On a bare Debian 12, as root, "make demo" and "make test" install
# what they need themselves.

SHELL := /bin/sh
GO = $(or $(shell hack/go),go)
VERSION := $(shell sed -n 's/^var Version = "\(.*\)"/\1/p' sdk/version/version.go)+$(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
export GOTOOLCHAIN := local
GOFLAGS_BUILD := -trimpath -buildvcs=false
LDFLAGS := -s -w -X github.com/mvirt/mvirt/sdk/version.Version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Binaries: name and package. A plugin's directory says what it is, the binary's name what it is called.
PROGRAMS := mvirtd:core/cmd/mvirtd mvirt:core/cmd/mvirt
PLUGINS := mvirt-dir:plugins/storage-dir mvirt-qemu:plugins/vmm-qemu mvirt-net:plugins/net-tap mvirt-log:plugins/log-lsm \
	mvirt-zfs:plugins/storage-zfs mvirt-vmm:plugins/vmm-cloudhypervisor
ALL := $(PROGRAMS) $(foreach p,$(PLUGINS),$(if $(wildcard $(lastword $(subst :, ,$(p)))/main.go),$(p)))

# Packages whose tests run once more under the race detector: those where goroutines share much.
RACE := ./core/internal/supervisor/... ./core/internal/operation/... ./core/internal/audit/... ./core/internal/cli/... ./sdk/fdpass/... ./sdk/vmmkit/console/...

.PHONY: help setup build install test check unit race e2e lint fmt vet staticcheck generate drift arch demo fuzz fuzz-net clean \
	chaos bench-core bench-log bench-net bench-storage lab lab-ci lab-test lab-shell bin/demo bin/bench-storage deb

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what building and testing needs (Debian 12, as root)
	@hack/setup

build: setup ## all programs, into bin/
	@mkdir -p bin
	@set -e; for p in $(ALL); do \
		CGO_ENABLED=0 $(GO) build $(GOFLAGS_BUILD) -ldflags '$(LDFLAGS)' -o bin/$${p%%:*} ./$${p#*:}; \
	done
	@echo "built $(VERSION): $(foreach p,$(ALL),bin/$(firstword $(subst :, ,$(p))))"

DESTDIR ?=
install: build ## programs to /usr/sbin, /usr/bin and /usr/lib/mvirt (DESTDIR is honoured)
	install -D -m 0755 bin/mvirtd $(DESTDIR)/usr/sbin/mvirtd
	install -D -m 0755 bin/mvirt $(DESTDIR)/usr/bin/mvirt
	@set -e; for p in $(ALL); do case $$p in mvirtd:*|mvirt:*) ;; *) \
		install -D -m 0755 bin/$${p%%:*} $(DESTDIR)/usr/lib/mvirt/$${p%%:*} ;; esac; done

test: build lint unit race fuzz-net ## lint, unit, plugin and end-to-end tests, race detector, fuzzing ("make lab-ci" has the lab)

check: build lint ## fast: what a pull request must pass before its tests run
	$(GO) test -short ./core/... ./sdk/... ./test/arch/...

unit:
	GO="$(GO)" $(GO) run ./hack/gotest hack/may-not-skip -p 2 -timeout 20m ./...

race:
	CGO_ENABLED=1 $(GO) test -race -short -p 1 -timeout 10m $(RACE)

e2e: build ## only the end-to-end scripts, against the real system
	$(GO) test -v -count 1 -timeout 15m ./test/e2e/...

lint: fmt vet staticcheck drift arch ## format, vet, staticcheck, generated code, import directions

fmt: setup
	@bad=$$(git ls-files -co --exclude-standard '*.go' | xargs -r $(dir $(GO))gofmt -l); \
	if [ -n "$$bad" ]; then echo "not formatted (run gofmt -w):"; echo "$$bad"; exit 1; fi

vet: setup
	$(GO) vet ./...

staticcheck: setup
	$(GO) run $(STATICCHECK) ./...

arch: setup
	$(GO) test ./test/arch/

generate: setup ## Go code from the protos
	PATH="$(dir $(GO)):$$PATH" sdk/internal/gen.sh

drift: setup ## generated code is what the generators make
	@hack/drift $(GO)

bin/demo: build
	@CGO_ENABLED=0 $(GO) build $(GOFLAGS_BUILD) -o bin/demo ./test/demo

demo: bin/demo ## two real VMs through the core and four plugins, from import to removal
	@bin/demo

CHAOS ?= --duration 2m
chaos: build ## random faults in a running system with two guests (as root; CHAOS="--faults 1000 --seed N --freeze 1m")
	@CGO_ENABLED=0 $(GO) build $(GOFLAGS_BUILD) -o bin/chaos ./test/chaos
	@bin/chaos $(CHAOS)

bench-core: build ## figures of the core: start, call, restart, list, memory
	$(GO) run ./test/bench/core

bench-log bench-net: build ## figures of a plugin
	@if [ -d test/bench/$(@:bench-%=%) ]; then $(GO) run ./test/bench/$(@:bench-%=%); else \
	echo "$@: there is no such benchmark in this tree" >&2; exit 1; fi

bin/bench-storage: build
	@CGO_ENABLED=0 $(GO) build $(GOFLAGS_BUILD) -o bin/bench-storage ./test/bench/storage

bench-storage: bin/bench-storage ## figures of storage: imports into files here, then zvols in the lab
	bin/bench-storage
	GO="$(GO)" MVIRT_LAB_NO_SKIP=29-storage-zfs-figures $(GO) run ./test/lab/cmd/lab test --timeout 60m 29-storage-zfs-figures

lab: ## build the lab: a guest where ZFS and KVM are real (test/lab/README.md)
	test/lab/build.sh build

# What CI runs of the lab: none of it may be skipped, and its limits are for a machine many times slower.
LAB_CI := 00-lab-is-real 20-storage-zfs 22-demo-zfs
lab-ci: bin/demo ## the lab tests that are part of "make test"
	GO="$(GO)" MVIRT_LAB_NO_SKIP="$(LAB_CI)" $(GO) run ./test/lab/cmd/lab test --timeout 45m $(LAB_CI)

lab-test: bin/demo bin/bench-storage deb ## all tests inside the lab
	GO="$(GO)" $(GO) run ./test/lab/cmd/lab test --timeout 120m

lab-shell: build ## a shell inside the lab
	$(GO) run ./test/lab/cmd/lab shell

deb: build ## the Debian package, into dist/
	packaging/build-deb.sh

FUZZTIME ?= 20s
fuzz: setup ## every fuzz target for FUZZTIME each
	@GO="$(GO)" hack/fuzz $(FUZZTIME)

fuzz-net: setup ## what guests and front-ends send to mvirt-net, 60 s of each target, all at once
	@GO="$(GO)" plugins/net-tap/fuzz.sh 60s

clean: ## remove what was built
	rm -rf bin
