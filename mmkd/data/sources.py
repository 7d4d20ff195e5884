"""From a recipe's `data:` entry to training samples: the card, the reader, the prompt."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mmkd.base.cards import list_cards, load_card
from mmkd.data.formats import read_conversations, read_questions
from mmkd.data.preference import read_preferences
from mmkd.data.prompts import render
from mmkd.data.samples import Sample
from mmkd.data.stream import STREAMS, Stream, open_stream
from mmkd.errors import DataError


class DataCard(BaseModel):
    """A data set's card: what its files are and how its questions are put to a model."""

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    format: Literal["scienceqa", "textvqa", "jsonl", "easy_vqa", "llava", "preference", "shards", "datasets"]
    root: str
    prompt: Literal["letter", "short", "plain"] = "plain"
    ocr: bool = False
    files: dict[str, str] | None = None
    target: Literal["first", "majority", "sampled"] = "first"
    licence: str = ""
    source: str = ""
    notes: str = ""


def resolve(spec: Any) -> dict[str, Any]:
    """The fields of a recipe's data entry, its card's first and its own over them. Raises DataError."""
    about = {"name", "title", "licence", "source", "notes"}
    card = load_card("data", spec.card, DataCard).model_dump(exclude=about) if spec.card else {}
    given = {k: v for k, v in spec.model_dump(exclude={"card"}).items() if v is not None}
    fields = {"prompt": "plain", "ocr": False, "files": None, "target": "first", **card, **given}
    missing = [name for name in ("format", "root") if name not in fields]
    if missing:
        raise DataError(f"a data entry lacks {' and '.join(missing)}; give them or name a `card`")
    return fields


def folder_of(fields: dict[str, Any], data_root: str | None) -> Path:
    """Where a data entry's files are: `data_root`/root if that is there, else root itself. Raises DataError."""
    candidates = [Path(fields["root"]).expanduser()]
    if data_root is not None:
        candidates.insert(0, Path(data_root).expanduser() / fields["root"])
    found = next((folder for folder in candidates if folder.exists()), None)
    if found is None:
        raise DataError(
            f"there is no data folder {' or '.join(map(str, candidates))}; get the data there, or set data_root or the "
            "entry's root"
        )
    return found


def read_samples(spec: Any, seed: int, data_root: str | None = None) -> list[Sample]:
    """The training samples of one data entry, its subset drawn by `seed`; of a stream its first ones. Raises DataError."""
    stream = stream_of(spec, seed, data_root)
    if stream is not None:
        return stream.head()
    fields = resolve(spec)
    root = folder_of(fields, data_root)
    subset = {"limit": fields.get("limit"), "image_limit": fields.get("image_limit"), "seed": seed}
    if fields["format"] == "llava":
        samples = read_conversations(root, fields["split"], files=fields["files"], **subset)
    elif fields["format"] == "preference":
        samples = read_preferences(root, fields["split"], files=fields["files"], **subset)
    else:
        questions = read_questions(
            fields["format"], root, fields["split"], files=fields["files"], target=fields["target"], **subset
        )
        samples = [render(q, fields["prompt"], with_answer=True, ocr=fields["ocr"]) for q in questions]
    return _weighted(samples, fields["weight"], seed)


def stream_of(spec: Any, seed: int, data_root: str | None = None) -> Stream | None:
    """The stream of a data entry, None for one whose samples are all read. Raises DataError."""
    fields = resolve(spec)
    if fields["format"] not in STREAMS:
        return None
    root = folder_of(fields, data_root) if fields["format"] == "shards" else fields["root"]
    return open_stream(fields, root, seed)


def _weighted(samples: list[Sample], weight: float, seed: int) -> list[Sample]:
    """`weight` copies of the set; the fraction is drawn."""
    whole, part = int(weight), weight - int(weight)
    drawn = random.Random(f"weight {seed}").sample(samples, round(part * len(samples)))
    return samples * whole + drawn


README_HEAD = """\
The code is in `mmkd/data`; this folder holds cards only.

# Data sets

A card says what a data set's files are and how its questions are put to a model. A recipe names it (`data: [{card: scienceqa}]`)
and says where it lies (`data_root=FOLDER`; the card's `root` is looked for inside, then as it stands). Everything of a card
can be given in the recipe instead, for data of your own: `{format: jsonl, root: my_data, prompt: plain}` reads
`my_data/train.jsonl` with `{"image": "a.png", "question": "...", "answer": "..."}` a line. Cards of your own go into
`<folder>/data/`, with `MMKD_CARDS=<folder>`.

| card | what | format | prompt | licence |
|---|---|---|---|---|
"""
README_FOOT = "\nThis table is written by `python -m mmkd.data.sources`; edit the cards, not the table.\n"


def readme() -> str:
    """The text of data/README.md: one row a card."""
    cards = [load_card("data", name, DataCard) for name in list_cards("data")]
    rows = [f"| `{c.name}` | {c.title} | {c.format} | {c.prompt} | {c.licence} |" for c in cards]
    return README_HEAD + "\n".join(rows) + "\n" + README_FOOT


if __name__ == "__main__":
    (Path(__file__).resolve().parents[2] / "data" / "README.md").write_text(readme(), encoding="utf-8")
