"""What a benchmark is: a card in `evaluation/` that says what is asked, how, and how answers are scored."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from pydantic import ConfigDict, Field, field_validator

from mmkd.base.cards import list_cards, load_card
from mmkd.base.schema import Strict
from mmkd.data.formats import format_of, read_questions, refuse_other_than_questions
from mmkd.data.prompts import PromptStyle, by_letter, letter_of, render
from mmkd.data.samples import Question, Sample
from mmkd.data.tally import Tally
from mmkd.errors import DataError, did_you_mean
from mmkd.evaluation.metric import metric_of, parser_of
from mmkd.evaluation.submission import SUBMISSIONS

logger = logging.getLogger(__name__)

KIND = "evaluation"
SUITES = "suites/"  # cards below are suites, see mmkd.evaluation.suites
RETRIEVAL = "retrieval/"  # cards below are for dual encoders, see mmkd.retrieval.benchmark


class ReferenceScore(Strict):
    """A published number, to compare with when split, prompt, OCR switch and parser are the same."""

    model_config = ConfigDict(frozen=True)

    model: str
    score: float = Field(ge=0, le=100, description="in percent, as published")
    subset: str = Field("all", description="the part of the split that the number is for")
    source: str


class Benchmark(Strict):
    """One benchmark's card. Keys that are not listed here are refused."""

    model_config = ConfigDict(frozen=True)

    name: str
    title: str = Field(description="one line for lists and tables")
    imports: tuple[str, ...] = Field((), description="modules that register a format, parser or metric of one's own")
    format: str = Field(description="how the files are laid out: a format of questions, see `mmkd list formats`")
    root: Path = Field(description="the data's folder, absolute or below the data root")
    split: str
    files: dict[str, str] = Field(default_factory=dict, description="file names that differ from the format's own")
    expected_rows: int | None = Field(None, gt=0, description="rows of the official split; a difference is reported")
    prompt_style: PromptStyle
    remark: str = Field("", description="a line between question and instruction")
    instruction: str | None = Field(None, description="in place of the style's last line")
    ocr: bool = Field(False, description="add the data set's OCR tokens to the prompt")
    text_only: bool = Field(False, description="whether it is right that no question has a picture")
    parser: str = "identity"
    metric: str
    also: tuple[str, ...] = Field((), description="further metrics, reported beside the headline")
    max_new_tokens: int = Field(16, gt=0, le=4096)
    categories: tuple[str, ...] = Field((), description="the groups that the score is broken down by")
    submission: str | None = Field(None, description="the test server's file format, for --submission")
    reference_scores: tuple[ReferenceScore, ...] = ()
    notes: str = ""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        refuse_other_than_questions(value)
        return value

    @field_validator("submission")
    @classmethod
    def _known_submission(cls, value: str | None) -> str | None:
        if value is not None and value not in SUBMISSIONS:
            raise ValueError(f"there is no submission format {value!r}; {did_you_mean(value, SUBMISSIONS)}")
        return value

    @field_validator("parser")
    @classmethod
    def _known_parser(cls, value: str) -> str:
        parser_of(value)
        return value

    @field_validator("metric", "also")
    @classmethod
    def _known_metric(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in [value] if isinstance(value, str) else value:
            metric_of(name)
        return value

    def data_folder(self, data_root: Path | str | None = None) -> Path:
        """Where the data lies: `data_root`/`root` if that is a folder, else `data_root` itself, else `root`.

        Raises DataError when there is no such folder.
        """
        candidates = [Path(data_root) / self.root, Path(data_root)] if data_root else [self.root]
        for folder in candidates:
            if os.path.isdir(found := os.path.expanduser(folder)):
                return Path(found)
        raise DataError(
            f"benchmark {self.name!r}: there is no folder {candidates[-1]}; get the data and give its "
            f"folder with --data-root (in a recipe: data_root). The card's notes: {self.notes.strip() or 'none'}"
        )

    def read(self, data_root: Path | str | None = None, limit: int | None = None) -> Sequence[Question]:
        """The questions in the data set's order; `limit` keeps a random subset, the same one every time.

        Raises DataError on anything wrong with the data (see `mmkd.data.formats`).
        """
        folder = self.data_folder(data_root)
        tally = Tally()
        questions = read_questions(
            self.format, folder, self.split, files=self.files, limit=limit, needs_pictures=not self.text_only, tally=tally
        )
        for line in tally.lines():
            _tell(self.name, line)
        return questions

    def layout(self) -> str:
        """The files and pictures that the format looks for in the data's folder, in words."""
        return format_of(self.format).layout(self.split, self.files)

    def by_letter(self, question: Question) -> bool:
        """Whether the answer is the letter of a choice."""
        return by_letter(question, self.prompt_style)

    def references(self, question: Question) -> tuple[str, ...]:
        """What an answer is compared with: the right choice's letter, or the references (else the one answer).

        () for a question without an answer, as in splits that a test server scores.
        """
        if self.by_letter(question):
            return () if question.answer_index is None else (letter_of(question.answer_index),)
        return question.references or tuple(filter(None, [question.answer]))

    def on_split(self, split: str) -> Benchmark:
        """The same questions' other split, under a name of its own: no published score is for it."""
        changes = {"name": f"{self.name}_{split}", "split": split, "expected_rows": None, "reference_scores": ()}
        return self.model_copy(update=changes)

    def render(self, question: Question) -> Sample:
        """The question as the model is asked it."""
        asked = replace(question, question=f"{question.question}\n{self.remark}") if self.remark else question
        sample = render(asked, self.prompt_style, with_answer=False, ocr=self.ocr, instruction=self.instruction)
        return replace(sample, meta=sample.meta | {"question": question})


@lru_cache(maxsize=256)  # one evaluation reads its questions more than once
def _tell(name: str, line: str) -> None:
    logger.info("%s: %s", name, line)


def load_benchmark(name_or_path: str | Path) -> Benchmark:
    """A benchmark by the name of its card, or by the path of a YAML file.

    Raises DataError, with a suggestion for a name that is close.
    """
    if str(name_or_path) not in benchmark_names() and f"{SUITES}{name_or_path}" in list_cards(KIND):
        raise DataError(f"{name_or_path!r} is a suite of benchmarks; give it by --suite {name_or_path}")
    if str(name_or_path) not in benchmark_names() and f"{RETRIEVAL}{name_or_path}" in list_cards(KIND):
        raise DataError(f"{name_or_path!r} is for dual encoders: `mmkd evaluate MODEL --benchmarks {name_or_path}`")
    return load_card(KIND, str(name_or_path), Benchmark)


def benchmark_names() -> list[str]:
    """The cards that ask questions: not suites of them, not retrieval."""
    return [name for name in list_cards(KIND) if not name.startswith((SUITES, RETRIEVAL))]
