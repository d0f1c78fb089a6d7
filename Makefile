# Skerry. `make` lists the targets.
GO        ?= go
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo v0.1.0-dev)
LDFLAGS    = -s -w -X github.com/skerry-io/skerry/internal/version.version=$(VERSION)
BUILD      = CGO_ENABLED=0 $(GO) build -trimpath -tags grpcnotrace -ldflags "$(LDFLAGS)"
DEBIAN     = containerd runc containernetworking-plugins busybox-static iproute2 iptables
SUDO       = $(if $(filter 0,$(shell id -u)),,sudo)

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/skerry-provider and bin/edgelet for this machine
	@mkdir -p bin
	@$(BUILD) -o bin/skerry-provider ./cmd/provider
	@$(BUILD) -o bin/edgelet ./cmd/edgelet

cross: ## static binaries for amd64, arm64 and arm v7 in dist/
	@for arch in amd64 arm64 arm; do mkdir -p dist/$$arch; \
	  GOARCH=$$arch GOARM=7 $(BUILD) -o dist/$$arch/edgelet ./cmd/edgelet && \
	  GOARCH=$$arch GOARM=7 $(BUILD) -o dist/$$arch/skerry-provider ./cmd/provider || exit 1; \
	  ls -l dist/$$arch | awk 'NR>1{printf "  %-6s %-16s %5.1f MB\n", "'$$arch'", $$9, $$5/1e6}'; done

images: cross ## OCI archive of skerry-provider (amd64, arm64) in dist/
	@$(GO) run ./test/images/cmd/images

prepare: ## install the Debian packages that a demo and the tests need
	@need=$$(for p in $(DEBIAN); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$need" ]; then echo "Installing from the distribution:" $$need; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$need >/dev/null; fi

demo: prepare build ## everything on this machine: cluster, provider, site, pods; Ctrl-C removes it
	@$(SUDO) env "PATH=$$PATH" $(GO) run ./test/demo

demo-once: prepare build ## the same without staying; exits 0 only if every step did what it should
	@$(SUDO) env "PATH=$$PATH" $(GO) run ./test/demo -once

cluster: prepare ## leave a real control plane running and print its kubeconfig
	@$(SUDO) env "PATH=$$PATH" $(GO) run ./test/cluster/cmd/cluster

check: ## format, vet, architecture
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	@$(GO) vet -tags e2e ./... && $(GO) test ./test/arch

test: DEBIAN += gcc libc6-dev systemd bsdutils
test: prepare build check images ## everything: unit, race, end to end on real components
	@$(GO) test -race ./...
	@$(SUDO) env "PATH=$$PATH" $(GO) test -tags e2e -count=1 -p 1 -timeout 60m ./...

bench: prepare build ## benchmarks, beside their floors
	@$(SUDO) env "PATH=$$PATH" $(GO) test -run '^$$' -bench . -benchmem ./benchmarks/...

.PHONY: help build cross images prepare demo demo-once cluster check test bench
