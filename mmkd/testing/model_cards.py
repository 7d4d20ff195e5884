"""Cards of models: encoders, projectors, language models, towers and teacher -> student pairs that people use.

A card is what one wants to know before a download: licence, size, what the vocabulary and the visual tokens are. The table of
families in models/README.md comes from the results of `mmkd check --families --json models/families.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from mmkd.base.cards import card_folders, list_cards, load_card
from mmkd.base.schema import Strict
from mmkd.errors import DataError

KINDS = ("encoders", "projectors", "languages", "towers", "pairs")
FAMILIES = "families.json"  # beside the cards
UNVERIFIED = "unverified"


class ModelCard(Strict):
    """One model.

    source: what `vision.source`, `language.source` or `teacher.model` of a recipe takes; of a pair, the teacher's card.
    revision: the commit that was looked at, or "unverified".  parameters: in millions.  family: its model type.
    image_size: side in pixels, or how it varies.  visual_tokens: of one picture, a number or how they come about.
    """


    name: str
    title: str
    source: str
    licence: str
    family: str = ""
    revision: str = UNVERIFIED
    parameters: float | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    image_size: str = ""
    visual_tokens: str = ""
    vocabulary: str = ""
    student: str = ""
    alignment: str = ""
    notes: str = ""


def model_cards(kind: str, search: str = "") -> dict[str, ModelCard]:
    """Cards of a kind of KINDS whose words hold `search` (case does not matter), by name. Raises DataError."""
    if kind not in KINDS:
        raise DataError(f"models have the kinds {', '.join(KINDS)}, not {kind!r}")
    folder = f"models/{kind}"
    cards = {name: load_card(folder, name, ModelCard) for name in list_cards(folder)}
    return {name: card for name, card in cards.items() if search.lower() in _words(card)}


def _words(card: ModelCard) -> str:
    return " ".join(map(str, card.model_dump().values())).lower()


def families() -> dict[str, dict]:
    """The results of the latest check of all families. Raises DataError when there is no such file."""
    for folder in card_folders("models"):
        if (folder / FAMILIES).is_file():
            return json.loads((folder / FAMILIES).read_text(encoding="utf-8"))
    raise DataError(f"there is no models/{FAMILIES}; write it: mmkd check --families --json models/{FAMILIES}")


def readme() -> str:
    """The text of models/README.md."""
    from mmkd.testing.family_check import markdown_table

    results = families()
    full, rows = (sum(result[key] for result in results.values()) for key in ("ok", "rows"))
    tables = "\n".join(f"## {kind.capitalize()}\n\n{_table(kind)}\n" for kind in KINDS)
    head = README_FAMILIES.format(full=full, rows=rows, all=len(results))
    return README_HEAD + tables + head + markdown_table(results) + README_FOOT


def _table(kind: str) -> str:
    rows = ["| card | what | source | licence | M parameters | visual tokens | vocabulary |", "|---|---|---|---|---|---|---|"]
    for card in model_cards(kind).values():
        size = f"{card.parameters:g}" if card.parameters else ""
        cells = (f"`{card.name}`", card.title, f"`{card.source}`", card.licence, size, card.visual_tokens, card.vocabulary)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


README_HEAD = """\
The code is in `mmkd/towers`; this folder holds models that the recipes start from, and cards of others.

# Models

| folder | what | parameters | made by |
|---|---|---|---|
| `sample-teacher` | teacher of the embedded sample, trained on 8,000 scenes of each set with majority labels | 1,353,356 | \
`mmkd distill scripts/recipes/sample_teacher.yaml` |
| `sample-student` | student before any question: a tiny tower that knows captions, of pictures and of their parts | 134,361 | \
`mmkd distill scripts/recipes/sample_student.yaml` |

Both are plain transformers folders (safetensors; FocalNet encoder, MLP projector, Llama) and share a tokenizer of 640
byte-level tokens.

Scores of `sample-teacher` on the sample's test splits, with 95 % intervals over pictures: TextVQA form 96.6 % [95.5, 97.7]
(without pictures 6.4 %; text of signs 92 %, all other kinds 100 %); ScienceQA form 61.1 % [58.8, 63.3] (without pictures
34.5 %; count 98 %, shape 98 %, place 100 %). Questions whose choices come in random order, and those about texts, it
answers at chance (35 to 45 %).

Make the data first: `mmkd sample runs/sample-large --sizes train=8000,val=200,test=400`. Training took about 25 minutes for
the teacher and five for the student, each on one core of a shared AMD EPYC.

# Cards

Facts of models that people use, as their publishers describe them. None was downloaded or measured here: sizes are approximate,
licences are to be read at the source, and every revision is "unverified" (pin the one that you use). `mmkd list models` prints
them, `mmkd list models --search llava` those that match. Cards of your own go into `<folder>/models/<kind>/`, with
`MMKD_CARDS=<folder>`.

"""
README_FAMILIES = """
# Families of transformers

Of {all} image-text families of transformers {full} keep the contract of a tower, and {rows} that of a teacher of rows: their
pictures need be no tokens of their text, and the terms that compare answers (KL, JSD, DBiLD and the like at `positions:
response`) work with them, cached or not. Each was built with a tiny random configuration and its own processor classes.
`project` says whether the visual switch and `feature_match` work with it.

"""
README_FOOT = """

Run `mmkd check --families --json models/families.json`, then `python -m mmkd.testing.model_cards`; edit the cards, not the
tables.
"""


if __name__ == "__main__":
    (Path(__file__).resolve().parents[2] / "models" / "README.md").write_text(readme(), encoding="utf-8")
