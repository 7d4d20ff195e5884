#!/usr/bin/env bash
# The whole test suite from a fresh clone.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "[test]"
exec .venv/bin/python -m pytest "$@"
