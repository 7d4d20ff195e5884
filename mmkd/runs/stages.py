"""Puts a student through the stages of a recipe, one after another; resumes anywhere."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from mmkd.base.checksums import check_whole
from mmkd.base.distributed import is_main_process, wait_for_all, world_size
from mmkd.base.files import copy_whole, save_whole, write_whole
from mmkd.base.jsonl import JsonLines
from mmkd.base.run_folder import EVENTS
from mmkd.errors import DataError
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import entry_samples, stage_parts, stage_samples
from mmkd.runs.hacking import Hacking
from mmkd.runs.plateau import BEST, Plateau, best_weights
from mmkd.runs.rounds import Rounds
from mmkd.runs.scores import with_scores
from mmkd.runs.towers import load_student
from mmkd.runs.watch import Watch
from mmkd.runs.work import Work
from mmkd.runs.writes import with_written
from mmkd.teachers.live import as_teachers
from mmkd.teachers.teacher import Teacher
from mmkd.towers.finite import check_trained
from mmkd.towers.tower import Tower
from mmkd.train.build_stage import Stage, build_stage, check_steps
from mmkd.train.checkpoints import last_checkpoint, step_of
from mmkd.train.experts import summarise_experts, write_receipt
from mmkd.train.finite import Where
from mmkd.train.guards import freeze_unreached, run_guards
from mmkd.train.lines import TrainingLines
from mmkd.train.monitor import Monitor
from mmkd.train.reference import fill_reference
from mmkd.train.reporting import refusals, report
from mmkd.train.sharded import make_whole, spreads_weights
from mmkd.train.skips import in_words, skipped_file
from mmkd.train.spec import StageSpec
from mmkd.train.stop_at_step import ends_when_asked
from mmkd.train.streaming import StreamDataset, stage_stream
from mmkd.train.trainer import DistillTrainer, split_evenly, training_arguments

logger = logging.getLogger(__name__)

SECONDS = "seconds.json"  # of a stage's folder: how long it was trained


def train(
    recipe: Recipe, role: str, student: Tower, teachers: Mapping[str, Teacher] | Teacher | None, run: Path,
    work: Work | None = None, name_of: str | None = None,
) -> Tower:  # fmt: skip
    """Puts the student through all stages; what is done already is loaded. Returns the trained tower.

    work: all that the run trains, for how long it will take.  name_of: what the log calls the model; default: the role.
    Every stage ends on disk and the next starts from there, so that a resumed run and an undisturbed one are the same.
    """
    final, teachers = run / role, as_teachers(teachers)
    if final.exists():
        check_whole(final, f"put it back, or delete it: the same command copies it again from {run / 'stages'}")
        return load_student(recipe, final)
    rounds, folder = Rounds(recipe), final
    for number, name in enumerate(recipe.stages):
        if rounds.skips(name):
            continue
        last, folder = folder, run / "stages" / role / f"{number}_{name}"
        if not (folder / "model").exists():
            recipe = with_written(recipe, teachers, student, name)
            if rounds.ends_before(name, recipe):
                folder = last
                continue
            recipe = with_scores(recipe, name, teachers, student)
            stage, trainer, resume = prepare_stage(recipe, role, name, student, teachers, run, folder, name_of)
            lines = _lines(stage, trainer, name_of or role, work)
            started = time.monotonic()
            with ends_when_asked(trainer, f"{role}, stage {name}"), closing(lines), refusals(recipe.report_to):
                trainer.train(resume_from_checkpoint=resume)
            if is_main_process():
                _add_seconds(folder, time.monotonic() - started)
            _finish(stage, trainer, run, folder)
        check_whole(folder / "model", "put it back, or delete it: the same command trains this stage again")
        student = load_student(recipe, folder / "model")
        taken = rounds.ended(name, role, student, folder)
        if taken != folder:
            folder, student = taken, load_student(recipe, taken / "model")
    if is_main_process():
        copy_whole(folder / "model", final)
    wait_for_all()
    return student


def seconds_of(run: Path, role: str) -> float:
    """Seconds that the training of a model took, all stages together; the time between a checkpoint and a kill is not in it."""
    return sum(json.loads(path.read_text(encoding="utf-8")) for path in (run / "stages" / role).glob(f"*/{SECONDS}"))


def _add_seconds(folder: Path, seconds: float) -> None:
    before = json.loads((folder / SECONDS).read_text(encoding="utf-8")) if (folder / SECONDS).exists() else 0.0
    write_whole(folder / SECONDS, json.dumps(round(before + seconds, 1)))


def _lines(stage: Stage, trainer: DistillTrainer, what: str, work: Work | None) -> TrainingLines:
    """What the log says of a stage while it is trained."""
    behind = work.behind(what, stage.name) if work is not None else None
    batch, terms = stage.spec.optimiser.batch_size, [term.name for term in stage.terms]
    lines = TrainingLines(f"{what}, stage {stage.name}", batch, terms, behind)
    trainer.add_callback(lines)
    return lines


def prepare_stage(
    recipe: Recipe, role: str, name: str, student: Tower, teachers: Mapping[str, Teacher], run: Path, folder: Path,
    name_of: str | None = None,
) -> tuple[Stage, DistillTrainer, str | None]:  # fmt: skip
    """A stage ready to be trained, its trainer, and the checkpoint to go on from. Raises DataError, TowerError, GuardError."""
    spec = recipe.stages[name]
    if unanswered := [entry for entry in spec.data if entry.target == "teacher" and entry.answers is None]:
        raise DataError(f"stage {name}: {len(unanswered)} data entries have not been answered by the teacher; train it in a run")
    set_seed(recipe.seed)
    samples = stage_samples(recipe, spec)
    stage = build_stage(name, spec, recipe, student, teachers, samples)
    if stage.receipt is not None and is_main_process():
        write_receipt(stage.receipt, folder)
    if stage.quantised is not None and is_main_process():
        logger.info("%s, stage %s: %s", name_of or role, name, stage.quantised.line())
    stream = stage_stream(spec, recipe.seed, recipe.data_root, recipe.guards.max_skipped)
    arguments = _arguments(recipe, stage, folder, streamed=stream is not None)
    if stage.of_pairs:
        (teacher,) = teachers.values()
        fill_reference(
            stage.dataset, teacher, teacher.reference_folder(run.parent / "references"),
            batch_size=_pairs_at_once(recipe, spec, arguments), chunk_bytes=recipe.chunk_bytes,
            pixels_matter=recipe.guards.pixels_matter,
        )  # fmt: skip
    skips = stage.dataset.skips
    if stream is not None:
        skips.of, skips.share = None, recipe.guards.max_skipped
    freeze_unreached(stage.distiller, stage.dataset)
    resume = last_checkpoint(folder)
    skips.keep_in(JsonLines(skipped_file(run, role)) if is_main_process() else None, name, anew=resume is None)
    if resume is None:
        terms = ", ".join(t.name for t in stage.terms)
        logger.info("%s, stage %s: %s samples, terms %s", name_of or role, name, f"{len(samples):,}", terms)
        guards, first = recipe.guards, name == next(iter(recipe.stages))
        run_guards(stage.distiller, stage.dataset, guards.samples, guards.pixels_matter, guards.teacher_is_better and first)
    else:
        logger.info("%s, stage %s: resumed at step %s", name_of or role, name, step_of(resume))
    set_seed(recipe.seed)
    dataset: Any = stage.dataset
    if stream is not None:
        done = 0 if resume is None else step_of(resume) * spec.optimiser.batch_size
        dataset = StreamDataset(dataset, stream, arguments.per_device_train_batch_size * world_size(), done)
        arguments.ignore_data_skip = True
        arguments.accelerator_config.dispatch_batches = False  # every process reads, and keeps its own
    ahead = not stage.of_pairs and any(recipe.teacher_specs[teacher].ahead for teacher in stage.teachers)
    sizes = [len(part) for part in stage_parts(recipe, spec)]
    log = run / "log" / f"{role}.jsonl"
    trainer = DistillTrainer(
        stage.distiller, dataset, spec, arguments, log, stage.collator, ahead=ahead, sizes=sizes, answers=stage.answers,
        where=Where(run, role, name, recipe.model_dump(mode="json")),
    )  # fmt: skip
    if errors := _engine_errors(stage, trainer, streamed=stream is not None):
        raise DataError(f"stage {name}: " + "; and ".join(errors))
    report(trainer, recipe.report_to, f"{Path(recipe.output).name}, {name_of or role}, {name}", run / EVENTS / role / name)
    _watch(recipe, role, stage, trainer, run, folder, resume, teachers)
    return stage, trainer, resume


def _engine_errors(stage: Stage, trainer: DistillTrainer, *, streamed: bool) -> list[str]:
    """What the stage asks for and its engine or its data cannot give."""
    found = []
    if stage.spec.optimiser.micro_batch_tokens is not None and trainer.is_deepspeed_enabled:
        found.append(
            "DeepSpeed counts micro-batches itself, so that it cannot have micro_batch_tokens; use FSDP2 (docs/scale.md), or "
            "micro_batch_size"
        )
    if stage.answers.generates and stage.distiller.lockstep:
        found.append("a student that FSDP or DeepSpeed spreads over processes cannot answer in training; use torchrun alone")
    if stage.answers.memories and streamed:
        found.append(
            f"answers: {', '.join(stage.answers.memories)} gives earlier samples again, and streamed data have no place to find "
            "them at; take `stream` out of its data"
        )
    return found


def _pairs_at_once(recipe: Recipe, spec: StageSpec, arguments: TrainingArguments) -> int:
    """Pairs that the reference reads at once: a micro-batch of training, as if all answers had `max_length` tokens."""
    held, tokens = arguments.per_device_train_batch_size, spec.optimiser.micro_batch_tokens
    return held if tokens is None else max(1, min(held, tokens // (2 * recipe.max_length)))


def _watch(
    recipe: Recipe, role: str, stage: Stage, trainer: DistillTrainer, run: Path, folder: Path, resume: str | None,
    teachers: Mapping[str, Teacher],
) -> None:  # fmt: skip
    """Scores the student while it trains, where the recipe asks for it. Raises DataError."""
    until, monitor = stage.spec.until, stage.spec.monitor
    plateau = until is not None and until.kind == "plateau"
    scored = recipe.evaluation.every is not None and not plateau
    asked = {"monitor": monitor is not None, "until": plateau, "evaluation.every": scored}
    if any(asked.values()) and spreads_weights(trainer):
        key = next(key for key, is_asked in asked.items() if is_asked)
        raise DataError(f"{key}: no process has the whole student of FSDP or ZeRO-3 while it trains; leave it out")
    done = 0 if resume is None else step_of(resume)
    if scored:
        trainer.add_callback(Watch(recipe, role, stage.name, stage.student, run, trainer.tell))
    if plateau:
        trainer.add_callback(Plateau(recipe, role, stage.name, stage.spec, stage.student, run, folder, done, trainer.tell))
    if monitor is not None:
        held_out = [sample for entry in monitor.data for sample in entry_samples(recipe, entry, bool(stage.spec.one_answer))]
        oracle = None if monitor.oracle is None else teachers[monitor.oracle]
        watched = Monitor(stage, held_out, oracle, recipe.seed, recipe.chunk_bytes)
        patience = until.patience if until is not None and not plateau else None
        trainer.add_callback(Hacking(watched, role, stage.name, run, folder, done, patience, trainer.tell))


def _arguments(recipe: Recipe, stage: Stage, folder: Path, *, streamed: bool) -> TrainingArguments:
    """The stage in transformers' terms. Raises DataError for a batch that does not divide, or that the data do not fill."""
    spec, processes = stage.spec, world_size()
    wrong = split_evenly(spec.optimiser, processes)
    if wrong:
        raise DataError(f"stage {stage.name}: {'; '.join(wrong)}")
    samples, batch = len(stage.dataset), spec.optimiser.batch_size
    if not streamed and samples < batch:
        raise DataError(f"stage {stage.name} has {samples} samples, fewer than its batch_size {batch}")
    arguments = training_arguments(spec, stage.name, folder, recipe.seed, processes, recipe.workers, recipe.report_to)
    by_tokens = spec.optimiser.micro_batch_tokens is not None  # as many as there are samples, at the most
    check_steps(stage, arguments.per_device_train_batch_size if by_tokens else arguments.gradient_accumulation_steps, processes)
    return arguments


def _finish(stage: Stage, trainer: DistillTrainer, run: Path, folder: Path) -> None:
    """Saves the student of a trained stage and drops its checkpoints."""
    dataset = stage.dataset
    if skips := dataset.skips.of_all_processes():
        logger.warning("stage %s left out %d samples: %s", stage.name, len(skips), in_words(skips))
    if trainer.train_dataset is dataset and dataset.truncated:  # of a stream the set holds the first samples alone
        cut = len(dataset.truncated)
        logger.warning("stage %s cut the ends of %d answers at max_length %d", stage.name, cut, stage.student.max_length)
    trainer.finite.look()
    best_weights(stage.student, folder)
    make_whole(trainer)
    if is_main_process():  # it alone has the whole weights of a sharded run
        stage.settle()
        check_trained(stage.student.model.state_dict().items(), f"stage {stage.name}")
        summarise_experts(run)
        save_whole(folder / "model", stage.student.save, stage.student.footprint()["weight_bytes"])
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (folder / BEST).unlink(missing_ok=True)
    wait_for_all()
