"""`scripts/bench/families.py`: what it builds is there, and what it reads from a run is judged rightly."""

import sys
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmkd.towers.templates import CHAT_TEMPLATES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
from families import FAMILIES, STEPS, TEMPLATES, _with_ids, problems, table

ROW = {
    "family": "x", "of": "X-1B", "parameters": 2_000_000, "vocabulary": 1000, "keys": {"processor": {"max_pixels": 9}},
    "term": "spans", "teacher_tokens": [1, 2, 3000], "student_tokens": [1, 2, 3], "first": 3.0, "last": 2.0, "steps": STEPS,
    "left_out": [{"id": "66", "reason": "cut: short"}], "peak_gb": 1.0, "seconds": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_names_what_there_is(name: str) -> None:
    family = FAMILIES[name]
    assert family.kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    for part in (family.image_processor[0], family.processor[0], family.video_processor):
        assert part is None or hasattr(transformers, part)
    assert (TEMPLATES / f"{family.template}.jinja").is_file() or family.template in CHAT_TEMPLATES
    assert {*family.ends.values(), *family.names.values(), *family.stop} <= {*family.control}
    whole = max(family.size, family.fill) + len(family.control)
    assert whole <= family.config["text_config"]["vocab_size"]
    config = _with_ids(family, {key: number for number, key in enumerate({**family.ends, **family.names})})
    assert {"image_token_id", "image_token_index"} & config.keys()


def test_a_row_that_lost_something_is_told() -> None:
    assert problems(ROW) == []
    line = (
        "| `x` | X-1B | 2 M | 1,000 | `processor: {max_pixels: 9}` | spans | 1 / 2 / 3,000 | 1 / 2 / 3 | 66 (cut) "
        "| 3.00 → 2.00 | 1.0 GB | 7 |"
    )
    assert line in table([ROW])
    assert "does not fall" in problems({**ROW, "last": 3.1})[0] and "3 of 20 steps" in problems({**ROW, "steps": 3})[0]
    for left_out in ([], [{"id": "65", "reason": "?"}], [*ROW["left_out"], {"id": "3", "reason": "?"}]):
        assert "it should be the broken picture's row" in problems({**ROW, "left_out": left_out})[0]
