"""A benchmark's questions, ready to be asked: prompt, references, what its pictures are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.data.annotations import shown
from mmkd.data.samples import ImageRef, Question, Sample, missing_images
from mmkd.errors import DataError, ImageError
from mmkd.evaluation.benchmarks import Benchmark

MISSING_PICTURES = 0.01  # share of a benchmark's pictures that may be missing; a score over fewer is another benchmark's


@dataclass(frozen=True)
class Item:
    """A question ready to be asked. `group` is the content of its pictures, or the question itself."""

    question: Question
    sample: Sample
    prompt: str
    references: tuple[str, ...]
    group: str
    skipped: str | None

    @property
    def image_keys(self) -> tuple[str, ...]:
        """The key under which the tower caches this sample's visual tokens."""
        return tuple(ref.key for ref in self.sample.images)


def refuse_unscored(benchmark: Benchmark, questions: Sequence[Question], submission: bool) -> None:
    """Every question has an answer, or none has and the test server's file is wanted. Raises DataError."""
    hidden = [question for question in questions if not benchmark.references(question)]
    if submission and benchmark.submission is None:
        raise DataError(f"benchmark {benchmark.name!r} has no test server's format; leave --submission out")
    if hidden and (len(hidden) < len(questions) or not submission):
        way = "use --submission for the test server's file" if benchmark.submission else "use a split with answers"
        raise DataError(
            f"benchmark {benchmark.name!r}: {len(hidden)} of {len(questions)} questions have no answer to score against "
            f"(first: {shown(hidden[0].id)}); {way}"
        )


def refuse_missing_pictures(
    benchmark: Benchmark, questions: Sequence[Question], data_root: Path | str | None, allowed: float = MISSING_PICTURES
) -> None:
    """Raises DataError where more than the share `allowed` of the pictures is not there; nothing is decoded."""
    missing, count = missing_images(questions)
    if len(missing) > allowed * count:
        raise DataError(
            f"benchmark {benchmark.name!r}: {len(missing)} of {count} pictures are not there, the first is {missing[0]}; at most "
            f"{100 * allowed:g} % may be missing. Format {benchmark.format!r} looks in "
            f"{benchmark.data_folder(data_root)} for {benchmark.layout()}. "
            "Put the pictures there, name their place in the card's `files`, or give --missing-pictures a larger share"
        )


def items_of(benchmark: Benchmark, questions: Sequence[Question], blind: bool) -> list[Item]:
    """The questions as the benchmark asks them; `blind` takes the pictures away and leaves the words."""
    digests: dict[str, tuple[str, str | None]] = {}
    items = []
    for question in questions:
        sample = benchmark.render(question)
        group, problem = _picture_group(question, digests)
        asked = sample.without_images() if blind else sample
        references = benchmark.references(question)
        items.append(
            Item(question, asked, _prompt_text(sample), references, group, None if blind else problem)
        )
    return items


def _picture_group(question: Question, digests: dict[str, tuple[str, str | None]]) -> tuple[str, str | None]:
    """Digest of the pictures' bytes (one scene may lie in several files), and why one cannot be read."""
    if not question.images:
        return f"question {question.id}", None
    found = []
    for ref in question.images:
        if ref.key not in digests:
            digests[ref.key] = _digest(ref)
        found.append(digests[ref.key])
    problems = [problem for _, problem in found if problem]
    return "+".join(digest for digest, _ in found), problems[0] if problems else None


def _digest(ref: ImageRef) -> tuple[str, str | None]:
    try:
        return hashlib.sha256(ref.read_bytes()).hexdigest()[:16], None
    except ImageError as error:
        return f"unreadable {ref.name}", str(error)


def _prompt_text(sample: Sample) -> str:
    """The words of the prompt; roles are named where there is more than one turn."""
    turns = sample.prompt_turns
    return turns[0].text if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def data_fingerprint(items: Iterable[Item]) -> str:
    """A hash of ids, prompts, references and pictures, wherever they lie."""
    digest = hashlib.sha256()
    for item in items:
        row = [item.question.id, item.prompt, item.references, item.group]
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
