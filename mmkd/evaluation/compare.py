"""Several models on the same questions: scores, paired differences and agreement, in one file and one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import DataError
from mmkd.evaluation.answer import write_object
from mmkd.evaluation.report import ModelFiles, build_comparison, roles_of
from mmkd.evaluation.results import read_results


def compare(
    models: Sequence[str | Path] | Mapping[str, str | Path], output: str | Path = "runs/compared", *, title: str = "Comparison"
) -> dict[str, Any]:
    """Compares models on the same questions and writes OUTPUT/comparison.json and OUTPUT/report.html.

    `models`: folders of `mmkd evaluate` or runs of `mmkd distill`, as {name: folder} or as "FOLDER" and "NAME=FOLDER" (see
    `named_models`); "teacher", "control" and "student" have the meaning that they have in a run.
    Returns {"models": {name: folder}, "benchmarks": {benchmark: what `compare_runs` gives}}. Raises DataError.
    """
    files = named_models(list(models.items()) if isinstance(models, Mapping) else [_name_and_folder(str(m)) for m in models])
    folder = Path(output)
    benchmarks = build_comparison(files, folder / "report.html", title)
    found = {"models": {name: str(one.answers) for name, one in files.items()}, "benchmarks": benchmarks}
    write_object(folder / "comparison.json", found)
    return found


def _name_and_folder(argument: str) -> tuple[str, str]:
    """Of "NAME=FOLDER" or "FOLDER"."""
    name, _, folder = argument.rpartition("=")
    return name or Path(folder).resolve().name, folder


def named_models(folders: Sequence[tuple[str, str | Path]]) -> dict[str, ModelFiles]:
    """The models in folders that have a name: [(name, folder), ...].

    A folder of `mmkd evaluate` is one model of that name. A run of `mmkd distill` gives its models: alone by
    their roles, among others as "NAME student" and "NAME control"; a teacher that several runs share is one "teacher".
    Raises DataError for folders that are neither and for names given twice.
    """
    models: dict[str, ModelFiles] = {}
    for name, folder in folders:
        for label, files in _models_of(name, Path(folder), alone=len(folders) == 1).items():
            if label == "teacher" and label in models:
                if _fingerprints(files) == _fingerprints(models[label]):
                    continue
                label = f"{name} teacher"
            if label in models:
                raise DataError(f"two models are called {label!r}; give one of them another name by NAME={folder}")
            models[label] = files
    return models


def _models_of(name: str, folder: Path, alone: bool) -> dict[str, ModelFiles]:
    if (folder / "evaluation").is_dir():
        roles = roles_of(folder)
        labels = {role: role if alone or role == "teacher" else f"{name} {role}" for role in roles}
        return {label: ModelFiles.of_run(folder, role) for role, label in labels.items()}
    if not any(folder.glob("*/results.json")):
        raise DataError(
            f"{folder} holds neither <benchmark>/results.json, as `mmkd evaluate` writes it, nor a run with an evaluation"
        )
    return {name: ModelFiles(folder)}


def _fingerprints(files: ModelFiles) -> set[str]:
    """Of the weights that answered."""
    return {read_results(path).get("model_fingerprint", "") for path in files.answers.glob("*/results.json")}


def comparison_table(benchmark: str, comparison: Mapping[str, Any]) -> str:
    """One benchmark's scores and differences for the terminal."""
    left = f", {comparison['n_skipped']} left out" if comparison["n_skipped"] else ""
    width = max(map(len, [*comparison["models"], *comparison["differences"]]))
    lines = [f"{benchmark} ({comparison['n']} questions{left})"]
    for name, cell in comparison["models"].items():
        low, high = cell["ci95"]
        lines.append(f"  {name:<{width}}  {100 * cell['score']:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        if name in comparison["fidelity"]:
            lines[-1] += f"  answers as the teacher {100 * comparison['fidelity'][name]:.1f} %"
        if name in comparison["beats_teacher"]:
            lines[-1] += f", right where it is not {len(comparison['beats_teacher'][name])}"
        lines += [f"  {'':<{width}}  {said}" for said in cell.get("remarks", ())]
    for name, pair in comparison["differences"].items():
        low, high = pair["ci95"]
        lines.append(
            f"  {name:<{width}}  {100 * pair['difference']:+5.1f} [{100 * low:+.1f}, {100 * high:+.1f}]  same answer "
            f"{100 * pair['agreement']:.1f} %, only the first right {pair['only_first']}, only the second {pair['only_second']}"
        )
    return "\n".join(lines)
