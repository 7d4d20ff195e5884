"""A write stage: prompts are asked, answers kept as they come, checks run over them in the order of the data, rows written."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.base.bars import bar
from mmkd.base.distributed import claimed
from mmkd.data.samples import Sample
from mmkd.errors import DataError, ImageError, SampleError
from mmkd.writing.answers import KeptAnswers
from mmkd.writing.ask import ask, in_chunks, ordered
from mmkd.writing.authors import Author, Request, key_of
from mmkd.writing.checks import Candidate, Check, Surroundings, names_of
from mmkd.writing.forms import FormError
from mmkd.writing.prompts import Digests, Prompt, Unasked, prompts_of
from mmkd.writing.rows import FACTS, Receipt, RowError, row_of, save_rows
from mmkd.writing.spec import WriteSpec

logger = logging.getLogger(__name__)

DROPPED_NAMED = 100_000  # answers that dropped.jsonl names at most; all are counted
LOOKED_AT = 64  # samples whose prompts are made before anything is asked


@dataclass
class WriteStage:
    """What a write stage works with.

    samples: gives the data anew, in the same order each time.  authors: in the order of `by`.  judges: by name, made when asked
    for.
    state: what tells that the data are the same.
    """

    name: str
    spec: WriteSpec
    samples: Callable[[], Iterable[Sample]]
    authors: Sequence[Author]
    judges: Mapping[str, Callable[[], Author]] = field(default_factory=dict)
    around: Surroundings = field(default_factory=Surroundings)
    context: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None

    def __post_init__(self) -> None:
        self.card = self.spec.card
        self.form = self.card.form.made()
        specs = self.spec.all_checks()
        self.checks: list[tuple[str, Check]] = list(zip(names_of(specs), (spec.made() for spec in specs), strict=True))
        self.digests = Digests()

    @cached_property
    def key(self) -> str:
        """Hash of everything that the rows follow from."""
        spec = self.spec.model_dump(
            mode="json", exclude={"by", "data", "before", "batch_size", "prompt", "checks", "form", "row"}
        )
        card = self.card.model_dump(mode="json", exclude={"title", "source", "notes"})
        checks = [check.model_dump(mode="json") for check in self.spec.all_checks()]
        facts = [[one.key for one in self.authors], spec, card, checks, self.state, self.context]
        return _hash(facts)

    def prompts(self) -> Iterator[Prompt | Unasked]:
        return prompts_of(self.samples(), self.card, self.spec.per, self.context)

    # ---- asking ----

    def requests(self, author: Author, prompt: Prompt) -> list[Request]:
        """What an author is asked of a prompt. Raises ImageError, SampleError for pictures that cannot be read."""
        pictures = [self.digests.of(picture) for picture in prompt.sample.images]
        numbers = range(self.spec.samples)
        keys = [key_of(author, prompt.sample, pictures, number) for number in numbers]
        return [Request(prompt.id, prompt.sample, number, key) for number, key in zip(numbers, keys, strict=True)]

    def chunks(self, author: Author) -> Iterator[list[Request]]:
        """All that an author is asked, chunk by chunk, questions on one picture together."""
        made = (prompt for prompt in self.prompts() if isinstance(prompt, Prompt))
        for chunk in ordered(made, self.spec.batch_size, _by_picture):
            requests = []
            for prompt in chunk:
                try:
                    requests += self.requests(author, prompt)
                except (ImageError, SampleError):
                    continue  # counted when rows are made
            if requests:
                yield requests

    # ---- checking ----

    def candidates(
        self, kept: KeptAnswers, receipt: Receipt, dropped: list[dict[str, str]], upto: int | None = None
    ) -> Iterator[Candidate]:
        """The rows that pass all checks, or the first `upto`, in the order of the data."""
        checks = self.checks[:upto]
        for _, check in checks:
            check.start()

        def drop(one: Candidate | str, name: str, reason: str) -> None:
            receipt.drop(name, reason)
            if len(dropped) < DROPPED_NAMED:
                dropped.append({"id": one if isinstance(one, str) else one.id, "check": name, "why": reason})

        for prompt in self.prompts():
            if isinstance(prompt, Unasked):
                receipt.unasked[_plain(prompt.reason)] += 1
                continue
            receipt.prompts += 1
            left = self._read(prompt, kept, receipt, drop)
            for name, check in checks:
                if not left:
                    break
                if check.asks:
                    left = [self._told(check, one, kept) for one in left]
                verdicts = check.group(left)
                for one, reason in zip(left, verdicts, strict=True):
                    if reason is not None:
                        drop(one, name, reason)
                left = [one for one, reason in zip(left, verdicts, strict=True) if reason is None]
            yield from left

    def _read(self, prompt: Prompt, kept: KeptAnswers, receipt: Receipt, drop: Callable[..., None]) -> list[Candidate]:
        """What the answers to a prompt say; those that say nothing of the wanted form are dropped."""
        found, asked = [], self.spec.samples * len(self.authors)
        for author in self.authors:
            try:
                requests = self.requests(author, prompt)
            except (ImageError, SampleError):
                receipt.unasked["a picture cannot be read"] += 1
                return []
            for request in requests:
                name = _name(prompt, author, request, self)
                row = kept.get(request.key)
                if row is None:
                    raise DataError(f"stage {self.name}: the answer to {prompt.id!r} is gone; run the same command again")
                receipt.answers += 1
                receipt.tokens.update(row.get("usage", {}))
                reason = _unusable(row, self.spec.keep_cut)
                if reason is not None:
                    drop(name, "answered", reason)
                    continue
                try:
                    written = self.form.read(row["text"].strip(), prompt.question)
                except FormError as error:
                    drop(name, "form", str(error))
                    continue
                try:
                    made = row_of(self.card, prompt, written)
                except RowError as error:
                    drop(name, "row", str(error))
                    continue
                notes = {"asked": asked, "request": request.key, "model": author.model}
                one = Candidate(name, prompt.question, author.name, request.number, row["text"], written, made)
                one.pictures, one.sample, one.notes = prompt.pictures, prompt.sample, notes
                found.append(one)
        return found

    # ---- judging ----

    def judged(self, check: Any, author: Author, one: Candidate) -> Request | None:
        """What a judge is asked of a row; None for one that cannot be shown to it."""
        try:
            sample = check.request(one)
            pictures = [self.digests.of(picture) for picture in sample.images]
        except (DataError, ImageError, SampleError):
            return None
        return Request(sample.id, sample, 0, key_of(author, sample, pictures, 0, check.options), check.options)

    def judge(self, check: Any) -> Author:
        """The author behind a check that asks; opened once."""
        if check.by not in self._judges:
            self._judges[check.by] = self.judges[check.by]()
        return self._judges[check.by]

    @cached_property
    def _judges(self) -> dict[str, Any]:
        return {}

    def _told(self, check: Any, one: Candidate, kept: KeptAnswers) -> Candidate:
        request = self.judged(check, self.judge(check), one)
        row = None if request is None else kept.get(request.key)
        return check.told(one, None if row is None else row.get("odds"))


def prepare(stage: WriteStage) -> list[str]:
    """Why a stage cannot be written, before anything is asked; its checks read what they compare with."""
    wrong = []
    for name, check in stage.checks:
        try:
            check.prepare(stage.around)
        except DataError as error:
            wrong.append(f"checks.{name}: {error}")
    made, first = 0, ""
    for looked, prompt in enumerate(stage.prompts()):
        if looked >= LOOKED_AT:
            break
        made += isinstance(prompt, Prompt)
        first = first or ("" if isinstance(prompt, Prompt) else prompt.reason)
    if not made:
        wrong.append(f"prompt: no prompt can be made of its data{f': {first}' if first else ', which are empty'}")
    return wrong


def write(stage: WriteStage, folder: Path) -> Path:
    """The data set of a stage, below `folder`; what is there already is not asked or made again.

    Any number of processes may call this at once: they share the asking, one makes the rows. `prepare` comes first. Raises
    DataError, TowerError.
    """
    target = folder / f"{stage.name}-{stage.key}"
    if (target / FACTS).exists():
        return target
    with KeptAnswers(folder / "answers" / _answers_key(stage)).open() as kept:
        claims = folder / "claims" / stage.key
        for author in stage.authors:
            with bar(None, f"{stage.name}: {author.name}", "answer") as told:
                ask(author, lambda author=author: stage.chunks(author), kept, claims, told)
        for number, (_, check) in enumerate(stage.checks):
            if check.asks:
                ask(stage.judge(check), lambda number=number: _judge_chunks(stage, number, kept), kept, claims)
        with claimed(folder / f".{target.name}.lock", wait=True):
            if not (target / FACTS).exists():
                _save(stage, target, kept)
    return target


def _judge_chunks(stage: WriteStage, number: int, kept: KeptAnswers) -> Iterator[list[Request]]:
    check: Any = stage.checks[number][1]
    author = stage.judge(check)
    rows = stage.candidates(kept, Receipt(), [], number)
    made = (request for one in rows if (request := stage.judged(check, author, one)) is not None)
    return in_chunks(made, stage.spec.batch_size)


def _save(stage: WriteStage, target: Path, kept: KeptAnswers) -> None:
    spec, receipt = stage.spec, Receipt()
    dropped: list[dict[str, str]] = []
    sampling = {"samples": spec.samples, "temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k,
                "max_new_tokens": spec.max_new_tokens, "stop": spec.stop}  # fmt: skip
    card = stage.card.model_dump(mode="json", exclude={"title", "source", "notes"})
    shared = {
        "stage": stage.name,
        "card": stage.card.name,
        "card_hash": _hash(card),
        "checks": [name for name, _ in stage.checks],
    }
    about = {**shared, "by": {one.name: one.model for one in stage.authors}, "per": spec.per,
             "form": stage.card.form.model_dump(),
             "sampling": sampling, "prompt": stage.card.prompt}  # fmt: skip
    own = {key: value for key, value in sampling.items() if key not in ("samples", "stop")}
    rows = stage.candidates(kept, receipt, dropped)
    save_rows(target, rows, receipt, dropped, about, {**shared, **own}, stage.digests)
    for line in receipt.lines():
        logger.info("stage %s: %s", stage.name, line)


def _answers_key(stage: WriteStage) -> str:
    """Answers are shared by stages that ask the same card, whatever their checks and data."""
    card = stage.card
    return _hash([card.system, card.prompt, [one.model_dump() for one in card.examples]])


def _by_picture(prompts: list[Prompt]) -> list[Prompt]:
    places: dict[Any, int] = {}
    for number, prompt in enumerate(prompts):
        places.setdefault(tuple(picture.key for picture in prompt.sample.images) or number, number)
    return sorted(prompts, key=lambda one: places.get(tuple(picture.key for picture in one.sample.images), 0))


def _name(prompt: Prompt, author: Author, request: Request, stage: WriteStage) -> str:
    """A row's id: the prompt's, with author and number where there are several answers."""
    by = f" {author.name}" if len(stage.authors) > 1 else ""
    number = f" {request.number + 1}" if stage.spec.samples > 1 else ""
    return f"{prompt.id}{by}{number}"


def _unusable(row: Mapping[str, Any], keep_cut: bool) -> str | None:
    """Why an answer is none."""
    if row.get("text") is None:
        return _plain(str(row.get("refused") or "no text"))
    if row.get("characters"):
        return "far too long"
    if row.get("cut") and not keep_cut:
        return "cut before its end"
    return None if row["text"].strip() else "empty"


def _plain(reason: str) -> str:
    """A reason without what differs from sample to sample."""
    return reason.partition(":")[0] if reason.startswith("cannot be prepared") else reason[:120]


def _hash(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
