"""`mmkd evaluate`: benchmarks or a suite, with or without pictures, to results on disk and lines on the terminal."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from mmkd.base.startup import quick_imports
from mmkd.errors import DataError
from mmkd.evaluation.answer import PREDICTIONS, RESULTS, Answerer, evaluate, refuse_unscored, write_object
from mmkd.evaluation.benchmarks import RETRIEVAL, Benchmark, load_benchmark
from mmkd.evaluation.compare import modality_importance, read_predictions
from mmkd.evaluation.processes import Processes
from mmkd.evaluation.suites import average, load_suite, server_scores, suite_table, write_suite
from mmkd.retrieval.evaluate import evaluate_retrieval, load_retrieval, retrieval_line, retrieval_names

RETRIEVAL_LACKS = ("blind", "importance", "submission", "quantise", "server-scores")
BLIND = "_blind"  # ending of the folder of answers without pictures


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Runs the command; everything that can be wrong with cards and data is found before the model is loaded."""
    if arguments.blind and arguments.importance:
        raise DataError("--importance asks with and without pictures; leave --blind out")
    suite = load_suite(arguments.suite) if arguments.suite else None
    if arguments.server_scores and suite is None:
        raise DataError("--server-scores belong to a --suite")
    server = server_scores(arguments.server_scores, suite) if suite else {}
    names = [name.strip() for name in (arguments.benchmarks or "").split(",") if name.strip()]
    retrieval = [name for name in names if _is_retrieval(name)]
    if retrieval:
        return _evaluate_retrieval(names, retrieval, arguments)
    benchmarks = suite.benchmarks() if suite else [load_benchmark(name) for name in names]
    benchmarks = [benchmark for benchmark in benchmarks if benchmark.name not in server]
    if arguments.split is not None:
        benchmarks = [benchmark.on_split(arguments.split) for benchmark in benchmarks]
    _check_data(benchmarks, arguments)
    processes = Processes.launched()
    if not processes.is_first:
        logging.getLogger("mmkd").setLevel(logging.WARNING)
    tower = _tower(arguments)
    folder = Path(arguments.output or Path("runs/evaluation") / Path(arguments.model).name)
    results = {benchmark.name: _one(tower, benchmark, folder, arguments, processes) for benchmark in benchmarks}
    processes.leave()
    if not processes.is_first:
        return 0
    if suite:
        content = average(suite, results, server)
        write_suite(folder / "suite.json", content)
        print(f"{suite.name}: {suite.title}\n{suite_table(suite, content)}")
    print(f"results: {folder}")
    return 0


def _is_retrieval(name: str) -> bool:
    """Whether a card is one of retrieval; a file is one where it lies in a folder of that name."""
    return name in retrieval_names() or Path(name).parent.name == RETRIEVAL.rstrip("/")


def _evaluate_retrieval(names: list[str], retrieval: list[str], arguments: argparse.Namespace) -> int:
    """Retrieval benchmarks, which are for dual encoders."""
    if len(retrieval) < len(names):
        raise DataError(f"{', '.join(retrieval)}: for dual encoders, the other benchmarks for models that answer; ask apart")
    unfit = [option for option in RETRIEVAL_LACKS if getattr(arguments, option.replace("-", "_"))]
    if unfit or arguments.choices != "generation":
        raise DataError(f"retrieval has no --{unfit[0] if unfit else 'choices'}")
    if Processes.launched().count > 1:
        raise DataError("retrieval is the work of one process; start it without a launcher")
    cards = [load_retrieval(name) for name in names]
    if arguments.split is not None:
        cards = [card.model_copy(update={"split": arguments.split, "expected_pictures": None}) for card in cards]
    for card in cards:
        card.read(arguments.data_root, arguments.limit)
    with quick_imports():
        from mmkd.retrieval.dual import load_dual
        from mmkd.towers.loading import device_of_process, dtype_of

    model = load_dual(arguments.model, dtype=dtype_of(arguments.dtype), trust_remote_code=arguments.trust_remote_code)
    model.to(device_of_process())
    folder = Path(arguments.output or Path("runs/evaluation") / Path(arguments.model).name)
    options = {"data_root": arguments.data_root, "batch_size": arguments.batch_size, "limit": arguments.limit}
    for card in cards:
        print(retrieval_line(evaluate_retrieval(model, card, folder / card.name, model_name=arguments.model, **options)))
    print(f"results: {folder}")
    return 0


def _check_data(benchmarks: list[Benchmark], arguments: argparse.Namespace) -> None:
    """All data sets that are missing or wrong, in one message."""
    problems = []
    for benchmark in benchmarks:
        try:
            questions = benchmark.read(arguments.data_root, arguments.limit)
            refuse_unscored(benchmark, questions, arguments.submission and benchmark.submission is not None)
        except DataError as error:
            problems.append(f"{benchmark.name}: {error}")
    if problems:
        raise DataError("\n".join(problems))


def _tower(arguments: argparse.Namespace) -> Answerer:
    with quick_imports():
        from mmkd.towers.loading import dtype_of, to_device
        from mmkd.towers.tower import Tower

    tower = Tower.load(
        arguments.model,
        dtype=dtype_of(arguments.dtype),
        quantise=arguments.quantise,
        trust_remote_code=arguments.trust_remote_code,
    )
    return to_device(tower, arguments.quantise)


def _one(
    tower: Answerer, benchmark: Benchmark, folder: Path, arguments: argparse.Namespace, processes: Processes
) -> dict[str, Any]:
    """One benchmark, written below `folder` and said on the terminal."""
    options = {
        "data_root": arguments.data_root,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "model_name": arguments.model,
        "choices": arguments.choices,
        "submission": arguments.submission and benchmark.submission is not None,
        "cache_bytes": arguments.cache_mb * 2**20,
        "processes": processes,
    }
    out = folder / (benchmark.name + (BLIND if arguments.blind else ""))
    results = evaluate(tower, benchmark, out, blind=arguments.blind, **options)
    if processes.is_first:
        print(_line(benchmark.name, results), flush=True)
    if arguments.importance and results["score"] is not None:
        blind = folder / (benchmark.name + BLIND)
        evaluate(tower, benchmark, blind, blind=True, **options | {"submission": False})
        if processes.is_first:
            results = add_importance(out, results, blind)
            print(_importance_line(results["importance"]), flush=True)
    return results


def add_importance(out: Path, results: dict[str, Any], blind: Path) -> dict[str, Any]:
    """Writes which questions need their picture into OUT/results.json; `blind` is the folder of answers without."""
    found = modality_importance(read_predictions(out / PREDICTIONS), read_predictions(blind / PREDICTIONS))
    results = results | {"importance": found}
    write_object(out / RESULTS, results)
    return results


def _line(name: str, results: dict[str, Any]) -> str:
    if results["score"] is None:
        return f"{name}: not scored, the answers are with a test server; {results['n']} questions, file {results['submission']}"
    low, high = results["ci95"]
    return f"{name}: {100 * results['score']:.2f} % [{100 * low:.2f}, {100 * high:.2f}], {results['n']} questions"


def _importance_line(found: dict[str, Any]) -> str:
    if not found["n"]:
        return "  no question has a picture"
    return (
        f"  of {found['n']} questions with a picture: {100 * found['needs_image']:.1f} % are right only with it, "
        f"{100 * found['both']:.1f} % also without, {100 * found['hurt_by_image']:.1f} % only without; "
        f"score without pictures {100 * found['blind_score']:.2f} %"
    )
