"""`mmkd list`: cards, and what is registered, also by a user's own module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmkd.cli import main
from mmkd.registry import Registry

MODULE = """
from mmkd.registry import register


@register("samplers", "by_colour")
class ByColour:
    \"\"\"Batches of one colour.

    More of it.
    \"\"\"

    def __init__(self, samples, colours: int = 3, shuffle: bool = True):
        pass


@register("samplers", "plain")
def plain(samples):
    \"\"\"In the order of the data.\"\"\"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module in the current folder, and a registry of samplers that holds nothing else; forgotten afterwards."""
    (tmp_path / "my_samplers.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules["mmkd.registry"]._REGISTRIES, "samplers", Registry("samplers"))
    yield
    sys.modules.pop("my_samplers", None)


def test_what_a_module_registers_is_listed_with_source_and_options(own, capsys):
    assert main(["list", "samplers", "--imports", "my_samplers"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{'by_colour':<32} Batches of one colour.",
        "    from my_samplers:ByColour",
        "    options: colours, shuffle",
        f"{'plain':<32} In the order of the data.",
        "    from my_samplers:plain",
    ]


def test_a_word_is_searched_in_all_that_is_printed(own, capsys):
    assert main(["list", "samplers", "--imports", "my_samplers", "--search", "COLOURS"]) == 0
    assert "by_colour" in (out := capsys.readouterr().out) and "plain" not in out


def test_a_module_that_is_not_there(own, capsys):
    assert main(["list", "samplers", "--imports", "my_samplers,no_such_module"]) == 2
    assert "no_such_module" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [("evaluation", "scienceqa"), ("data", "sample_textvqa"), ("models", "towers/")])
def test_cards_are_listed(kind, name, capsys):
    assert main(["list", kind]) == 0
    assert name in capsys.readouterr().out


def test_a_benchmark_by_its_name(capsys: pytest.CaptureFixture) -> None:
    assert main(["list", "evaluation", "vizwiz"]) == 0
    out = capsys.readouterr().out
    assert "vizwiz: VizWiz test, scored by its server" in out
    assert "split test, 8,000 questions, format vizwiz" in out and "annotations: test.json" in out
    assert "respond with 'Unanswerable'" in out and "up to 16 new tokens" in out
    assert "published 41.5 LLaVA-KD Qwen2.5-0.5B" in out and "https://vizwiz.org" in out
    assert main(["list", "evaluation", "vizwix"]) == 2
    assert "'vizwiz'" in capsys.readouterr().err
    assert main(["list", "formats", "vizwiz"]) == 2
    assert "mmkd list evaluation vizwiz" in capsys.readouterr().err
