"""The reference of keys: current, whole, and with a meaning for each."""

from __future__ import annotations

from pydantic import Field

from mmkd.base.schema import Strict
from mmkd.recipes.recipe import Recipe
from mmkd.testing.key_tables import TARGET, commented, keys, meaning_of, page

KEYS = {key.name: key for key in keys()}


def test_the_page_is_current():
    assert TARGET.read_text(encoding="utf-8") == page(), "run `python -m mmkd.testing.key_tables`"


def test_every_key_has_a_meaning():
    assert len(KEYS) >= 150
    assert [name for name, key in KEYS.items() if not key.meaning] == []


def test_keys_of_all_depths_are_there():
    assert KEYS.keys() >= Recipe.model_fields.keys() - {"writes", "written"}  # which recipes have below `stages`
    rate = KEYS["stages.STAGE.optimiser.learning_rate"]
    assert (rate.kind, rate.default, rate.bounds) == ("number", "`0.001`", "> 0, ≤ 1e+06")
    assert KEYS["stages.STAGE.optimiser.schedule"].kind == "`cosine`, `linear`, `constant`, `constant_with_warmup`"
    assert KEYS["teacher.dtype"].default == "`auto`" and KEYS["output"].default == "—"
    for name in (
        "stages.STAGE.data.0.limit",
        "stages.STAGE.terms.TERM.weight.over",
        "controls.NAME.tries.rates",
        "student.assemble.vision.std",
    ):
        assert name in KEYS


class Example(Strict):
    """An example. third: said by the docstring."""

    first: int = Field(1, gt=0)  # beside it
    # above it,
    # on two lines
    second: str = ""
    third: int = 2
    fourth: int = 3


def test_meanings_are_comments_or_the_docstrings():
    assert commented(Example) == {"first": "beside it", "second": "above it, on two lines", "third": "", "fourth": ""}
    assert [meaning_of(Example, name) for name in Example.model_fields] == [
        "Beside it", "Above it, on two lines", "Said by the docstring", "",
    ]  # fmt: skip
