"""How far long work has come: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from mmkd.base import bars
from mmkd.base.bars import BesideBars, Lines, bar, in_time


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3540, "59 min"), (3600, "1 h"), (7140, "1 h 59 min"), (7170, "2 h"),
     (86_399, "1 d"), (90_000, "1 d 1 h"), (172_000, "2 d")],
)  # fmt: skip
def test_times_in_words(seconds, words):
    assert in_time(seconds) == words


def test_a_line_each_minute_where_nobody_watches(monkeypatch, caplog, capsys):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "mmkd")
    with bar(1000, "teacher cache", "sample") as told:
        for _ in range(10):
            now[0] += 20.0
            told.update(50)
    assert caplog.messages == [
        "teacher cache: 150 of 1,000 samples, 2.5 a second, 6 min left",
        "teacher cache: 300 of 1,000 samples, 2.5 a second, 5 min left",
        "teacher cache: 450 of 1,000 samples, 2.5 a second, 4 min left",
    ]
    assert told.n == 500 and capsys.readouterr().err == ""


def test_nothing_is_told_where_another_process_tells(monkeypatch, caplog):
    monkeypatch.setattr(bars, "MINUTE", 0.0)
    caplog.set_level(logging.INFO, "mmkd")
    with bar(None, "x", "answer", shown=False) as quiet, bar(None, "y", "answer") as told:
        quiet.update()
        told.update()
    assert [line.partition(":")[0] for line in caplog.messages] == ["y"] and quiet.n == 1


def test_lines_stand_above_the_bar_of_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = BesideBars(terminal)
    with bar(10, "work", "step", delay=0, mininterval=0) as told:
        assert not isinstance(told, Lines)
        told.update(3)
        handler.emit(logging.LogRecord("mmkd", logging.INFO, "", 0, "a line", None, None))
        told.update(7)
    written = terminal.getvalue()
    place = written.index("a line\n")
    assert written[:place].endswith("\r")  # the bar was wiped
    assert "work" in written[:place] and "10/10" in written[place:]


PROGRAM = """
from mmkd.base.bars import quiet_libraries
quiet_libraries()
from tqdm import tqdm
from transformers.utils import logging as library
for _ in tqdm(range(3)): pass
for _ in library.tqdm(range(3), desc="Loading weights"): pass
"""


def test_other_libraries_draw_no_bars_into_files():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
