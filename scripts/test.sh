#!/usr/bin/env bash
# The whole test suite from a fresh clone, in two processes of one thread each.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "[test]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
