#!/usr/bin/env bash
# The full test suite, with lint and types, in an environment of its own: launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment "[test]"

ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile "$@"
