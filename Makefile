# SPDX-License-Identifier: Apache-2.0
#
# make deps    install what is missing (Debian 12 or 13, root)
# make build   programs and the QEMU plugin, into bin/
# make test    everything a change must pass, at most 40 minutes (root)
# make demo    protect a guest and kill its primary; KEEP=1 leaves the lab up (root)
# make docs    manual pages and shell completions, into build/docs
# make deb     Debian packages, into build/deb
# make lint    formatting, vet, linters, C warnings, static analysis, AppArmor's rules
# make fuzz TIME=10m   fuzz each decoder for that long
# make vuln    known vulnerabilities of what is used; part of make lint
# make clean   remove bin/ and build/
#
# make test-web         look at the agent's page with a browser; PICTURE=FILE keeps a PNG
# make test-orchestration    Ansible role and OCF agent, without hosts or a cluster
# make test-real        a Debian with PostgreSQL, nginx and ssh, failed over ten times
#                       (root, network)
# make test-security    attack a protected guest (root); part of make test
# make test-faults [ONLY=REGEXP]    fill disks, starve and stop processes, damage files
#                       of a protected guest's hosts, 15 minutes (root)
# make test-shared-dir [N=3]    fail over N times while both hosts keep disks and
#                       replicas in one directory, as on NFS (root); with N=1 part
#                       of make test
# make test-session     protect a guest of an ordinary user's libvirt, qemu:///session (root)
# make soak-failover N=20    kill the primary again and again (root)
# make soak-crash N=10       crash the primary's host again and again (root)
# make soak-clone N=200      make and discard backups again and again (root)
# make soak-plugin N=100     clone, pause and reset again and again, without libvirt
# make soak-boot N=200       fail over at random instants of reboots and power-offs, without
#                       libvirt; SEED=5 repeats a run
# make soak-storage N=5      race for epochs on NFS and iSCSI, N times as long as in the tests (root)
# make bench-quick           what protection costs, in at most 6 minutes (root)
# make bench                 all of it, with COLO beside it, in at most 40 (root)
# make chaos SEED=1 MINUTES=20    let things go wrong at random on three hosts (root);
#                            ONLY='full-disk|reboot' does so with such faults alone
# make test-deb              install, upgrade, remove and purge the packages in a
#                            Debian of their own, and run lintian (root, network)
# make test-docs             run every command of the documents on three bare hosts,
#                            each with a systemd of its own (root, network)

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
SHFILES = .ci/run contrib/ocf/ftvirt $(shell git ls-files --cached --others --exclude-standard '*.sh')

# Of chaos: what its faults follow from, and how long they last. The first is
# soak-boot's as well.
SEED = 1
MINUTES = 5

GOLANGCI_VERSION = v2.15.0
GOLANGCI = build/tools/golangci-lint-$(GOLANGCI_VERSION)
PROMTOOL = build/tools/promtool
OCF = build/tools/ocf
APPARMOR = build/tools/apparmor
COLO = build/tools/qemu-colo
# The newest whose modules the Go proxy has all of. It is no dependency of go.mod:
# it would bring a hundred modules.
NFPM_VERSION = v2.45.0
NFPM = build/tools/nfpm-$(NFPM_VERSION)
VERSION = 0.1.0
# Who builds packages answers for them: as for Debian's own tools by these two
# variables, else the author of the last commit.
MAINTAINER = $(if $(DEBEMAIL),$(DEBFULLNAME) <$(DEBEMAIL)>,$(shell git log -1 --format='%an <%ae>'))
PACKAGES = ftvirt ftvirt-agent ftvirt-qemu-plugin
GOVULNCHECK_VERSION = v1.1.4
GOVULNCHECK = build/tools/govulncheck-$(GOVULNCHECK_VERSION)
VULNDB = golang.org/x/vulndb
INDEXDB_VERSION = v0.0.0-20261105234957-e22db6528018
INDEXDB = build/tools/indexdb-$(INDEXDB_VERSION)

# Packages whose tests run real guests take turns; the others run at once and
# with the race detector.
REAL = ftvirt.org/ftvirt/plugin/lab/(labtest|guest)
list_tests = $(GO) list -tags $(TAGS) -f '{{.ImportPath}} {{join .TestImports " "}} {{join .XTestImports " "}}' ./...
UNIT = $$($(list_tests) | grep -Ev ' $(REAL)( |$$)' | cut -d' ' -f1)
LAB = $$($(list_tests) | grep -E ' $(REAL)( |$$)' | cut -d' ' -f1)

.PHONY: build/deb/newer all deps build test unit-test lab-test test-security test-faults test-shared-dir demo soak-failover soak-crash soak-clone soak-plugin soak-boot soak-storage chaos bench bench-quick fuzz lint vuln clean build/guest build/debian docs deb test-deb test-docs test-real test-web test-orchestration

all: build

deps:
	@contrib/deps.sh

build: deps
	$(MAKE) -C plugin/qemu OUT=$(CURDIR)/bin/ftvirt.so VERSION=$(VERSION)
	$(GO) build -tags $(TAGS) -o bin/ftvirt ./plugin/cmd/ftvirt
	CGO_ENABLED=0 $(GO) build -o bin/ftvirt-hook ./hooks/cmd/ftvirt-hook

docs: deps
	$(GO) run -tags $(TAGS) ./plugin/cmd/ftvirt-docs build/docs
	install -m 0644 contrib/man/* build/docs

package = for package in $(PACKAGES); do \
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) VERSION=$(1) MAINTAINER='$(MAINTAINER)' \
		$(NFPM) package -p deb -f "contrib/debian/$$package.yaml" -t $(2); done

# The same commit gives the same packages: no path and no time of the build.
deb: build docs $(NFPM)
	rm -rf build/deb
	mkdir -p build/deb
	$(GO) build -tags $(TAGS) -trimpath -buildmode=pie -ldflags '-s -w' -o build/deb/ftvirt ./plugin/cmd/ftvirt
	CGO_ENABLED=0 $(GO) build -trimpath -buildmode=pie -ldflags '-s -w' -o build/deb/ftvirt-hook ./hooks/cmd/ftvirt-hook
	strip --strip-unneeded -o build/deb/ftvirt.so bin/ftvirt.so
	for page in build/docs/*.[0-9]; do gzip -9nc "$$page" >"build/deb/$${page##*/}.gz"; done
	sed '1s/(.*)/($(VERSION))/; s|MAINTAINER|$(MAINTAINER)|' contrib/debian/changelog | gzip -9n >build/deb/changelog.gz
	contrib/debian/third-party.sh build/deb/ftvirt build/deb/ftvirt-hook | gzip -9n >build/deb/third-party.gz
	$(call package,$(VERSION),build/deb)

# The newer packages differ from the others by their version alone.
build/deb/newer: deb
	mkdir -p $@
	$(call package,$(VERSION)+1,$@)

test-deb: build/deb/newer
	@contrib/deps.sh packages
	contrib/debian/test.sh build/deb build/deb/newer

# In this order, on the same hosts: the last of the guide removes the packages.
DOCUMENTS = contrib/docs/start.md contrib/docs/virsh.md contrib/docs/metrics.md contrib/docs/operate.md contrib/README.md README.md \
	contrib/docs/comparison.md contrib/docs/contribute.md contrib/docs/how-it-works.md contrib/docs/performance.md contrib/docs/profile.md \
	contrib/docs/troubleshooting.md
test-docs: build/deb/newer build/guest
	@contrib/deps.sh packages
	$(GO) build -o build/ftvirt-doctest ./plugin/doctest/cmd/ftvirt-doctest
	@build/ftvirt-doctest $(DOCUMENTS)

$(NFPM):
	mkdir -p build/tools
	cd build/tools && GOFLAGS=-mod=mod GOBIN=$(CURDIR)/build/tools $(GO) install github.com/goreleaser/nfpm/v2/cmd/nfpm@$(NFPM_VERSION)
	mv build/tools/nfpm $@

# Checks alert rules. Taken out of Debian's package, since installing that would
# start a server.
$(PROMTOOL): deps
	rm -rf build/tools/prometheus
	mkdir -p build/tools/prometheus
	cd build/tools/prometheus && apt-get -q -o APT::Sandbox::User=root download prometheus
	dpkg-deb --fsys-tarfile build/tools/prometheus/*.deb | tar -xO ./usr/bin/promtool >$@.tmp
	chmod +x $@.tmp
	mv $@.tmp $@
	rm -r build/tools/prometheus

# The lab's guest, made once; the network is needed for Debian's kernel.
build/guest: deps
	$(GO) run ./plugin/lab/guest/cmd/ftguest-build $@

# A Debian server as guest, made once in the same way.
build/debian: deps
	@contrib/deps.sh real
	$(GO) run ./plugin/lab/guest/cmd/ftguest-build -debian $@

test: unit-test lab-test test-security
	$(MAKE) test-shared-dir N=1
	$(MAKE) chaos

unit-test: build | $(PROMTOOL)
	$(MAKE) -C plugin/qemu sanitize
	$(GO) test -tags $(TAGS) -race -timeout 5m $(UNIT)

lab-test: build build/guest unit-test
	$(GO) test -tags $(TAGS) -p 1 -count 1 -timeout 20m $(LAB)

test-web:
	@contrib/deps.sh web
	$(GO) vet -tags browser ./plugin/web
	$(GO) test -tags browser -count 1 ./plugin/web $(if $(PICTURE),-picture $(abspath $(PICTURE)))

test-orchestration: $(OCF)
	@contrib/deps.sh orchestration
	contrib/preset/test.sh
	contrib/ocf/test.sh $(OCF)
	$(GO) build -tags $(TAGS) -o build/ftvirt ./plugin/cmd/ftvirt
	contrib/ansible/test.sh build/ftvirt

# What resource agents build on. Taken out of Debian's package, since installing
# that would bring a cluster's parts.
$(OCF):
	rm -rf $@ $@.tmp
	mkdir -p $@.tmp
	cd $@.tmp && apt-get -q -o APT::Sandbox::User=root download resource-agents
	dpkg-deb -x $@.tmp/resource-agents_*.deb $@.tmp
	rm $@.tmp/*.deb
	mv $@.tmp $@

test-session: build build/guest
	contrib/session/test.sh bin "$$(ls -td build/guest/*/ | head -1)"

# They say themselves what failed, and keep the logs in build/evidence.
test-real: build/debian
demo test-real test-security test-faults test-shared-dir soak-failover soak-crash soak-clone chaos: build build/guest
	$(GO) build -o build/ftvirt-scenario ./plugin/lab/cmd/ftvirt-scenario
	@build/ftvirt-scenario $@ $(if $(filter soak-% test-real test-shared-dir,$@),$(if $(N),-n $(N))) $(if $(filter test-faults chaos,$@),$(if $(ONLY),-only '$(ONLY)')) $(if $(filter chaos,$@),-seed $(SEED) -length $(MINUTES)m)

# On a machine that does nothing else; PART=work runs a part of it alone.
bench: $(COLO) build/debian
bench bench-quick: build build/guest
	@contrib/deps.sh bench
	$(GO) build -o build/ftvirt-scenario ./plugin/lab/cmd/ftvirt-scenario
	@build/ftvirt-scenario bench $(if $(filter %-quick,$@),-quick) $(if $(PART),-part $(PART))

# COLO does not work in QEMU 10.0. Debian 12 has an older QEMU as well, which is
# taken out of its packages, not installed.
$(COLO): deps
	. /etc/os-release; [ "$$VERSION_ID" = 12 ] || exit 0; \
	rm -rf $@.tmp; mkdir -p $@.tmp; cd $@.tmp; \
	apt-get -q -o APT::Sandbox::User=root download qemu-system-x86/bookworm qemu-system-common/bookworm qemu-system-data/bookworm; \
	for package in *.deb; do dpkg-deb -x "$$package" .; done; \
	rm ./*.deb; cd $(CURDIR); mv $@.tmp $@

# Every second clone goes live; after pauses and resets both sides are compared.
soak-plugin: N ?= 100
soak-plugin: build build/guest
	$(GO) test -tags $(TAGS) -count 1 -timeout 0 -v ./plugin/qemu/plugintest -run 'TestClone|TestPause|TestReset' \
		-clones $(N) -every 2 -pauses $(N) -resets $$(( ($(N) + 4) / 5 ))

# Failures leave their logs in build/evidence.
soak-boot: build build/guest
	$(GO) test -tags $(TAGS) -count 1 -timeout 0 -v ./plugin/qemu/plugintest -run 'TestBoot$$' \
		-boots $(or $(N),200) -seed $(SEED) -keep $(CURDIR)/build/evidence/soak-boot

soak-storage: build build/guest
	$(GO) test -tags $(TAGS) -v -count 1 -timeout 60m ./arbiter/storagetest -soak $(or $(N),5)

# Each fuzz test in turn, since one of them takes all processors.
TIME = 1m
fuzz:
	@git grep -o 'func Fuzz[A-Za-z0-9]*' -- '*_test.go' | while IFS=: read -r file name; do \
		echo "$${name#func } in $$(dirname "$$file"), $(TIME)"; \
		$(GO) test -tags $(TAGS) -run '^$$' -fuzz "^$${name#func }$$" -fuzztime $(TIME) -fuzzminimizetime 2s ./$$(dirname "$$file") </dev/null || exit 1; \
	done

# It fails with 1 if the database cannot be read, and otherwise if it found
# something. Where vuln.go.dev is out of reach, a database of the same form is made
# of its sources, which are a Go module.
vuln: $(GOVULNCHECK)
	@rc=0; $(GOVULNCHECK) -tags $(TAGS) ./... || rc=$$?; \
	[ $$rc -eq 1 ] || exit $$rc; \
	echo "vuln.go.dev cannot be asked; asking $(VULNDB)@latest"; \
	$(MAKE) --no-print-directory $(INDEXDB); \
	sources=$$($(GO) mod download -json $(VULNDB)@latest | sed -n 's/^\t"Dir": "\(.*\)",$$/\1/p'); \
	rm -rf build/tools/vulndb; \
	$(INDEXDB) -vulns "$$sources/data/osv" -out build/tools/vulndb; \
	$(GOVULNCHECK) -db file://$(CURDIR)/build/tools/vulndb -tags $(TAGS) ./...

$(INDEXDB):
	mkdir -p build/tools
	GOFLAGS=-mod=mod GOBIN=$(CURDIR)/build/tools $(GO) install $(VULNDB)/cmd/indexdb@$(INDEXDB_VERSION)
	mv build/tools/indexdb $@

$(GOVULNCHECK):
	mkdir -p build/tools
	GOBIN=$(CURDIR)/build/tools $(GO) install golang.org/x/vuln/cmd/govulncheck@$(GOVULNCHECK_VERSION)
	mv build/tools/govulncheck $@

lint: deps $(GOLANGCI) $(APPARMOR)
	@contrib/deps.sh lint
	@unformatted=$$(gofmt -l $(GOFILES)); if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	@bare=$$(grep -L '^// SPDX-License-Identifier: Apache-2.0' $(GOFILES) || :); if [ -n "$$bare" ]; then echo "without SPDX line:"; echo "$$bare"; exit 1; fi
	$(GO) mod tidy -diff
	$(GO) vet -tags $(TAGS),browser ./...
	$(GOLANGCI) run --build-tags $(TAGS),browser ./...
	$(MAKE) -B -C plugin/qemu OUT=$(CURDIR)/build/lint/ftvirt.so
	$(MAKE) -C plugin/qemu OUT=$(CURDIR)/build/lint/ftvirt.so hardened
	$(MAKE) -C plugin/qemu analyse
	for file in $(CFILES); do gcc -O2 -Wall -Wextra -Werror -fsyntax-only "$$file"; done
	for file in $(SHFILES); do sh -n "$$file"; done
	contrib/apparmor-test.sh $(APPARMOR)
	$(MAKE) vuln

# Compiles AppArmor's rules. Taken out of Debian's package, since installing that
# would change what the machine's own programs may do.
$(APPARMOR):
	rm -rf $@ $@.tmp
	mkdir -p $@.tmp
	cd $@.tmp && apt-get -q -o APT::Sandbox::User=root download apparmor
	dpkg-deb -x $@.tmp/apparmor_*.deb $@.tmp
	rm $@.tmp/*.deb
	mv $@.tmp $@

# A linter can only judge code for a Go that is no newer than its own.
$(GOLANGCI):
	mkdir -p build/tools
	GOTOOLCHAIN=$$($(GO) env GOVERSION)+auto GOBIN=$(CURDIR)/build/tools \
		$(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	mv build/tools/golangci-lint $@

clean:
	rm -rf bin build
