# SPDX-License-Identifier: Apache-2.0
#
# make deps    install what is missing (Debian 12 or 13, root)
# make build   programs and the QEMU plugin, into bin/
# make test    everything a change must pass, at most 25 minutes (root)
# make demo    protect a guest and kill its primary; KEEP=1 leaves the lab up (root)
# make lint    formatting, vet, linters, C warnings and static analysis
# make fuzz TIME=10m   fuzz each decoder for that long
# make vuln    known vulnerabilities of what is used; needs the internet
# make clean   remove bin/ and build/
#
# make test-security    attack a protected guest (root); part of make test
# make soak-failover N=20    kill the primary again and again (root)
# make soak-clone N=200      make and discard backups again and again (root)
# make soak-plugin N=100     clone, pause and reset again and again, without libvirt
# make soak-storage N=5      race for epochs on NFS and iSCSI, N times as long as in the tests (root)

SHELL = /bin/sh
.SHELLFLAGS = -euc

# A Go installed by hand is often not in root's PATH.
export PATH := $(PATH):/usr/local/go/bin
# Debian's Go otherwise refuses to fetch the version that go.mod names.
export GOTOOLCHAIN ?= auto

# The libvirt binding finds libvirt when it runs, so its headers are not needed.
TAGS = libvirt_dlopen
GO = go
GOFILES = $(shell git ls-files --cached --others --exclude-standard '*.go')
CFILES = $(shell git ls-files --cached --others --exclude-standard 'plugin/lab/*.c')
SHFILES = .ci/run $(shell git ls-files --cached --others --exclude-standard '*.sh')

GOLANGCI_VERSION = v2.15.0
GOLANGCI = build/tools/golangci-lint-$(GOLANGCI_VERSION)
GOVULNCHECK_VERSION = v1.1.4
GOVULNCHECK = build/tools/govulncheck-$(GOVULNCHECK_VERSION)

# Packages whose tests run real guests take turns; the others run at once and
# with the race detector.
REAL = ftvirt.org/ftvirt/plugin/lab/(labtest|guest)
list_tests = $(GO) list -tags $(TAGS) -f '{{.ImportPath}} {{join .TestImports " "}} {{join .XTestImports " "}}' ./...
UNIT = $$($(list_tests) | grep -Ev ' $(REAL)( |$$)' | cut -d' ' -f1)
LAB = $$($(list_tests) | grep -E ' $(REAL)( |$$)' | cut -d' ' -f1)

.PHONY: all deps build test unit-test lab-test test-security demo soak-failover soak-clone soak-plugin soak-storage fuzz lint vuln clean build/guest

all: build

deps:
	@contrib/deps.sh

build: deps
	$(MAKE) -C plugin/qemu OUT=$(CURDIR)/bin/ftvirt.so
	$(GO) build -tags $(TAGS) -o bin/ftvirt ./plugin/cmd/ftvirt
	CGO_ENABLED=0 $(GO) build -o bin/ftvirt-hook ./hooks/cmd/ftvirt-hook

# The lab's guest, made once; the network is needed for Debian's kernel.
build/guest: deps
	$(GO) run ./plugin/lab/guest/cmd/ftguest-build $@

test: unit-test lab-test test-security

unit-test: build
	$(GO) test -tags $(TAGS) -race -timeout 5m $(UNIT)

lab-test: build build/guest unit-test
	$(GO) test -tags $(TAGS) -p 1 -count 1 -timeout 15m $(LAB)

# They say themselves what failed, and keep the logs in build/evidence.
demo test-security soak-failover soak-clone: build build/guest
	$(GO) build -o build/ftvirt-scenario ./plugin/lab/cmd/ftvirt-scenario
	@build/ftvirt-scenario $@ $(if $(filter soak-%,$@),$(if $(N),-n $(N)))

# Every second clone goes live; after pauses and resets both sides are compared.
soak-plugin: N ?= 100
soak-plugin: build build/guest
	$(GO) test -tags $(TAGS) -count 1 -timeout 0 -v ./plugin/qemu/plugintest -run 'TestClone|TestPause|TestReset' \
		-clones $(N) -every 2 -pauses $(N) -resets $$(( ($(N) + 4) / 5 ))

soak-storage: build build/guest
	$(GO) test -tags $(TAGS) -v -count 1 -timeout 60m ./arbiter/storagetest -soak $(or $(N),5)

# Each fuzz test in turn, since one of them takes all processors.
TIME = 1m
fuzz:
	@git grep -o 'func Fuzz[A-Za-z0-9]*' -- '*_test.go' | while IFS=: read -r file name; do \
		echo "$${name#func } in $$(dirname "$$file"), $(TIME)"; \
		$(GO) test -tags $(TAGS) -run '^$$' -fuzz "^$${name#func }$$" -fuzztime $(TIME) -fuzzminimizetime 2s ./$$(dirname "$$file") </dev/null || exit 1; \
	done

vuln: $(GOVULNCHECK)
	$(GOVULNCHECK) -tags $(TAGS) ./...

$(GOVULNCHECK):
	mkdir -p build/tools
	GOBIN=$(CURDIR)/build/tools $(GO) install golang.org/x/vuln/cmd/govulncheck@$(GOVULNCHECK_VERSION)
	mv build/tools/govulncheck $@

lint: deps $(GOLANGCI)
	@contrib/deps.sh lint
	@unformatted=$$(gofmt -l $(GOFILES)); if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	@bare=$$(grep -L '^// SPDX-License-Identifier: Apache-2.0' $(GOFILES) || :); if [ -n "$$bare" ]; then echo "without SPDX line:"; echo "$$bare"; exit 1; fi
	$(GO) mod tidy -diff
	$(GO) vet -tags $(TAGS) ./...
	$(GOLANGCI) run --build-tags $(TAGS) ./...
	$(MAKE) -B -C plugin/qemu OUT=$(CURDIR)/build/lint/ftvirt.so
	$(MAKE) -C plugin/qemu analyse
	for file in $(CFILES); do gcc -O2 -Wall -Wextra -Werror -fsyntax-only "$$file"; done
	for file in $(SHFILES); do sh -n "$$file"; done

# A linter can only judge code for a Go that is no newer than its own.
$(GOLANGCI):
	mkdir -p build/tools
	GOTOOLCHAIN=$$($(GO) env GOVERSION)+auto GOBIN=$(CURDIR)/build/tools \
		$(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	mv build/tools/golangci-lint $@

clean:
	rm -rf bin build
