"""Answering a benchmark with a tower: in batches, resumable, with every question accounted for."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from mmkd.base.bars import bar
from mmkd.base.jsonl import lines_of
from mmkd.data.prompts import letter_of
from mmkd.data.samples import Question, Sample
from mmkd.errors import DataError, ImageError, SampleError
from mmkd.evaluation.benchmarks import Benchmark
from mmkd.evaluation.calibration import SHORT, most_common
from mmkd.evaluation.items import Item, data_fingerprint, items_of, refuse_unscored
from mmkd.evaluation.processes import ALONE, Processes
from mmkd.evaluation.results import answer_of
from mmkd.evaluation.score import Scorer
from mmkd.evaluation.store import PREDICTIONS, RESULTS, Store, write_atomically, write_object
from mmkd.evaluation.submission import SUBMISSIONS
from mmkd.towers.likelihood import Likelihood
from mmkd.towers.vision_cache import DEFAULT_CACHE_BYTES, VisionCache

ANSWERED_BY = ("generation", "likelihood")


class Answerer(Protocol):
    """What evaluation needs of a tower.

    One whose prompts may end within a thinking block also has `opens_thinking(sample) -> bool`, one that can tell how likely
    its answers are `answer_with_likelihood` and `choose_with_likelihood` (see `mmkd.towers.tower.Tower`).
    """

    def answer(
        self, samples: list[Sample], *, max_new_tokens: int, vision_cache: VisionCache | None
    ) -> list[str]: ...
    def choose(
        self, samples: list[Sample], options: list[list[str]], *, vision_cache: VisionCache | None
    ) -> list[int]: ...
    def parameter_count(self) -> dict[str, int]: ...
    def token_count(self, texts: list[str]) -> int: ...
    def footprint(self) -> dict[str, Any]: ...
    def fingerprint(self) -> str: ...


def evaluate(
    tower: Answerer, benchmark: Benchmark, out: Path | str, *, data_root: Path | str | None = None, batch_size: int = 32,
    limit: int | None = None, blind: bool = False, resume: bool = True, progress: bool = True, model_name: str = "",
    choices: str = "generation", submission: bool = False, cache_bytes: int = DEFAULT_CACHE_BYTES, processes: Processes = ALONE,
) -> dict[str, Any]:
    """Answers and scores a benchmark; writes `predictions.jsonl` and `results.json` to the folder `out`.

    Answers are kept as they come in `answers.partial.jsonl`.  With `resume` an interrupted evaluation goes
    on after its last whole batch, and a finished one is only scored again.  A partial file of another
    model, data, prompt or setting is refused.  `blind` takes the pictures away and leaves the words: how
    far the text alone goes.

    `choices="likelihood"` answers multiple choice with the likeliest letter, in one forward pass; other questions are
    answered by generation all the same.  `submission` writes the test server's file, which a split without
    answers needs: its score is None.  Every picture is seen once; visual tokens of pictures with open questions are
    kept in up to `cache_bytes`.

    With several `processes` each answers its share of the same batches, so that their number changes no answer; every one
    must make this call. The first writes the results, all return when they are there. An evaluation can go on with
    another number of processes than it began with.

    Where the tower tells how likely its answers are, `calibration` says how far to trust it (`mmkd.evaluation.calibration`).

    Thinking is taken from answers before they are parsed; an answer that ends within it is unparsed. `thinking_share` and
    `unclosed_thinking_share` say how many there are.

    A question whose picture cannot be read, or that the model's processor refuses, is left out of the score, and counted with
    its reason in `n_skipped` and `skipped`.  Scores are 0..1; intervals treat the questions on one picture (by content)
    as one draw.

    Returns the content of `results.json`.  Raises DataError when the data is wrong or no question could be
    answered.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be 1 or more")
    if choices not in ANSWERED_BY:
        raise DataError(f"choices are answered by {choices!r}; there are {', '.join(ANSWERED_BY)}")
    questions = benchmark.read(data_root, limit)
    refuse_unscored(benchmark, questions, submission)
    items = items_of(benchmark, questions, blind)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    header = _header(tower, benchmark, items, blind, choices)
    store = Store(out, header, resume, processes)
    batches = processes.share(_open_batches(items, store.before, batch_size))
    _answer_all(_asker(tower, benchmark, choices), benchmark.name, batches, store, cache_bytes, progress and processes.is_first)
    parts = processes.gather((store.answers(), _peak_bytes()))
    answers = {name: answer for part, _ in parts for name, answer in part.items()}
    peak = max((found for _, found in parts if found is not None), default=None)
    scorer = Scorer(benchmark, _opens_thinking(tower, items), choices == "likelihood")
    rows = [scorer.row(item, answers.get(item.question.id)) for item in items]
    results = scorer.results(items, rows, header, limit)
    results |= _circumstances(tower, rows, answers, model_name, batch_size, processes.count, peak)
    if submission:
        results["submission"] = SUBMISSIONS.get(benchmark.submission).file
    if processes.is_first:
        _write(out, benchmark, questions, rows, results, submission)
        store.close()
    processes.wait()
    return results


def _opens_thinking(tower: Answerer, items: Sequence[Item]) -> bool:
    """Whether a tower's prompts end within a thinking block; what a template opens once, it opens always."""
    asked = getattr(tower, "opens_thinking", None)
    return asked is not None and asked(items[0].sample)


def _header(tower: Answerer, benchmark: Benchmark, items: Sequence[Item], blind: bool, choices: str) -> dict[str, Any]:
    """What answers depend on: those of another header are not gone on with."""
    return {
        "benchmark": benchmark.name,
        "model_fingerprint": tower.fingerprint(),
        "data_fingerprint": data_fingerprint(items),
        "max_new_tokens": benchmark.max_new_tokens,
        "blind": blind,
        "choices_by": choices,
    }


def _write(
    out: Path, benchmark: Benchmark, questions: Sequence[Question], rows: list[dict], results: dict[str, Any], submission: bool
) -> None:
    if submission:
        predictions = {row["id"]: answer_of(row) or "" for row in rows if not row["skipped"]}
        SUBMISSIONS.get(benchmark.submission)().write(out, predictions, questions)
    write_atomically(out / PREDICTIONS, lines_of(rows))
    write_object(out / RESULTS, results)


# ---- asking ------------------------------------------------------------------------------------------------------------


def _batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Batches of about equal prompt length, longest first; questions on the same picture stay together."""
    groups: dict[object, list[Item]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.image_keys or place, []).append(item)
    ordered = sorted(groups.values(), key=lambda group: -max(len(item.prompt) for item in group))
    line = [item for group in ordered for item in sorted(group, key=lambda item: -len(item.prompt))]
    return [line[i : i + size] for i in range(0, len(line), size)]


_Answers = dict[str, dict[str, Any]]  # by id: {"prediction", "skipped"}, and "likelihood" where it is known
_Ask = Callable[[list[Item], VisionCache], _Answers]


def _asker(tower: Answerer, benchmark: Benchmark, choices: str) -> _Ask:
    """How a batch is asked: all by generation, or those with choices by likelihood."""
    ways = _plain_ways(tower) if getattr(tower, "answer_with_likelihood", None) is None else _ways_with_likelihood(tower)
    generate, choose = ways

    def ask(batch: list[Item], cache: VisionCache) -> _Answers:
        lettered = [item for item in batch if benchmark.by_letter(item.question)]
        if choices != "likelihood":
            return generate(batch, benchmark, cache)
        free = [item for item in batch if not benchmark.by_letter(item.question)]
        chosen = choose(lettered, cache) if lettered else {}
        return chosen | (generate(free, benchmark, cache) if free else {})

    return ask


def _letters(item: Item) -> list[str]:
    return [letter_of(i) for i in range(len(item.question.choices))]


def _named(batch: Sequence[Item], texts: Sequence[str], likelihoods: Sequence[Likelihood] | None = None) -> _Answers:
    if len(texts) != len(batch):
        raise RuntimeError(f"the tower gave {len(texts)} answers to {len(batch)} questions; `answer` owes one each")
    answers = {item.question.id: {"prediction": text, "skipped": None} for item, text in zip(batch, texts, strict=True)}
    for answer, likelihood in zip(answers.values(), likelihoods or (), strict=False):
        if known := likelihood.known():
            answer["likelihood"] = known
    return answers


def _plain_ways(tower: Answerer) -> tuple[Callable[..., _Answers], Callable[..., _Answers]]:
    def generate(batch: list[Item], benchmark: Benchmark, cache: VisionCache) -> _Answers:
        samples = [item.sample for item in batch]
        return _named(batch, tower.answer(samples, max_new_tokens=benchmark.max_new_tokens, vision_cache=cache))

    def choose(batch: list[Item], cache: VisionCache) -> _Answers:
        options = [_letters(item) for item in batch]
        best = tower.choose([item.sample for item in batch], options, vision_cache=cache)
        return _named(batch, [letters[i] for letters, i in zip(options, best, strict=True)])

    return generate, choose


def _ways_with_likelihood(tower: Any) -> tuple[Callable[..., _Answers], Callable[..., _Answers]]:
    def generate(batch: list[Item], benchmark: Benchmark, cache: VisionCache) -> _Answers:
        options = [_letters(item) if benchmark.by_letter(item.question) else None for item in batch]
        short = benchmark.max_new_tokens <= SHORT
        common = [most_common(item.references) if short else None for item in batch]
        references = [None if own is not None else reference for own, reference in zip(options, common, strict=True)]
        texts, likelihoods = tower.answer_with_likelihood(
            [item.sample for item in batch], options, references, max_new_tokens=benchmark.max_new_tokens, vision_cache=cache
        )
        return _named(batch, texts, likelihoods)

    def choose(batch: list[Item], cache: VisionCache) -> _Answers:
        options = [_letters(item) for item in batch]
        best, likelihoods = tower.choose_with_likelihood([item.sample for item in batch], options, vision_cache=cache)
        return _named(batch, [letters[i] for letters, i in zip(options, best, strict=True)], likelihoods)

    return generate, choose


def _open_batches(items: Sequence[Item], answers: Mapping[str, dict], batch_size: int) -> list[list[Item]]:
    """The batches in which a question has no answer yet.

    The order depends on the questions alone, and a batch is asked as a whole or not at all: an answer may depend, in
    its last bits, on what stands beside it, and a resumed evaluation must give what an uninterrupted one gives.
    """
    batches = _batches([item for item in items if item.skipped is None], batch_size)
    return [batch for batch in batches if any(item.question.id not in answers for item in batch)]


def _answer_all(
    ask: _Ask, name: str, todo: Sequence[list[Item]], store: Store, cache_bytes: int, progress: bool
) -> None:
    open_questions = Counter(item.image_keys for batch in todo for item in batch)
    cache = VisionCache(cache_bytes)
    with bar(sum(map(len, todo)), name, "question", shown=progress) as told:
        for batch in todo:
            start = time.perf_counter()
            answers = _answer_batch(ask, batch, cache)
            store.add(answers, time.perf_counter() - start)
            open_questions.subtract(item.image_keys for item in batch)
            for key in [key for key in cache if open_questions[key] <= 0]:
                del cache[key]
            told.update(len(batch))


def _answer_batch(ask: _Ask, batch: list[Item], cache: VisionCache) -> dict[str, dict]:
    """Answers by id; what cannot be read or prepared gives a reason, and the others are asked again."""
    try:
        return ask(batch, cache)
    except (ImageError, SampleError) as error:
        left_out = {item.question.id: reason for item in batch if (reason := _why_left_out(item.sample, error))}
        if not left_out:
            raise
        skipped = {name: {"prediction": None, "skipped": reason} for name, reason in left_out.items()}
        rest = [item for item in batch if item.question.id not in left_out]
        return skipped | (_answer_batch(ask, rest, cache) if rest else {})


def _why_left_out(sample: Sample, error: ImageError | SampleError) -> str | None:
    """Why a sample of a batch cannot be asked, if it is that: the error is about it, or a picture of it cannot be read."""
    if error.sample == sample.id:
        return str(error)
    for ref in sample.images if isinstance(error, ImageError) else ():
        try:
            ref.load()
        except ImageError as unreadable:
            return str(unreadable)
    return None


# ---- what it took ------------------------------------------------------------------------------------------------------


def _circumstances(
    tower: Answerer, rows: Sequence[dict], answers: Mapping[str, dict], model_name: str, batch_size: int, processes: int,
    peak: int | None,
) -> dict[str, Any]:
    seconds = math.fsum(answer["seconds"] for answer in answers.values())
    return {
        "model": model_name,
        "parameters": tower.parameter_count(),
        "seconds": round(seconds, 6),
        "batch_size": batch_size,
        "processes": processes,
        "efficiency": _efficiency(tower, rows, seconds, peak),
        "versions": library_versions(),
    }


def _efficiency(tower: Answerer, rows: Sequence[dict], seconds: float, peak: int | None) -> dict[str, Any]:
    """What answering took; rates are those of one process. Tokens are those of the answers, the end not counted; reading
    the prompts is in the time."""
    texts = [row["prediction"] for row in rows if row["prediction"] is not None]
    tokens = tower.token_count(texts)
    rates = {"questions_per_second": len(texts) / seconds, "tokens_per_second": tokens / seconds} if seconds else {}
    return {**tower.footprint(), "peak_bytes": peak, "answer_tokens": tokens, **rates}


def _peak_bytes() -> int | None:
    """The most memory that this process has held on the GPU; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def library_versions() -> dict[str, str]:
    """What a result depends on beside data and weights."""
    versions = {"python": platform.python_version()}
    for package in ("mmkd", "torch", "transformers", "tokenizers", "pillow", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions
