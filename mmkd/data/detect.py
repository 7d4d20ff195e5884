"""Finds out how data of a user's own are laid out: format, split, columns, pictures. For a recipe that somebody begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmkd.base.cards import list_cards
from mmkd.data.annotations import parse
from mmkd.data.row_files import begins_list, list_entries
from mmkd.errors import DataError, one_line

# Names under which people keep the same thing, the likeliest first.
COLUMNS = {
    "question": ("question", "query", "prompt", "problem", "instruction", "input", "text"),
    "answer": ("answer", "answers", "response", "output", "label", "target", "caption", "solution"),
    "image": ("image", "images", "image_path", "image_file", "img", "picture", "file_name", "filename", "path"),
}
OWN = {"question": ("question",), "answer": ("answer", "answers"), "image": ("image", "images")}  # what `jsonl` reads unasked
ROWS = 200  # of a file that are looked at
SHORT_ANSWER = 4  # words, of nine answers in ten


def detect(given: str) -> dict[str, Any]:
    """A data entry of a recipe for a data card's name, a folder or a file. Raises DataError with what was found instead."""
    path = Path(given).expanduser()
    if not path.exists():
        if given in list_cards("data"):
            return {"card": given}
        raise DataError(
            f"there is no folder or file {given} here (in {Path.cwd()}), and no data card of this name: `mmkd list data`"
        )
    file = path if path.is_file() else _annotations_in(path)
    root = file.parent if path.is_file() else path
    if file.suffix == ".parquet":
        return _of_table(file, root)
    rows = list(islice(_rows(file), ROWS))
    if not rows:
        raise DataError(f"{file} holds no rows; is the download complete?")
    return _entry(file, root, rows)


def other_split(entry: Mapping[str, Any]) -> str | None:
    """A split beside the entry's own that looks like the same data kept apart for tests; None where there is none."""
    if entry.get("format") != "jsonl":
        return None
    found = (name for name in ("test", "val", "validation", "dev") if (Path(entry["root"]) / f"{name}.jsonl").is_file())
    return next((name for name in found if name != entry.get("split", "train")), None)


def _annotations_in(folder: Path) -> Path:
    """The file of a folder that holds its rows: train before all others."""
    names = [path for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".json", ".parquet") and path.is_file()]
    names = names or sorted(folder.glob("data/*.parquet"))
    if not names:
        raise DataError(
            f"{folder} holds no .jsonl, .json or .parquet file; give the file with the rows, or make one as docs/distil.md, "
            '"Your own data", shows'
        )
    first = [path for path in names if path.stem == "train" or path.stem.startswith("train-")] or names
    if len(first) > 1 and first is names and names[0].suffix != ".parquet":
        raise DataError(f"{folder} holds {', '.join(path.name for path in names[:6])}; say which: --data {names[0]}")
    return first[0]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if begins_list(file):
        values: Iterator[Any] = (value for _, _, value in list_entries(file))
    else:
        values = _lines(file)
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(f"{file}: row {number + 1} is no object but {type(value).__name__}")
        yield value


def _lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig", errors="strict") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield parse(line, f"{file} line {number}")


def _entry(file: Path, root: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = rows[0].keys()
    kind = "llava" if "conversations" in keys else "preference" if {"chosen", "rejected"} <= {*keys} else "jsonl"
    files: dict[str, str] = {}
    if kind == "jsonl":
        columns = {part: next((name for name in names if name in keys), None) for part, names in COLUMNS.items()}
        if columns["question"] is None or columns["answer"] is None:
            lacking = " and ".join(part for part in ("question", "answer") if columns[part] is None)
            raise DataError(
                f"{file}: no key of its rows looks like the {lacking}; they have {one_line(', '.join(keys))}. Known are rows of "
                "question, answer and image, of LLaVA's conversations, and of chosen and rejected answers; name the keys in the "
                "recipe's `files` (docs/distil.md)"
            )
        files = {f"field.{part}": name for part, name in columns.items() if name and name not in OWN[part]}
    split = file.stem
    expected = f"{split}.jsonl" if kind != "llava" or file.suffix == ".jsonl" else f"{split}.json"
    if file.name != expected:
        files["annotations"] = file.name
    column = next((name for name in COLUMNS["image"] if name in keys), None)
    if (place := _pictures(root, split, rows, column)) is not None:
        files["images"] = place
    entry: dict[str, Any] = {"format": kind, "root": str(root)} | ({"split": split} if split != "train" else {})
    entry |= {"prompt": _style(rows, columns["answer"])} if kind == "jsonl" else {}
    if not any(row.get(column) for row in rows if column):
        entry["text_only"] = True
    return entry | ({"files": files} if files else {})


def _style(rows: Sequence[Mapping[str, Any]], answer: str) -> str:
    """How questions are put: by letters where they have choices, for a word or phrase where that is what answers are."""
    if all(isinstance(row.get("choices"), list) and row["choices"] for row in rows):
        return "letter"
    words = [len(str(row.get(answer, "")).split()) for row in rows]
    return "short" if sum(count <= SHORT_ANSWER for count in words) >= 0.9 * len(words) else "plain"


def _pictures(root: Path, split: str, rows: Sequence[Mapping[str, Any]], column: str | None) -> str | None:
    """The folder or zip below `root` that the rows' pictures are in, where no format would look first; None where one does."""
    name = next((row[column] for row in rows if row.get(column)), None) if column else None
    name = name[0] if isinstance(name, list) and name else name
    if not isinstance(name, str):
        return None
    usual = [place for place in (f"{split}_images.zip", f"images/{split}", "images", ".") if (root / place).exists()]
    others = sorted(p.relative_to(root).as_posix() for p in [*root.glob("*/"), *root.glob("*/*/")] if p.is_dir())[:1000]
    for place in [*usual, *others]:
        if not place.endswith(".zip") and (root / place / name).is_file():
            return None if place == usual[0] else place
    return None


def _of_table(file: Path, root: Path) -> dict[str, Any]:
    from pyarrow.parquet import read_schema

    names = read_schema(file).names
    columns = {part: next((name for name in known if name in names), None) for part, known in COLUMNS.items()}
    if lacking := [part for part, name in columns.items() if name is None]:
        raise DataError(
            f"{file}: no column looks like the {' and '.join(lacking)}; it has {one_line(', '.join(names))}. Name them in the "
            "recipe's `files` (docs/scale.md, format `datasets`)"
        )
    split = file.stem.partition("-")[0]
    files = {part: name for part, name in columns.items() if name != part}
    entry: dict[str, Any] = {"format": "datasets", "root": str(root)} | ({"split": split} if split != "train" else {})
    return entry | ({"files": files} if files else {})
