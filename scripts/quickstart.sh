#!/usr/bin/env bash
# The main job from a fresh clone: installs, writes the embedded sample, distils, compares teacher, control and student.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
.venv/bin/mmkd sample runs/sample --sizes train=4000,val=200,test=400
exec .venv/bin/mmkd distill scripts/recipes/quickstart.yaml "$@"
