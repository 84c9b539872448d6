#!/usr/bin/env bash
# Checks the project: ruff, mypy, pytest.
#   bash launch/test.sh          all but the tests marked as slow: minutes
#   bash launch/test.sh --all    every test
#   bash launch/test.sh WORDS    pytest WORDS, as in: bash launch/test.sh tests/losses/test_one_chosen.py -k odpo
#   MASS_DPO_TEST_DATA  folder with the real data sets; tests that need them skip without it
#   MASS_DPO_TORCH      what to install as PyTorch, which only the tests use. On Linux, PyPI's wheel brings
#                       gigabytes of CUDA libraries along; the smaller one without them:
#                       MASS_DPO_TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
# See launch/environment.sh for PYTHON and MASS_DPO_VENV.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# PyTorch first: what comes after it must not choose another build of it.
install test "${MASS_DPO_TORCH:-torch==2.13.0}" "-e .[test,docs]"
if ! command -v nvidia-smi >/dev/null && compgen -G "$venv/lib/python3*/site-packages/nvidia/*" >/dev/null; then
  say "Note: PyTorch brought CUDA libraries to a machine without a GPU; see MASS_DPO_TORCH in launch/test.sh"
fi

say "ruff"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
say "mypy"
"$venv/bin/mypy"
say "pytest"
case "${1:-}" in
  "") set -- -m "not slow" ;;
  --all) shift ;;
esac
# A file's tests stay in one process, where they share what was compiled for the first of them.
exec "$venv/bin/python" -m pytest --numprocesses=auto --dist=loadfile "$@"
