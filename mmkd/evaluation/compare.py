"""`mmkd compare`: several models on the same questions, to the terminal, to comparison.json and to one report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import DataError
from mmkd.evaluation.answer import write_object
from mmkd.evaluation.report import ROLES, ModelFiles, build_comparison
from mmkd.evaluation.results import read_results


def compare_command(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    models = named_models(arguments.models)
    folder = Path(arguments.output)
    found = build_comparison(models, folder / "report.html", arguments.title)
    folders = {name: str(files.answers) for name, files in models.items()}
    write_object(folder / "comparison.json", {"models": folders, "benchmarks": found})
    for name, comparison in found.items():
        print(comparison_table(name, comparison))
    if len(models) > 1 and not any(comparison["differences"] for comparison in found.values()):
        print(f"no two of {', '.join(models)} have answered the same benchmark, so there is no difference to tell")
    print(f"report: {folder / 'report.html'}")
    return 0


def named_models(arguments: Sequence[str]) -> dict[str, ModelFiles]:
    """The models of "NAME=FOLDER" or "FOLDER" arguments.

    A folder of `mmkd evaluate` is one model, called NAME or as the folder. A run of `mmkd distill` gives its models: alone by
    their roles, among others as "NAME student" and "NAME control"; a teacher that several runs share is one "teacher".
    Raises DataError for folders that are neither and for names given twice.
    """
    models: dict[str, ModelFiles] = {}
    for argument in arguments:
        name, _, text = argument.rpartition("=")
        folder = Path(text)
        name = name or folder.resolve().name
        for label, files in _models_of(name, folder, alone=len(arguments) == 1).items():
            if label == "teacher" and label in models:
                if _fingerprints(files) == _fingerprints(models[label]):
                    continue
                label = f"{name} teacher"
            if label in models:
                raise DataError(f"two models are called {label!r}; give one of them another name by NAME={text}")
            models[label] = files
    return models


def _models_of(name: str, folder: Path, alone: bool) -> dict[str, ModelFiles]:
    if (folder / "evaluation").is_dir():
        roles = [role for role in ROLES if (folder / "evaluation" / role).is_dir()]
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
    for name, pair in comparison["differences"].items():
        low, high = pair["ci95"]
        lines.append(
            f"  {name:<{width}}  {100 * pair['difference']:+5.1f} [{100 * low:+.1f}, {100 * high:+.1f}]  same answer "
            f"{100 * pair['agreement']:.1f} %, only the first right {pair['only_first']}, only the second {pair['only_second']}"
        )
    return "\n".join(lines)
