"""Scores one model on several benchmarks or on a suite: a model that answers questions, or a dual encoder that retrieves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.base.distributed import is_main_process
from mmkd.errors import DataError
from mmkd.evaluation.answer import PREDICTIONS, RESULTS, Answerer, refuse_unscored, write_object
from mmkd.evaluation.answer import evaluate as evaluate_benchmark
from mmkd.evaluation.benchmarks import Benchmark, load_benchmark
from mmkd.evaluation.items import MISSING_PICTURES, refuse_missing_pictures
from mmkd.evaluation.processes import Processes
from mmkd.evaluation.results import read_predictions
from mmkd.evaluation.statistics import modality_importance
from mmkd.evaluation.suites import average, load_suite, server_scores, suite_table, write_suite
from mmkd.retrieval.benchmark import evaluate_retrieval, is_retrieval, load_retrieval, retrieval_line

BLIND = "_blind"  # ending of the folder of answers without pictures
NOT_FOR_RETRIEVAL = ("blind", "importance", "submission", "quantise", "attn_implementation", "choices")


@dataclass(frozen=True)
class EvaluationOptions:
    """How models are scored.

    data_root: the folder that holds the benchmarks' files.  output: the folder for results, one folder a benchmark below it
    (None: runs/evaluation/MODEL).  limit: a random part of so many questions, the same every time.  split: in place of the
    benchmarks' own.  blind: without the pictures.  importance: with and without, to tell which questions need them.
    choices: how multiple choice is answered, "generation" or "likelihood".  submission: also write the test servers' files.
    missing_pictures: the share of a benchmark's pictures that may be missing (their questions are left out and counted); above it
    nothing is asked.  cache_mb: room for visual tokens of pictures with open questions.  dtype, quantise ("8bit", "4bit": by
    bitsandbytes; a format of `mmkd.towers.quantise`: the values that it would hold), attn_implementation (as transformers names
    it), trust_remote_code: how the model is loaded.  processor, chat_template,
    template: options of its processor, another template, and arguments of that (see `mmkd.towers.reading.Reading`).  show: is
    given each line for the reader as soon as it is known.
    """

    data_root: str | Path | None = None
    output: str | Path | None = None
    batch_size: int = 32
    limit: int | None = None
    split: str | None = None
    blind: bool = False
    importance: bool = False
    choices: str = "generation"
    submission: bool = False
    missing_pictures: float = MISSING_PICTURES
    cache_mb: int = 1024
    dtype: str = "auto"
    quantise: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    processor: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[str], object] = lambda line: None


def evaluate(model: Any, benchmarks: str | Path | Sequence[str | Path], **options: Any) -> dict[str, dict[str, Any]]:
    """Scores a model on benchmarks: {benchmark: the content of its results.json}.

    `model`: a folder, a hub id, or a loaded `mmkd.Tower` (for retrieval a dual encoder).  `benchmarks`: names of cards or
    paths of card files; either all ask questions, or all are of retrieval.  `options`: see `EvaluationOptions`.
    Everything that can be wrong with cards and data is found before the model is loaded. Of several processes, as
    launchers start them, the first returns the results, the others {}.
    Raises DataError, TowerError.
    """
    chosen = EvaluationOptions(**options)
    if not 0 <= chosen.missing_pictures <= 1:
        raise DataError(f"missing_pictures is {chosen.missing_pictures}; it is a share, from 0 to 1")
    if chosen.blind and chosen.importance:
        raise DataError("--importance asks with and without pictures; leave --blind out")
    names = [str(name) for name in ([benchmarks] if isinstance(benchmarks, str | Path) else benchmarks)]
    if not names:
        raise DataError("no benchmark is named; `mmkd list evaluation` lists them")
    retrieval = [name for name in names if is_retrieval(name)]
    if not retrieval:
        return _ask(model, [load_benchmark(name) for name in names], chosen)
    if len(retrieval) < len(names):
        raise DataError(f"{', '.join(retrieval)}: for dual encoders, the other benchmarks for models that answer; ask apart")
    return _retrieve(model, names, chosen)


def evaluate_suite(model: Any, suite: str | Path, scores: str = "", **options: Any) -> dict[str, Any]:
    """Scores a model on a suite; returns what it writes to OUTPUT/suite.json (see `mmkd.evaluation.suites.average`).

    `scores`: what test servers gave, as "vqav2=77.7,vizwiz=41.5"; these benchmarks are not asked. Otherwise as `evaluate`.
    """
    chosen, card = EvaluationOptions(**options), load_suite(str(suite))
    server = server_scores(scores, card) if scores else {}
    results = _ask(model, [benchmark for benchmark in card.benchmarks() if benchmark.name not in server], chosen)
    if not is_main_process():
        return {}
    content = average(card, results, server)
    write_suite(output_folder(model, chosen.output) / "suite.json", content)
    chosen.show(f"{card.name}: {card.title}\n{suite_table(card, content)}")
    return content


def output_folder(model: Any, output: str | Path | None) -> Path:
    """Where the results of a model go."""
    return Path(output or Path("runs/evaluation") / Path(_name_of(model)).name)


def _name_of(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


# ---- models that answer ------------------------------------------------------------------------------------------------


def _ask(model: Any, benchmarks: Sequence[Benchmark], options: EvaluationOptions) -> dict[str, dict[str, Any]]:
    if options.split is not None:
        benchmarks = [benchmark.on_split(options.split) for benchmark in benchmarks]
    _check_machine(options)
    _check_data(benchmarks, options)
    processes = Processes.launched()
    if not processes.is_first:
        logging.getLogger("mmkd").setLevel(logging.WARNING)
    tower = _load_tower(model, options) if isinstance(model, str | Path) else model
    folder = output_folder(model, options.output)
    results = {b.name: _ask_one(tower, b, folder, _name_of(model), options, processes) for b in benchmarks}
    processes.leave()
    return results if processes.is_first else {}


def _check_machine(options: EvaluationOptions) -> None:
    """Raises DataError for what this machine cannot do."""
    from mmkd.runs.machine import loading_errors

    if wrong := list(loading_errors("", options.attn_implementation, options.dtype, options.quantise)):
        raise DataError("this machine cannot load the model so: " + "; ".join(wrong))


def _check_data(benchmarks: Sequence[Benchmark], options: EvaluationOptions) -> None:
    """All data sets that are missing or wrong, in one message."""
    problems = []
    for benchmark in benchmarks:
        try:
            questions = benchmark.read(options.data_root, options.limit)
            refuse_unscored(benchmark, questions, options.submission and benchmark.submission is not None)
            if not options.blind:
                refuse_missing_pictures(benchmark, questions, options.data_root, options.missing_pictures)
        except DataError as error:
            problems.append(f"{benchmark.name}: {error}")
    if problems:
        raise DataError("\n".join(problems))


def _load_tower(model: str | Path, options: EvaluationOptions) -> Answerer:
    from mmkd.towers.loading import device_of_process, dtype_of, to_device
    from mmkd.towers.quantise import FORMATS, fake_quantise, settle
    from mmkd.towers.reading import Reading
    from mmkd.towers.tower import Tower

    rounded = options.quantise in FORMATS
    tower = Tower.load(
        model, dtype=dtype_of(options.dtype), quantise=None if rounded else options.quantise,
        trust_remote_code=options.trust_remote_code, attn_implementation=options.attn_implementation, device=device_of_process(),
        reading=Reading(options.processor, options.chat_template, options.template),
    )  # fmt: skip
    tower = to_device(tower)
    if rounded:
        options.show(fake_quantise(tower, options.quantise, ["language"]).line())
        settle(tower)
    return tower


def _ask_one(
    tower: Answerer, benchmark: Benchmark, folder: Path, name: str, options: EvaluationOptions, processes: Processes
) -> dict[str, Any]:
    """One benchmark, written below `folder`."""
    common = {
        "data_root": options.data_root,
        "batch_size": options.batch_size,
        "limit": options.limit,
        "model_name": name,
        "choices": options.choices,
        "submission": options.submission and benchmark.submission is not None,
        "cache_bytes": options.cache_mb * 2**20,
        "processes": processes,
    }
    out = folder / (benchmark.name + (BLIND if options.blind else ""))
    results = evaluate_benchmark(tower, benchmark, out, blind=options.blind, **common)
    if processes.is_first:
        options.show(_line(benchmark.name, results))
    if options.importance and results["score"] is not None:
        blind = folder / (benchmark.name + BLIND)
        evaluate_benchmark(tower, benchmark, blind, blind=True, **common | {"submission": False})
        if processes.is_first:
            results = add_importance(out, results, blind)
            options.show(_importance_line(results["importance"]))
    return results


def add_importance(out: Path, results: dict[str, Any], blind: Path) -> dict[str, Any]:
    """Writes which questions need their picture into OUT/results.json; `blind` is the folder of answers without."""
    found = modality_importance(read_predictions(out / PREDICTIONS), read_predictions(blind / PREDICTIONS))
    results = results | {"importance": found}
    write_object(out / RESULTS, results)
    return results


def _line(name: str, results: Mapping[str, Any]) -> str:
    if results["score"] is None:
        return f"{name}: not scored, the answers are with a test server; {results['n']} questions, file {results['submission']}"
    low, high = results["ci95"]
    line = f"{name}: {100 * results['score']:.2f} % [{100 * low:.2f}, {100 * high:.2f}], {results['n']} questions"
    if results["n_skipped"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in results["skipped"].items())
        line += f"; {results['n_skipped']} left out: {reasons}"
    return "; ".join([line, *results["remarks"]])


def _importance_line(found: Mapping[str, Any]) -> str:
    if not found["n"]:
        return "  no question has a picture"
    return (
        f"  of {found['n']} questions with a picture: {100 * found['needs_image']:.1f} % are right only with it, "
        f"{100 * found['both']:.1f} % also without, {100 * found['hurt_by_image']:.1f} % only without; "
        f"score without pictures {100 * found['blind_score']:.2f} %"
    )


# ---- dual encoders -----------------------------------------------------------------------------------------------------


def _retrieve(model: Any, names: Sequence[str], options: EvaluationOptions) -> dict[str, dict[str, Any]]:
    defaults = EvaluationOptions()
    unfit = [name for name in NOT_FOR_RETRIEVAL if getattr(options, name) != getattr(defaults, name)]
    if unfit:
        raise DataError(f"retrieval has no --{unfit[0].replace('_', '-')}")
    if Processes.launched().count > 1:
        raise DataError("retrieval is the work of one process; start it without a launcher")
    cards = [load_retrieval(name) for name in names]
    if options.split is not None:
        cards = [card.model_copy(update={"split": options.split, "expected_pictures": None}) for card in cards]
    for card in cards:
        card.read(options.data_root, options.limit)
    if isinstance(model, str | Path):
        from mmkd.retrieval.dual_encoders import load_dual
        from mmkd.towers.loading import device_of_process, dtype_of

        dual = load_dual(model, dtype=dtype_of(options.dtype), trust_remote_code=options.trust_remote_code)
        dual.to(device_of_process())
    else:
        dual = model
    folder = output_folder(model, options.output)
    common = {"data_root": options.data_root, "batch_size": options.batch_size, "limit": options.limit}
    results = {}
    for card in cards:
        found = evaluate_retrieval(dual, card, folder / card.name, model_name=_name_of(model), **common)
        options.show(retrieval_line(found))
        results[card.name] = found
    return results
