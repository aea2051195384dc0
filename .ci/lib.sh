# What .ci/run and .ci/extended share: the virtual environment, README's commands, and a table of seconds per gate.
# Sourced by bash.

set -euo pipefail
ROOT=$(git rev-parse --show-toplevel)
cd "$ROOT"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
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
install_extra() {
  python - "$1" <<'PYTHON' | xargs -d '\n' pip install -q
import sys
from importlib.metadata import requires

extra = [r for r in requires("convnext-kernels") if f'extra == "{sys.argv[1]}"' in r and not r.startswith("convnext")]
print("\n".join(r.partition(";")[0].strip() for r in extra))
PYTHON
}

install_doctest() {
  [ -e /usr/include/doctest/doctest.h ] || [ "$(id -u)" != 0 ] ||
    { apt-get update -qq && apt-get install -y -qq doctest-dev >/dev/null; }
}
