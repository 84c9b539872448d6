# Sourced by the other scripts here: finds a Python, makes the virtual environment, installs.
#   PYTHON         the interpreter to use; without it, the first of python3.13 to python3 that is new enough
#   MASS_DPO_VENV  where the environment lives; .venv without it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${MASS_DPO_VENV:-.venv}"

# XLA asks for a CPU step's memory as one piece and gives it back after every step. In pages of 4 KB the
# kernel spends a tenth of a step and more on handing them out (docs/performance.md); this asks for large
# ones (glibc on Linux).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

say() { printf '==> %s\n' "$*"; }

# Being on the PATH is not enough: version managers leave commands there that do not run, and
# some distributions ship a Python that cannot make environments.
usable() {
  "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    if usable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "No usable Python 3.11 or newer was found (looked for: ${PYTHON:-python3.13, python3.12, python3.11, python3, python})." >&2
  echo "Install one with its venv module, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

# Everything that decides what is installed, as one short text.
key() {
  "$venv/bin/python" - "$@" <<'END'
import hashlib, pathlib, sys

contents = b"".join(pathlib.Path(name).read_bytes() for name in ("setup.cfg", "pyproject.toml"))
words = [hashlib.sha256(contents).hexdigest(), sys.version, str(pathlib.Path.cwd()), *sys.argv[1:]]
print("\n".join(words))
END
}

# install NAME REQUIREMENTS...: pip-installs each argument in turn (an argument may hold pip options),
# unless the same was installed before.
install() {
  local name="$1" python stamp requirement
  shift
  stamp="$venv/.installed-$name"
  if ! usable "$venv/bin/python"; then
    python="$(find_python)"
    say "Making a virtual environment in $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(key "$@")" ]; then
    say "Using the environment in $venv"
    return
  fi
  for requirement in "$@"; do
    say "Installing $requirement (the first time takes a few minutes)"
    # shellcheck disable=SC2086  # options and requirement are separate words
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check $requirement
  done
  key "$@" >"$stamp"
}
