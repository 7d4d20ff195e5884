#!/usr/bin/env bash
# The main job from a fresh clone: installs, writes the embedded sample, distils, compares teacher, controls and student.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
.venv/bin/mmkd sample runs/sample --sizes train=4000,val=200,test=400
.venv/bin/mmkd sample runs/unlabelled --seed 7 --sizes train=400,val=2,test=2
exec .venv/bin/mmkd distill scripts/recipes/quickstart.yaml "$@"
