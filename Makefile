# make demo   a fresh Debian 12 with Rust: installs its packages, builds, runs the shop
# make test   all tests
# make bench  the figures, against named peers
# make lint   format and lints
# make fuzz   the fuzz targets, SECONDS=N each (60)
.PHONY: demo test bench lint fuzz build packages

export CARGO_TERM_COLOR ?= auto

packages:
	@scripts/packages.sh $(SET)

build:
	cargo build --release --bin atoll

demo: packages build
	@scripts/demo.sh

test: SET = test
test: packages
	cargo build --workspace --bins --examples
	@scripts/test.sh

bench: SET = bench
bench: packages build
	@bench/run.sh
	@bench/network.sh
	@bench/registry.sh
	@bench/leaks.sh
	@bench/vmm.sh

fuzz:
	@fuzz/run.sh $(or $(SECONDS),60)

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
