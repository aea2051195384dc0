# Shortcuts for developers; each is one command that also stands in CONTRIBUTING.md.
.PHONY: install test extended lint format cxx bench ci size

install:
	pip install -e ".[dev]"
test:
	pytest -n auto
extended:
	pytest -n auto -m extended
lint:
	ruff check . && ruff format --check . && git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs clang-format --dry-run -Werror
format:
	ruff check --fix . && ruff format . && git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs clang-format -i
cxx:
	cmake -B build/ctest -G Ninja -DCNK_TESTS=ON -DCNK_PYTHON=OFF && cmake --build build/ctest && ctest --test-dir build/ctest --output-on-failure
bench:
	pytest benchmarks/ --benchmark-only
ci:
	bash .ci/run
# Lines by kind. Bench and commands are Python of the package, too; they are counted apart.
size:
	@set -f; count() { printf '%-22s%8d\n' "$$1" "$$(git ls-files $$2 | grep -vE "$$3" | xargs -d '\n' cat | wc -l)"; }; \
	count "product, Python" "convnext_kernels/*.py setup.py" "^convnext_kernels/(bench|cli)/"; \
	count "product, C++, CUDA" "csrc CMakeLists.txt" "^csrc/tests/"; \
	count "bench and commands" "convnext_kernels/bench convnext_kernels/cli benchmarks/*.py" "xxx"; \
	count "proofs" "proofs/*.py" "xxx"; \
	count "tests" "tests csrc/tests" "xxx"; \
	count "docs, examples" "docs/*.md *.md examples release" "xxx"; \
	count "CI" ".ci .github" "xxx"; \
	count "records (JSON, CSV)" "*.json *.csv proofs/records" "xxx"; \
	count "all text" "." "\.(png|svg|ico)$$"
