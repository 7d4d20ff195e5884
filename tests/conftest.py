"""Makes `tiny` importable from every test folder, keeps small models on one thread, and tests off the network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
