"""From an answer to a training row, and from rows to a data set with its provenance and its card."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.base.files import save_whole, write_whole
from mmkd.base.jsonl import lines_of
from mmkd.data.samples import IMAGE_MARKER
from mmkd.errors import DataError, ImageError, SampleError, one_line
from mmkd.writing.card import PromptCard
from mmkd.writing.checks import Candidate
from mmkd.writing.prompts import Digests, Prompt, encoded
from mmkd.writing.templates import filled
from mmkd.writing.words import texts_in

ROWS, DROPPED, FACTS, CARD = "train.jsonl", "dropped.jsonl", "facts.json", "README.md"


class RowError(ValueError):
    """Why no row can be made of an answer."""


def row_of(card: PromptCard, prompt: Prompt, written: Any) -> dict[str, Any]:
    """{question, answer, choices, hint, told, categories} as they would be trained. Raises RowError."""
    spec, values = card.row, {**prompt.fields, "written": written}
    try:
        row: dict[str, Any] = {"question": filled(spec.question, values)}
        row["answer"] = written if spec.answer is None else filled(spec.answer, values)
        row["hint"] = prompt.question.hint if spec.hint is None else filled(spec.hint, values)
        row["told"] = {name: filled(text, values) for name, text in spec.told.items()}
        row["categories"] = {**prompt.question.categories, **{name: filled(t, values) for name, t in spec.categories.items()}}
        if spec.choices is not None:
            row["choices"] = [line.strip() for line in filled(spec.choices, values).splitlines() if line.strip()]
    except DataError as error:
        raise RowError(one_line(error, 120)) from error
    if not isinstance(row["answer"], str):
        row["answer"] = str(row["answer"]["answer"]) if isinstance(row["answer"], dict) else str(row["answer"])
    choices = prompt.question.choices
    stay = card.form.kind == "letter" if spec.keep_choices is None else spec.keep_choices
    if spec.choices is None and stay and choices:
        row["choices"] = list(choices)
    _refuse(row)
    return row


def _refuse(row: Mapping[str, Any]) -> None:
    """Raises RowError for what no format could read again."""
    for name in ("question", "answer"):
        if not row[name].strip():
            raise RowError(f"empty {name}")
    if any(IMAGE_MARKER in text for text in texts_in(dict(row))):
        raise RowError("a marker of pictures in the text")
    choices = row.get("choices")
    if choices is None:
        return
    if not 2 <= len(choices) <= 26 or len(set(choices)) < len(choices):
        raise RowError("choices that are too few, too many or the same")
    if row["answer"] not in choices:
        raise RowError("the answer is none of the choices")


@dataclass
class Receipt:
    """What became of all answers. dropped: by check and reason.  tokens: that endpoints counted."""

    prompts: int = 0
    unasked: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    kept: int = 0
    tokens: Counter[str] = field(default_factory=Counter)

    def drop(self, check: str, reason: str) -> None:
        self.dropped.setdefault(check, Counter())[reason] += 1

    def facts(self) -> dict[str, Any]:
        dropped = {check: dict(counts) for check, counts in self.dropped.items() if counts}
        facts = {
            "prompts": self.prompts,
            "unasked": dict(self.unasked),
            "answers": self.answers,
            "dropped": dropped,
            "kept": self.kept,
        }
        return facts | ({"tokens": dict(self.tokens)} if self.tokens else {})

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Receipt:
        """The receipt that `facts` gave."""
        found = cls(facts["prompts"], Counter(facts["unasked"]), facts["answers"], kept=facts["kept"])
        found.dropped = {check: Counter(counts) for check, counts in facts["dropped"].items()}
        found.tokens = Counter(facts.get("tokens", {}))
        return found

    def lines(self) -> list[str]:
        """For people: what was dropped, by which check, why."""
        found = [f"{self.answers:,} answers to {self.prompts:,} prompts, {self.kept:,} kept"]
        if self.unasked:
            found.append(f"not asked: {sum(self.unasked.values()):,} ({_counts(self.unasked)})")
        return found + [f"dropped by {check}: {sum(c.values()):,} ({_counts(c)})" for check, c in self.dropped.items() if c]


def _counts(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def save_rows(
    target: Path, candidates: Iterable[Candidate], receipt: Receipt, dropped: Iterable[Mapping[str, str]],
    about: Mapping[str, Any], provenance: Mapping[str, Any], digests: Digests,
) -> None:  # fmt: skip
    """Writes a data set whole: rows, their pictures, what was dropped, facts and a card. Raises DataError where there is no room.

    candidates: rows in their order, read while it is written.  dropped: filled meanwhile.  about: of the stage, for the card.
    provenance: of every row.
    """

    def write(folder: Path) -> None:
        (folder / "images").mkdir(parents=True)
        with (folder / ROWS).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            for one in candidates:
                try:
                    names = [_save_picture(folder / "images", picture, digests) for picture in one.pictures]
                except (ImageError, SampleError):
                    receipt.drop("pictures", "cannot be read")
                    continue
                stream.write(lines_of([_line(one, names, provenance)]))
                receipt.kept += 1
        with (folder / DROPPED).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            stream.write(lines_of(dropped))
        write_whole(folder / FACTS, json.dumps({**about, **receipt.facts()}, indent=1) + "\n")
        write_whole(folder / CARD, card_of(about, receipt))

    save_whole(target, write)


def _save_picture(folder: Path, picture: Any, digests: Digests) -> str:
    """Under the hash of its content, so that equal pictures are one file."""
    content, ending = encoded(picture)
    name = f"{hashlib.blake2b(content, digest_size=16).hexdigest()}{ending}"
    if not (folder / name).exists():
        (folder / name).write_bytes(content)
    return name


def _line(one: Candidate, names: list[str], provenance: Mapping[str, Any]) -> dict[str, Any]:
    row = {"id": one.id, "question": one.row["question"], "answer": one.row["answer"]}
    row |= {"choices": one.row["choices"]} if one.row.get("choices") else {}
    row |= {"hint": one.row["hint"]} if one.row.get("hint") else {}
    row |= {"images": names} if names else {}
    row |= {"ocr_tokens": list(one.question.ocr_tokens)} if one.question.ocr_tokens else {}
    row |= {name: one.row[name] for name in ("categories", "told") if one.row.get(name)}
    notes = {name: value for name, value in one.notes.items() if name not in ("asked", "request", "model")}
    said = {
        "by": one.author,
        "model": one.notes["model"],
        "of": one.question.id,
        "number": one.number,
        "request": one.notes["request"],
    }
    said["answer"] = hashlib.blake2b(one.text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
    return row | {"provenance": {**provenance, **said, **({"notes": notes} if notes else {})}}


def card_of(about: Mapping[str, Any], receipt: Receipt) -> str:
    """The data card: what was asked of whom, what was kept, what was dropped and why."""
    dropped = [(check, reason, count) for check, counts in receipt.dropped.items() for reason, count in sorted(counts.items())]
    unasked = [("(not asked)", reason, count) for reason, count in sorted(receipt.unasked.items())]
    rows = "\n".join(f"| {check} | {reason} | {count:,} |" for check, reason, count in [*unasked, *dropped]) or "| none | | 0 |"
    facts = {key: value for key, value in about.items() if key not in ("stage", "prompt")}
    lines = "\n".join(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())
    tokens = (
        f" The endpoints counted {', '.join(f'{n:,} {name} tokens' for name, n in receipt.tokens.items())}."
        if receipt.tokens
        else ""
    )
    return (
        f"# Rows that stage {about['stage']} wrote\n\nWritten by a model, not by people: {receipt.answers:,} answers to "
        f"{receipt.prompts:,} prompts, of which {receipt.kept:,} became rows.{tokens} Each row of `{ROWS}` has its `provenance`; "
        f"`{DROPPED}` names what was dropped. Read it by `data: [{{from: {about['stage']}}}]` in the recipe that wrote it,\n"
        f"or as `{{format: jsonl, root: THIS_FOLDER}}` in any other.\n\n## How it was made\n\n{lines}\n\nThe prompt:\n\n"
        f"{_quoted(str(about['prompt']))}\n\n## What was dropped\n\n| check | why | answers |\n|---|---|---|\n{rows}\n"
    )


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
