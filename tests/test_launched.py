"""One of several processes ends with its code and with all that it printed."""

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import logging, sys
from mmkd.launched import end_process, is_main_process, rank, world_size
print(rank(), world_size(), is_main_process())
end_process(3)
"""


@pytest.mark.parametrize(("launched", "said"), [({}, "0 1 True"), ({"RANK": "1", "WORLD_SIZE": "2"}, "1 2 False")])
def test_a_process_ends_with_its_code_and_its_output(launched, said):
    environment = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, **launched}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, said, "")
