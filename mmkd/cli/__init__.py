"""The command line. Heavy imports stay inside the commands, so that `mmkd --help` answers at once."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mmkd.base.distributed import end_process
from mmkd.base.startup import quick_imports
from mmkd.errors import MmkdError

# Of each command the argument that takes any number of values; they may stand between options and after them.
LISTED = {**dict.fromkeys(("distill", "cache", "estimate", "rank"), "overrides"), "pairs": "wrong", "compare": "models"}

# What the file system refuses, and the way out. Other failures of files are faults of ours and keep their traceback.
_ROOM = "make room or take another output folder; the same command then goes on"
_OTHER = "take an output folder that can be made and written to"
REFUSED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _OTHER),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a user's mistake is one message on stderr and exit code 2, never a traceback."""
    arguments = _parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mmkd").setLevel(logging.INFO)
    # It warns at import of a kernel that only 4-bit models on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return arguments.run(arguments)
    except MmkdError as error:
        print(f"mmkd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmkd: stopped; the same command goes on from what is on the disk", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        message = _refusal(error)
        if message is None:
            raise
        print(f"mmkd: {message}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """The `mmkd` command."""
    end_process(main())


def _refusal(error: OSError) -> str | None:
    """What the file system refused, with the way out; None for failures that it did not cause."""
    if isinstance(error, shutil.Error):  # of a folder that was copied: (from, to, text) of each file
        _, target, text = error.args[0][0]
        number = next((n for n in REFUSED if f"[Errno {n}]" in text), None)
        return None if number is None else f"{os.strerror(number)}: {target}; {REFUSED[number]}"
    if error.errno not in REFUSED:
        return None
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}; {REFUSED[error.errno]}"


def positive(text: str) -> int:
    return _at_least(1, text)


def natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.removeprefix("-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line. argparse ends a list at the first option; what follows is added to it here."""
    arguments, rest = _parser().parse_known_args(argv)
    options = [text for text in rest if text.startswith("-")]
    if options:
        arguments.command.error(f"there is no option {', '.join(options)}; `{arguments.command.prog} --help` lists them")
    if rest and arguments.listed is None:
        arguments.command.error(f"{', '.join(rest)}: more than this command takes")
    if rest:
        setattr(arguments, arguments.listed, [*getattr(arguments, arguments.listed), *rest])
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmkd", description="Distil a large vision-language model into a tiny one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run, command=sub, listed=LISTED.get(name))
        return sub

    sub = command("distill", _distill, "Run the stages of a recipe, then compare teacher, SFT control and student.")
    sub.add_argument("recipe", help="a YAML file, see scripts/recipes")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example stages.sft.steps=100 seed=1")
    sub.add_argument("--dry-run", action="store_true", help="check everything and print the plan with its memory")
    sub.add_argument("--seeds", default=None, metavar="0,1,2", help="run once a seed and print means with intervals")

    sub = command("cache", _cache, "Let the teacher of a recipe speak once, and keep what the terms compare with.")
    sub.add_argument("recipe", help="a YAML file, see scripts/recipes")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="teacher.cache=FOLDER says where it goes")
    sub.add_argument("--top-k", type=positive, default=None, metavar="K", help="keep the K likeliest tokens, not hidden states")
    sub.add_argument("--batch-size", type=positive, default=16)
    sub.add_argument("--workers", type=natural, default=2, help="processes that read pictures")
    sub.add_argument("--forecast", action="store_true", help="say how large it will be, and stop")

    sub = command("estimate", _estimate, "Measure a few steps: memory by part, time, disk, what to change.")
    sub.add_argument("recipe", help="a YAML file, see scripts/recipes")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.add_argument("--memory", type=float, default=None, metavar="GIB", help="must fit into so much (default: what is here)")

    sub = command("rank", _rank, "Distil a dual encoder by ranking, or train a cross-encoder for it; compare recall.")
    sub.add_argument("recipe", help="a YAML file with `kind: ranking` or `kind: matching`, see scripts/recipes/cprd_*.yaml")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example ranking.weight=0.5 seed=1")
    sub.add_argument("--seeds", default=None, metavar="0,1,2", help="run once a seed and print means with intervals")

    sub = command("evaluate", _evaluate, "Score a model on benchmarks.")
    sub.add_argument("model", help="folder or hub id of an image-text model")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--benchmarks", help="names or card files, separated by commas")
    which.add_argument("--suite", help="name or card file of a suite: its benchmarks and their average")
    sub.add_argument("--server-scores", default="", metavar="vqav2=77.7,...", help="what test servers gave to a suite")
    sub.add_argument("--data-root", help="folder that holds the benchmarks' downloaded files")
    sub.add_argument("--output", default=None, help="folder for results (default: runs/evaluation/MODEL)")
    sub.add_argument("--batch-size", type=positive, default=32)
    sub.add_argument("--limit", type=int, default=None, help="score a seeded subset of so many questions")
    sub.add_argument("--split", default=None, help="another split than the benchmark's, for example train (see `mmkd pairs`)")
    sub.add_argument("--blind", action="store_true", help="take the pictures away: what the words alone give")
    sub.add_argument("--importance", action="store_true", help="ask with and without pictures: which questions need them")
    sub.add_argument("--choices", default="generation", choices=["generation", "likelihood"], help="of multiple choice")
    sub.add_argument("--submission", action="store_true", help="write the test servers' files")
    sub.add_argument("--cache-mb", type=int, default=1024, help="room for visual tokens of pictures with open questions")
    sub.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    sub.add_argument("--quantise", default=None, choices=["8bit", "4bit"])
    sub.add_argument("--trust-remote-code", action="store_true")

    sub = command("pairs", _pairs, "Make preference pairs: right answers of one model, wrong ones of others.")
    sub.add_argument("right", help="results folder of `mmkd evaluate --split train` of the model with the right answers")
    sub.add_argument("wrong", nargs="+", help="the same of models whose wrong answers are rejected")
    sub.add_argument("--data-root", required=True, help="folder that holds the pictures; their names are written below it")
    sub.add_argument("--output", required=True, help="the JSON lines file to write, for example DATA_ROOT/preference/train.jsonl")
    sub.add_argument("--split", default="train", help="the split that the questions must be of (default: train)")
    sub.add_argument("--every-question", action="store_true", help="also where none is wrong: an answer given to it elsewhere")

    sub = command("preferences", _preferences, "Count how often a model prefers the chosen answers of pairs.")
    sub.add_argument("model")
    sub.add_argument("--reference", required=True, help="the teacher, which rewards are measured against")
    sub.add_argument("--pairs", required=True, help="a JSON lines file, as `mmkd pairs` writes it")
    sub.add_argument("--data-root", required=True, help="folder that holds the pictures")
    sub.add_argument("--cache", default="runs/references", help="folder for log-probabilities (default: runs/references)")
    sub.add_argument("--output", default=None, help="JSON file for the figures")

    sub = command("report", _report, "Write the HTML report of a run again.")
    sub.add_argument("folder", help="the run's folder")

    sub = command("compare", _compare, "Compare models on the same questions: differences, agreement, one report for all.")
    sub.add_argument("models", nargs="+", metavar="[NAME=]FOLDER", help="results of `mmkd evaluate`, or runs of `mmkd distill`")
    sub.add_argument("--output", default="runs/compared", help="folder for comparison.json and report.html")
    sub.add_argument("--title", default="Comparison", help="of the report")

    sub = command("check", _check, "Check that a model works as a tower.")
    sub.add_argument("model", nargs="?", help="folder or hub id of an image-text model")
    sub.add_argument("--families", nargs="*", metavar="NAME", help="instead: tiny models of all families, or of these")
    sub.add_argument("--json", metavar="FILE", help="write the families' results there")
    sub.add_argument("--workers", type=positive, default=None, metavar="N", help="families at a time (default: processor cores)")
    sub.add_argument("--trust-remote-code", action="store_true")

    sub = command("list", _list, "List cards.")
    sub.add_argument("kind", choices=["models", "data", "evaluation"])
    sub.add_argument("--search", default="", metavar="WORD", help="only cards that have the word somewhere")

    sub = command("sample", _sample, "Write the embedded sample: two data sets in the benchmarks' own formats.")
    sub.add_argument("folder")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--sizes", default=None, metavar="train=N,val=N,test=N", help="scenes of each data set by split")
    return parser


def _distill(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.recipes.recipe import load_recipe, read_raw

    if read_raw(arguments.recipe, arguments.overrides).get("kind") == "ablation":
        return _ablate(arguments)
    with quick_imports():  # a recipe imports what it names, and is refused before the rest is imported
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.run import distill, table
    if arguments.dry_run:
        from mmkd.runs.plan import plan

        print(plan(recipe))
        return 0
    if arguments.seeds is not None:
        return _distill_seeds(recipe, arguments.seeds)
    summary = distill(recipe)
    if summary:
        print(table(summary))
        if "report" in summary:
            print(f"report: {summary['report']}")
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.runs.ablation import ablate, ablation_table, load_grid

    seeds = [] if arguments.seeds is None else [f"seeds=[{arguments.seeds}]"]
    grid, runs = load_grid(arguments.recipe, [*arguments.overrides, *seeds])
    if arguments.dry_run:
        print("\n".join(f"{run.name}: {run.folder}{' (done)' if run.summary else ''}" for run in runs))
        return 0
    name = Path(arguments.recipe).stem
    print(ablation_table(ablate(grid, runs, name)))
    print(Path(grid.output) / f"{name}.svg")
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.recipes.recipe import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.write_cache import describe, write_cache

    spec = recipe.teacher
    folder = Path(spec.cache) if spec is not None and spec.cache else Path(recipe.output).parent / "teacher_cache"
    facts = write_cache(
        recipe, folder, top_k=arguments.top_k, batch_size=arguments.batch_size, workers=arguments.workers,
        forecast_only=arguments.forecast,
    )
    print(facts.get("forecast", "no rows to keep") if arguments.forecast else describe(facts, arguments.recipe))
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.recipes.recipe import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from mmkd.runs.estimate import estimate

    print(estimate(recipe, arguments.memory))
    return 0


def _rank(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.retrieval.recipe import MatchingRecipe, load_ranking_recipe

        recipe = load_ranking_recipe(arguments.recipe, arguments.overrides)
        from mmkd.retrieval.run import rank, ranking_table, train_matching

    run = train_matching if isinstance(recipe, MatchingRecipe) else rank
    if arguments.seeds is not None:
        return _distill_seeds(recipe, arguments.seeds, run)
    summary = run(recipe)
    if summary:
        print(ranking_table(summary))
    return 0


def _distill_seeds(recipe, text: str, run: Callable | None = None) -> int:
    from mmkd.errors import DataError
    from mmkd.runs.run import distill
    from mmkd.runs.seeds import distill_seeds, seeds_table

    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DataError(f"--seeds {text!r} is not of the form 0,1,2") from error
    print(seeds_table(distill_seeds(recipe, seeds, run or distill)))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.evaluation.command import evaluate_command

    return evaluate_command(arguments)


def _pairs(arguments: argparse.Namespace) -> int:
    from mmkd.evaluation.preference_pairs import write_pairs

    wrong = [Path(folder) for folder in arguments.wrong]
    facts = write_pairs(
        Path(arguments.right),
        wrong,
        Path(arguments.output),
        Path(arguments.data_root),
        split=arguments.split,
        every_question=arguments.every_question,
    )
    for name, counts in facts.items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    print(arguments.output)
    return 0


def _preferences(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from mmkd.base.files import write_whole
        from mmkd.data.preference import read_preferences
        from mmkd.evaluation.preferences import preference_accuracy
        from mmkd.towers.tower import Tower

    files = {"annotations": str(Path(arguments.pairs).absolute()), "images": "."}
    samples = read_preferences(Path(arguments.data_root), "pairs", files=files)
    towers = [Tower.load(model, dtype="float32").freeze() for model in (arguments.model, arguments.reference)]
    found = preference_accuracy(*towers, samples, Path(arguments.cache))
    if arguments.output:
        write_whole(Path(arguments.output), json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from mmkd.evaluation.report import build_report

    print(build_report(arguments.folder))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from mmkd.evaluation.comparison import compare_command

    return compare_command(arguments)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.families is not None:
        return _check_families(arguments)
    if arguments.model is None:
        from mmkd.errors import DataError

        raise DataError("give a model to check, or --families")
    with quick_imports():
        from mmkd.testing import check_tower
        from mmkd.towers.tower import Tower

    facts = check_tower(Tower.load(arguments.model, dtype="float32", trust_remote_code=arguments.trust_remote_code))
    print(json.dumps(facts, indent=1))
    return 0


def _check_families(arguments: argparse.Namespace) -> int:
    from mmkd.testing.family_check import check_families, families_table, write_results

    results = check_families(arguments.families, workers=arguments.workers)
    if arguments.json:
        write_results(results, Path(arguments.json))
    print(families_table(results))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from mmkd.base.cards import list_cards, read_yaml

    for name, path in list_cards(arguments.kind).items():
        card = read_yaml(path)
        if arguments.search.lower() in f"{name} {' '.join(map(str, card.values()))}".lower():
            print(f"{name:<32} {card.get('title', '')}")
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from mmkd.errors import DataError
    from mmkd.sample.sample_set import write_sample_set

    sizes = None
    if arguments.sizes:
        try:
            sizes = {k: int(v) for k, v in (part.split("=") for part in arguments.sizes.split(","))}
        except ValueError as error:
            raise DataError(f"--sizes {arguments.sizes!r} is not of the form train=3000,val=200,test=400") from error
    write_sample_set(Path(arguments.folder), seed=arguments.seed, sizes=sizes)
    print(arguments.folder)
    return 0

