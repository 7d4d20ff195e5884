"""Answering a benchmark with a tower: in batches, resumable, with every question accounted for."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from mmkd.base.files import write_whole
from mmkd.data.annotations import one_line, shown
from mmkd.data.prompts import letter_of
from mmkd.data.samples import ImageRef, Question, Sample
from mmkd.errors import DataError, ImageError
from mmkd.evaluation.benchmarks import Benchmark
from mmkd.evaluation.hallucination import NAME as HALLUCINATED
from mmkd.evaluation.hallucination import hallucinated
from mmkd.evaluation.parsers import PARSERS, scienceqa_parse_lenient
from mmkd.evaluation.particulars import LENIENT, particulars
from mmkd.evaluation.processes import ALONE, Processes
from mmkd.evaluation.results import group_of, read_object, read_predictions
from mmkd.evaluation.scorers import METRICS, references_of
from mmkd.evaluation.statistics import interval
from mmkd.evaluation.submission import submission_file, write_submission
from mmkd.towers.vision_cache import DEFAULT_CACHE_BYTES, VisionCache

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
ANSWERED_BY = ("generation", "likelihood")
PARTIAL = "answers.partial.jsonl"

# Half a surrogate pair, which annotation files do hold, cannot be UTF-8; as "\\udXXX" it is JSON again.
_LONE_SURROGATES = "backslashreplace"

log = logging.getLogger(__name__)


class Answerer(Protocol):
    """What evaluation needs of a tower."""

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


@dataclass(frozen=True)
class _Item:
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


def evaluate(
    tower: Answerer,
    benchmark: Benchmark,
    out: Path | str,
    *,
    data_root: Path | str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    blind: bool = False,
    resume: bool = True,
    progress: bool = True,
    model_name: str = "",
    choices: str = "generation",
    submission: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    processes: Processes = ALONE,
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

    A question whose picture cannot be read is left out of the score, and counted with its reason in
    `n_skipped` and `skipped`.  Scores are 0..1; intervals treat the questions on one picture (by content)
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
    items = _prepare(benchmark, questions, blind)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    header = {
        "benchmark": benchmark.name,
        "model_fingerprint": tower.fingerprint(),
        "data_fingerprint": _data_fingerprint(items),
        "max_new_tokens": benchmark.max_new_tokens,
        "blind": blind,
        "choices_by": choices,
    }
    store = _Store(out, header, resume, processes)
    batches = processes.share(_open_batches(items, store.answers, batch_size))
    progress = progress and processes.is_first
    _answer_all(_asker(tower, benchmark, choices), benchmark.name, batches, store, cache_bytes, progress)
    parts = processes.gather((store.answers, _peak_bytes()))
    answers = {name: answer for part, _ in parts for name, answer in part.items()}
    rows = [_row(benchmark, item, answers.get(item.question.id)) for item in items]
    results = _results(benchmark, items, rows, header, limit)
    seconds = math.fsum(answer["seconds"] for answer in answers.values())
    peak = max((found for _, found in parts if found is not None), default=None)
    results |= {
        "model": model_name,
        "parameters": tower.parameter_count(),
        "seconds": round(seconds, 6),
        "batch_size": batch_size,
        "processes": processes.count,
        "efficiency": _efficiency(tower, rows, seconds, peak),
        "versions": library_versions(),
    }
    if submission:
        results["submission"] = submission_file(benchmark.submission)
    if processes.is_first:
        if submission:
            predictions = {row["id"]: row["prediction"] for row in rows if not row["skipped"]}
            write_submission(benchmark.submission, out, predictions, [item.question for item in items])
        write_atomically(out / PREDICTIONS, _lines(rows))
        write_object(out / RESULTS, results)
        store.close()
    processes.wait()
    return results


def refuse_unscored(benchmark: Benchmark, questions: Sequence[Question], submission: bool) -> None:
    """Every question has an answer, or none has and the test server's file is wanted. Raises DataError."""
    hidden = [question for question in questions if not references_of(question, benchmark.by_letter(question))]
    if submission and benchmark.submission is None:
        raise DataError(f"benchmark {benchmark.name!r} has no test server's format; leave --submission out")
    if hidden and (len(hidden) < len(questions) or not submission):
        way = "use --submission for the test server's file" if benchmark.submission else "use a split with answers"
        raise DataError(
            f"benchmark {benchmark.name!r}: {len(hidden)} of {len(questions)} questions have no answer to score against "
            f"(first: {shown(hidden[0].id)}); {way}"
        )


# ---- questions -> items
# ----------------------------------------------------------------------------------------


def _prepare(benchmark: Benchmark, questions: Sequence[Question], blind: bool) -> list[_Item]:
    digests: dict[str, tuple[str, str | None]] = {}
    items = []
    for question in questions:
        sample = benchmark.render(question)
        group, problem = _picture_group(question, digests)
        asked = sample.without_images() if blind else sample
        references = references_of(question, benchmark.by_letter(question))
        items.append(
            _Item(question, asked, _prompt_text(sample), references, group, None if blind else problem)
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


def _data_fingerprint(items: Iterable[_Item]) -> str:
    """A hash of ids, prompts, references and pictures, wherever they lie."""
    digest = hashlib.sha256()
    for item in items:
        row = [item.question.id, item.prompt, item.references, item.group]
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


# ---- asking
# ----------------------------------------------------------------------------------------------------


def _batches(items: Sequence[_Item], size: int) -> list[list[_Item]]:
    """Batches of about equal prompt length, longest first; questions on the same picture stay together."""
    groups: dict[object, list[_Item]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.image_keys or place, []).append(item)
    ordered = sorted(groups.values(), key=lambda group: -max(len(item.prompt) for item in group))
    line = [item for group in ordered for item in sorted(group, key=lambda item: -len(item.prompt))]
    return [line[i : i + size] for i in range(0, len(line), size)]


_Ask = Callable[[list[_Item], VisionCache], list[str]]


def _asker(tower: Answerer, benchmark: Benchmark, choices: str) -> _Ask:
    """How a batch is asked: all by generation, or those with choices by likelihood."""

    def generate(batch: list[_Item], cache: VisionCache) -> list[str]:
        samples = [item.sample for item in batch]
        return tower.answer(samples, max_new_tokens=benchmark.max_new_tokens, vision_cache=cache)

    def choose(batch: list[_Item], cache: VisionCache) -> list[str]:
        options = [[letter_of(i) for i in range(len(item.question.choices))] for item in batch]
        best = tower.choose([item.sample for item in batch], options, vision_cache=cache)
        return [letters[i] for letters, i in zip(options, best, strict=True)]

    def ask(batch: list[_Item], cache: VisionCache) -> list[str]:
        lettered = [item for item in batch if benchmark.by_letter(item.question)]
        free = [item for item in batch if not benchmark.by_letter(item.question)]
        texts: dict[str, str] = {}
        for part, way in ((lettered, choose), (free, generate)):
            if part:
                texts |= zip((item.question.id for item in part), way(part, cache), strict=True)
        return [texts[item.question.id] for item in batch]

    return ask if choices == "likelihood" else generate


def _open_batches(items: Sequence[_Item], answers: Mapping[str, dict], batch_size: int) -> list[list[_Item]]:
    """The batches in which a question has no answer yet.

    The order depends on the questions alone, and a batch is asked as a whole or not at all: an answer may depend, in
    its last bits, on what stands beside it, and a resumed evaluation must give what an uninterrupted one gives.
    """
    batches = _batches([item for item in items if item.skipped is None], batch_size)
    return [batch for batch in batches if any(item.question.id not in answers for item in batch)]


def _answer_all(
    ask: _Ask, name: str, todo: Sequence[list[_Item]], store: _Store, cache_bytes: int, progress: bool
) -> None:
    from tqdm import tqdm

    open_questions = Counter(item.image_keys for batch in todo for item in batch)
    cache = VisionCache(cache_bytes)
    bar = tqdm(total=sum(map(len, todo)), desc=name, unit="question", disable=not progress)
    with bar:
        for batch in todo:
            start = time.perf_counter()
            answers = _answer_batch(ask, batch, cache)
            store.add(answers, time.perf_counter() - start)
            open_questions.subtract(item.image_keys for item in batch)
            for key in [key for key in cache if open_questions[key] <= 0]:
                del cache[key]
            bar.update(len(batch))


def _answer_batch(ask: _Ask, batch: list[_Item], cache: VisionCache) -> dict[str, dict]:
    """Answers by id; a picture that does not decode gives a reason, and the others are asked again."""
    try:
        texts = ask(batch, cache)
    except ImageError:
        unreadable = {item.question.id: reason for item in batch if (reason := _why_unreadable(item.sample))}
        if not unreadable:
            raise
        skipped = {name: {"prediction": None, "skipped": reason} for name, reason in unreadable.items()}
        rest = [item for item in batch if item.question.id not in unreadable]
        return skipped | (_answer_batch(ask, rest, cache) if rest else {})
    if len(texts) != len(batch):
        raise RuntimeError(f"the tower gave {len(texts)} answers to {len(batch)} questions; `answer` owes one each")
    return {
        item.question.id: {"prediction": text, "skipped": None} for item, text in zip(batch, texts, strict=True)
    }


def _why_unreadable(sample: Sample) -> str | None:
    for ref in sample.images:
        try:
            ref.load()
        except ImageError as error:
            return str(error)
    return None


# ---- keeping answers
# -------------------------------------------------------------------------------------------


class _Store:
    """Answers by id, kept on disk batch by batch below a header that says whose they are; one file a process."""

    def __init__(self, out: Path, header: dict[str, Any], resume: bool, processes: Processes) -> None:
        self.out, self.header = out, header
        self.path = out / _partial_name(processes.index)
        self.answers: dict[str, dict] = {}
        if resume:
            self.answers = self._kept() or _finished_answers(out, header)
        elif processes.is_first:
            self.close()
        processes.wait()  # everyone has read all files before anyone writes
        self._begin()

    def add(self, answers: dict[str, dict], seconds: float) -> None:
        share = seconds / len(answers)
        rows = [{"id": name, **answer, "seconds": share} for name, answer in answers.items()]
        with self.path.open("a", encoding="utf-8", errors=_LONE_SURROGATES, newline="\n") as stream:
            stream.write(_lines(rows))
            stream.flush()
            os.fsync(stream.fileno())
        self.answers |= {row["id"]: row for row in rows}

    def close(self) -> None:
        """Removes the files of all processes."""
        for path in self.out.glob(_partial_name("*")):
            path.unlink(missing_ok=True)
        (self.out / PARTIAL).unlink(missing_ok=True)

    def _begin(self) -> None:
        """This process's file with its header, and without a last line that an interruption has cut short."""
        whole = _whole_lines(self.path)
        if not whole:
            self.path.write_text(json.dumps({"header": self.header}) + "\n", encoding="utf-8")
        elif len(whole) < self.path.stat().st_size:
            os.truncate(self.path, len(whole))

    def _kept(self) -> dict[str, dict]:
        """The answers of an interrupted evaluation, whatever the number of its processes."""
        paths = [self.out / PARTIAL, *sorted(self.out.glob(_partial_name("*")))]
        return {name: answer for path in paths for name, answer in self._read(path).items()}

    def _read(self, path: Path) -> dict[str, dict]:
        """The answers in one process's file."""
        whole = _whole_lines(path)
        if not whole:
            return {}
        try:
            header, *rows = [json.loads(line) for line in whole.split(b"\n") if line]
            answers = {row["id"]: row for row in map(_checked_answer, rows)}
            difference = _difference(dict(header["header"]), self.header)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({one_line(error) or type(error).__name__}); delete it or start anew with resume=False"
            ) from error
        if difference:
            raise DataError(
                f"{path} holds answers of another evaluation ({difference}); finish that one, "
                "choose another output folder, or start anew with resume=False"
            )
        log.info("going on with %d answers of %s", len(answers), path)
        return answers


def _partial_name(index: int | str) -> str:
    """The file of a process: PARTIAL of the first, with a number of the others."""
    return PARTIAL if index == 0 else PARTIAL.replace(".jsonl", f".{index}.jsonl")


def _whole_lines(path: Path) -> bytes:
    """A file's content up to its last line break; nothing where there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _checked_answer(row: dict[str, Any]) -> dict[str, Any]:
    """One kept answer. Raises KeyError, TypeError or ValueError for anything else."""
    texts = [row["id"], *(row[key] for key in ("prediction", "skipped") if row[key] is not None)]
    if not all(isinstance(text, str) for text in texts) or (row["prediction"] is None) == (row["skipped"] is None):
        raise TypeError("an answer has an id and either a prediction or a reason to skip it")
    if not math.isfinite(row["seconds"]):
        raise ValueError(f"{row['seconds']} seconds")
    return row


def _difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in now if there.get(key) != now[key]]
    return "; ".join(f"{key}: {shown(there.get(key))} there, {shown(now[key])} now" for key in keys)


def _finished_answers(out: Path, header: dict[str, Any]) -> dict[str, dict]:
    """The answers of a finished evaluation of the same things, without the questions that were skipped."""
    try:
        results = read_object(out / RESULTS)
        rows = read_predictions(out / PREDICTIONS)
        difference = _difference(results, header)
        if difference:
            log.warning("%s is of another evaluation (%s) and will be replaced", out / RESULTS, difference)
            return {}
        answered = [row for row in rows.values() if not row["skipped"]]
        share = float(results["seconds"]) / max(1, len(answered))
        found = [{"id": row["id"], "prediction": row["prediction"], "skipped": None, "seconds": share} for row in answered]
        return {row["id"]: row for row in map(_checked_answer, found)}
    except (ValueError, KeyError, TypeError):
        return {}  # none there, or not whole: it is answered again and written anew


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    write_whole(path, text, errors=_LONE_SURROGATES)


# ---- scoring
# ---------------------------------------------------------------------------------------------------


def _row(benchmark: Benchmark, item: _Item, answer: dict | None) -> dict[str, Any]:
    question = item.question
    row = {
        "id": question.id,
        "question": question.question,
        "choices": list(question.choices),
        "prompt": item.prompt,
        "prediction": None,
        "parsed": None,
        "score": None,
        "references": list(item.references),
        "categories": {"modality": "image" if question.images else "text", **question.categories},
        "images": [ref.key for ref in question.images],
        "group": item.group,
        "skipped": item.skipped or (answer or {}).get("skipped"),
    }
    if row["skipped"]:
        return row
    text = answer["prediction"]
    parsed = PARSERS[benchmark.parser](text, question.choices)
    row |= {
        "prediction": text,
        "parsed": parsed,
        "score": _score(_metric(benchmark, question), parsed, row["references"]),
    }
    if row["score"] is None:
        return row
    if benchmark.also:
        row["also"] = {metric: _score(metric, parsed, row["references"]) for metric in benchmark.also}
    if (made_up := hallucinated(benchmark.metric, parsed, question)) is not None:
        row.setdefault("also", {})[HALLUCINATED] = made_up
    if benchmark.parser in LENIENT:
        lenient = scienceqa_parse_lenient(text, len(question.choices), question.choices)
        row |= {"score_strict": row["score"], "parsed_lenient": lenient}
        row["score_lenient"] = _score(benchmark.metric, lenient, row["references"])
    return row


def _metric(benchmark: Benchmark, question: Question) -> str:
    """A benchmark with open questions among others names the metric of those."""
    return "accuracy" if benchmark.prompt_style == "mmmu" and question.choices else benchmark.metric


def _score(metric: str, parsed: str | None, references: Sequence[str]) -> float | None:
    """None where there is nothing to compare with."""
    if not references:
        return None
    return 0.0 if parsed is None else METRICS[metric](parsed, references)


def _results(
    benchmark: Benchmark,
    items: Sequence[_Item],
    rows: Sequence[dict],
    header: dict[str, Any],
    limit: int | None,
) -> dict[str, Any]:
    scored = [row for row in rows if not row["skipped"]]
    reasons = Counter(_short_reason(row) for row in rows if row["skipped"])
    if not scored:
        raise DataError(f"benchmark {benchmark.name!r}: no question could be answered: {dict(reasons)}")
    if reasons:
        log.warning("%s: %d questions skipped: %s", benchmark.name, sum(reasons.values()), dict(reasons))
    results = header | {
        "title": benchmark.title,
        "metric": benchmark.metric,
        **_headline(scored),
        "n_skipped": len(rows) - len(scored),
        "skipped": dict(reasons),
        "unparsed_share": sum(row["parsed"] is None for row in scored) / len(scored),
        "rows": len(rows),
        "expected_rows": benchmark.expected_rows,
        "rows_difference": _rows_difference(benchmark, len(rows), limit),
        "split": benchmark.split,
        "limit": limit,
        "prompt": items[0].prompt,
        "prompt_style": benchmark.prompt_style,
        "parser": benchmark.parser,
        "ocr_tokens": benchmark.ocr,
        "generation": {"do_sample": False, "num_beams": 1, "max_new_tokens": benchmark.max_new_tokens},
        "reference_scores": [score.model_dump() for score in benchmark.reference_scores],
        "by": {},
    }
    if results["score"] is None:
        return results
    results["by"] = {category: _by(scored, category) for category in benchmark.categories}
    if benchmark.also:
        results["also"] = {metric: _score_of(scored, "also", metric) for metric in benchmark.also}
    if told := [row for row in scored if HALLUCINATED in row.get("also", {})]:
        results.setdefault("also", {})[HALLUCINATED] = _score_of(told, "also", HALLUCINATED)
    return results | particulars(benchmark, scored)


def _headline(rows: Sequence[dict]) -> dict[str, Any]:
    """Score and interval; None in a split whose answers a test server keeps."""
    if rows[0]["score"] is None:
        return {"n": len(rows), "score": None, "ci95": None}
    return _score_of(rows, "score")


def _score_of(rows: Sequence[dict], key: str, metric: str | None = None) -> dict[str, Any]:
    values = [row[key] if metric is None else row[key][metric] for row in rows]
    mean, low, high = interval(values, [group_of(row) for row in rows])
    return {"n": len(rows), "score": mean, "ci95": [low, high]}


def _by(rows: Sequence[dict], category: str) -> dict[str, dict]:
    values: dict[str, list[dict]] = {}
    for row in rows:
        values.setdefault(row["categories"].get(category, "(none)"), []).append(row)
    return {value: _score_of(values[value], "score") for value in sorted(values)}


def _rows_difference(benchmark: Benchmark, rows: int, limit: int | None) -> str | None:
    if benchmark.expected_rows is None or rows == benchmark.expected_rows:
        return None
    cause = f"limit={limit}" if limit is not None else "another release or a part of the data"
    expected = benchmark.expected_rows
    return f"{rows} rows, the card expects {expected} ({cause}): not comparable with published numbers"


def _short_reason(row: dict) -> str:
    """The reason without the picture's path, so that equal reasons are counted together."""
    reason = row["skipped"]
    for key in row["images"]:
        reason = reason.replace(f" {key}", "")
    return reason.partition(":")[0]


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
