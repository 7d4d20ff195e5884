"""`mmkd init`: a recipe for data, a teacher and a student of one's own. What can be seen is not asked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmkd.cli.arguments import names, natural
from mmkd.cli.startup import quick_imports

BENCHMARK = """\
# The rows of {split} that were kept apart, asked at the end of the run.
title: the {split} split of {root}
format: jsonl
root: {root}
split: {split}
prompt_style: {style}
metric: {metric}
max_new_tokens: {tokens}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="recipe.yaml", help="the file to write (default: recipe.yaml)")
    parser.add_argument("--data", required=True, type=names, metavar="PATH,...", help="folders or files of rows, or data cards")
    parser.add_argument("--teacher", default=None, help="folder, hub id or card of `mmkd list models`")
    parser.add_argument("--student", default=None, help="the same, or ENCODER+LANGUAGE to put one together")
    parser.add_argument("--pair", default=None, help="teacher and student by the name of a pair")
    parser.add_argument(
        "--method", default=None,
        help="kl (the default), spans (the same where tokenizers are seen to differ), reverse_kl, jsd, topk, on_policy, dpo, sft",
    )  # fmt: skip
    parser.add_argument("--gpus", type=natural, default=None, help="that train together (default: those that are here)")
    parser.add_argument("--output", default=None, help="the run's folder (default: runs/NAME)")
    parser.add_argument("--force", action="store_true", help="write over a recipe that is there")


def run(arguments: argparse.Namespace) -> int:
    from mmkd.errors import RecipeError

    path = Path(arguments.recipe)
    if path.exists() and not arguments.force:
        raise RecipeError(f"{path} is there already; take another name, or --force to write over it")
    if arguments.pair is None and arguments.student is None:
        raise RecipeError("give --student (and --teacher), or both by --pair NAME; `mmkd list models` has names")
    if arguments.pair is not None and (arguments.teacher or arguments.student):
        raise RecipeError("--pair names teacher and student; leave --teacher and --student out")
    with quick_imports():
        from mmkd.base.files import write_whole
        from mmkd.data.detect import detect, other_split
        from mmkd.recipes.reading import load_recipe
        from mmkd.recipes.starter import Starter, starter_of_pair

    entries = [detect(name) for name in arguments.data]
    if path.absolute().parent != Path.cwd():  # a relative root would be looked for beside the recipe
        entries = [entry | ({"root": str(Path(entry["root"]).resolve())} if "root" in entry else {}) for entry in entries]
    if any(entry.get("format") == "preference" for entry in entries):
        arguments.method = arguments.method or "dpo"
    rest: dict[str, Any] = {"gpus": _gpus(arguments.gpus), "samples": sum(map(_count, entries))}
    rest["output"] = arguments.output or f"runs/{path.stem}"
    if arguments.pair:
        starter = starter_of_pair(arguments.pair, entries, method=arguments.method, **rest)
    else:
        method = arguments.method or _method(arguments.teacher, arguments.student)
        starter = Starter(arguments.teacher, arguments.student, entries, method, **rest)
    beside = {}
    for entry in entries:
        if (split := other_split(entry)) is not None and not beside:
            name = path.with_name(f"{path.stem}_{split}.yaml")
            beside[name] = _benchmark(entry, split)
            starter.benchmarks.append(str(name) if path.parent == Path() else str(name.resolve()))
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in {**beside, path: starter.text(str(path))}.items():
        write_whole(file, text)
    load_recipe(path)  # what a run would refuse is told now
    for entry in entries:
        print(f"data: {', '.join(f'{key} {value}' for key, value in entry.items())}")
    print(f"{rest['samples']:,} samples, {rest['gpus'] or 'no'} GPUs, method {starter.method}")
    print(f"wrote {', '.join(map(str, [path, *beside]))}; next: mmkd show {path}, then mmkd distill {path} --dry-run")
    return 0


def _method(teacher: str | None, student: str) -> str:
    """`spans` where both tokenizers are here and differ: their logits cannot be compared."""
    if teacher is None:
        return "sft"
    folders = [Path(teacher), Path(student.rpartition("+")[2].strip())]
    if not all((folder / "tokenizer.json").is_file() for folder in folders):
        return "kl"
    from transformers import AutoTokenizer

    from mmkd.teachers.teacher import differing_tokens

    try:
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    except (OSError, ValueError):  # the dry run says what is wrong with a model
        return "kl"
    return "spans" if differing_tokens(*tokenizers) else "kl"


def _gpus(given: int | None) -> int:
    import torch

    return torch.cuda.device_count() if given is None else given


def _count(entry: dict[str, Any]) -> int:
    """Samples of a data entry; 0 of a stream, and of a card whose data are not here."""
    from mmkd.data.entries import folder_of, read_samples, resolve
    from mmkd.data.spec import DataSpec
    from mmkd.errors import DataError

    spec = DataSpec(**entry)
    if spec.format == "datasets":
        return 0
    if spec.card:
        try:
            folder_of(resolve(spec), None)
        except DataError:
            return 0
    return len(read_samples(spec, 0, allowed=0.01))


def _benchmark(entry: dict[str, Any], split: str) -> str:
    """The card of the split that was kept apart."""
    style = entry.get("prompt", "plain")
    metric = "accuracy\nparser: letter" if style == "letter" else "exact_match"
    root = Path(entry["root"]).resolve()
    text = BENCHMARK.format(split=split, root=root, style=style, metric=metric, tokens=128 if style == "plain" else 16)
    files = {key: value for key, value in entry.get("files", {}).items() if key != "annotations"}
    return text + (f"files: {json.dumps(files)}\n" if files else "") + ("text_only: true\n" if entry.get("text_only") else "")
