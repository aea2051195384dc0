# Shortcuts for developers; each is one command that also stands in CONTRIBUTING.md.
.PHONY: install test extended lint format cxx bench ci

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
