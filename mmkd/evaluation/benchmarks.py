"""What a benchmark is: a card in `evaluation/` that says what is asked, how, and how answers are scored."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mmkd.cards import did_you_mean, list_cards, load_card
from mmkd.data.formats import read_questions
from mmkd.data.prompts import render
from mmkd.data.samples import DataError, Question, Sample
from mmkd.evaluation.parsers import PARSERS
from mmkd.evaluation.pope import read_pope
from mmkd.evaluation.scorers import METRICS

KIND = "evaluation"


class ReferenceScore(BaseModel):
    """A published number, to compare with when split, prompt, OCR switch and parser are the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    score: float = Field(ge=0, le=100, description="in percent, as published")
    subset: str = Field("all", description="the part of the split that the number is for")
    source: str


class Benchmark(BaseModel):
    """One benchmark's card. Keys that are not listed here are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str = Field(description="one line for lists and tables")
    format: Literal["scienceqa", "textvqa", "easy_vqa", "jsonl", "pope"]
    root: Path = Field(description="the data's folder, absolute or below the data root")
    split: str
    files: dict[str, str] = Field(
        default_factory=dict, description="file names that differ from the format's own"
    )
    expected_rows: int | None = Field(
        None, gt=0, description="rows of the official split; a difference is reported"
    )
    prompt_style: Literal["letter", "short", "plain"]
    ocr: bool = Field(False, description="add the data set's OCR tokens to the prompt")
    parser: str = "identity"
    metric: str
    also: tuple[str, ...] = Field((), description="further metrics, reported beside the headline")
    max_new_tokens: int = Field(16, gt=0, le=4096)
    categories: tuple[str, ...] = Field((), description="the groups that the score is broken down by")
    reference_scores: tuple[ReferenceScore, ...] = ()
    notes: str = ""

    @field_validator("parser")
    @classmethod
    def _known_parser(cls, value: str) -> str:
        if value not in PARSERS:
            raise ValueError(f"there is no parser {value!r}; {did_you_mean(value, PARSERS)}")
        return value

    @field_validator("metric", "also")
    @classmethod
    def _known_metric(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in [value] if isinstance(value, str) else value:
            if name not in METRICS:
                raise ValueError(f"there is no metric {name!r}; {did_you_mean(name, METRICS)}")
        return value

    def data_folder(self, data_root: Path | str | None = None) -> Path:
        """Where the data lies: `data_root`/`root` if that is a folder, else `data_root` itself, else `root`.

        Raises DataError when there is no such folder.
        """
        candidates = [Path(data_root) / self.root, Path(data_root)] if data_root else [self.root]
        for folder in candidates:
            if folder.expanduser().is_dir():
                return folder.expanduser()
        raise DataError(
            f"benchmark {self.name!r}: there is no folder {candidates[-1]}; get the data and give its "
            f"folder with --data-root. The card's notes: {self.notes.strip() or 'none'}"
        )

    def read(self, data_root: Path | str | None = None, limit: int | None = None) -> list[Question]:
        """The questions in the data set's order; `limit` keeps a random subset, the same one every time.

        Raises DataError on anything wrong with the data (see `mmkd.data.formats`).
        """
        folder = self.data_folder(data_root)
        if self.format == "pope":
            return _subset(read_pope(folder, self.split, files=self.files), limit)
        return read_questions(self.format, folder, self.split, files=self.files, limit=limit)

    def on_split(self, split: str) -> Benchmark:
        """The same questions' other split, under a name of its own: no published score is for it."""
        changes = {"name": f"{self.name}_{split}", "split": split, "expected_rows": None, "reference_scores": ()}
        return self.model_copy(update=changes)

    def render(self, question: Question) -> Sample:
        """The question as the model is asked it."""
        return render(question, self.prompt_style, with_answer=False, ocr=self.ocr)


def _subset(questions: list[Question], limit: int | None) -> list[Question]:
    """A random subset in the order of the file, drawn as `read_questions` draws one."""
    if limit is None or limit >= len(questions):
        return questions
    if limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1, or nothing for all")
    order = list(range(len(questions)))
    random.Random("questions 0").shuffle(order)
    return [questions[i] for i in sorted(order[:limit])]


def load_benchmark(name_or_path: str | Path) -> Benchmark:
    """A benchmark by the name of its card, or by the path of a YAML file.

    Raises DataError, with a suggestion for a name that is close.
    """
    return load_card(KIND, str(name_or_path), Benchmark)


README_HEAD = """\
The code is in `mmkd/evaluation`; this folder holds cards only.

# Benchmarks

A card says where a benchmark's questions come from, how they are asked, and how the answers are scored. Try
`mmkd evaluate MODEL --benchmarks scienceqa --data-root DIR`: the data is looked for in `DIR/<root>`, then
in `DIR`. Cards of your own go into `<folder>/evaluation/`, with `MMKD_CARDS=<folder>`, or are given by path.

A result names its split, rows, prompt, OCR switch, parser and data fingerprint. Compare a number with a
published one only where all of these agree: ScienceQA alone goes by two numbers (all questions, image
questions), TextVQA by two prompts.

"""
README_FOOT = (
    "\nThis table is written by `python -m mmkd.evaluation.benchmarks`; edit the cards, not the table.\n"
)


def readme_table() -> str:
    """The cards of this project as a Markdown table, one row a benchmark."""
    lines = [
        "| benchmark | what | split (rows) | prompt | parser → metric | reference scores |",
        "|---|---|---|---|---|---|",
    ]
    for name in list_cards(KIND):
        card = load_benchmark(name)
        rows = f"{card.expected_rows:,}" if card.expected_rows else "any"
        prompt = card.prompt_style + (" + OCR tokens" if card.ocr else "")
        metrics = ", ".join((card.metric, *card.also))
        published = "; ".join(f"{r.model} {r.score:g} ({r.subset})" for r in card.reference_scores)
        lines.append(
            f"| `{name}` | {card.title} | {card.split} ({rows}) | {prompt} | {card.parser} → {metrics} "
            f"| {published or '–'} |"
        )
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The whole of `evaluation/README.md`."""
    return README_HEAD + readme_table() + README_FOOT


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[2] / KIND / "README.md"
    target.write_text(readme(), encoding="utf-8")
    print(f"wrote {target}")
