"""Whole runs of `mmkd rank`: a dual encoder that learns to rank, and a cross-encoder that learns to match.

A ranking run ends in a comparison of the student before training, the control, the student and the teacher. The control is the
same dual encoder on the same data, order, steps and seed with the contrastive loss alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

import mmkd
from mmkd.base.checksums import check_whole
from mmkd.base.distributed import alone_in, is_main_process, wait_for_all, world_size
from mmkd.base.files import save_whole
from mmkd.base.run_folder import EVENTS, claim, restart, take_control
from mmkd.errors import DataError
from mmkd.retrieval.batches import PairDataset
from mmkd.retrieval.cross_encoders import load_matching
from mmkd.retrieval.dual_encoders import DualEncoder, load_dual
from mmkd.retrieval.matching import MatchingDataset, MatchingModel
from mmkd.retrieval.measures import retrieval_ranks
from mmkd.retrieval.models import build_dual, build_matching, load_cross_teacher
from mmkd.retrieval.pairs import PairSet, read_pairs
from mmkd.retrieval.ranking import RankingModel
from mmkd.retrieval.recipe import MatchingRecipe, RankingRecipe, TrainingSpec
from mmkd.retrieval.score_table import ScoreTable
from mmkd.retrieval.summary import summarise, write_summary
from mmkd.retrieval.trainer import PairTrainer, freeze_unreached
from mmkd.towers.finite import check_trained
from mmkd.towers.loading import device_of_process
from mmkd.train.checkpoints import last_checkpoint, step_of
from mmkd.train.lines import TrainingLines
from mmkd.train.reporting import refusals, report
from mmkd.train.spec import tracker_errors
from mmkd.train.stop_at_step import ends_when_asked
from mmkd.train.trainer import split_evenly, training_arguments

logger = logging.getLogger(__name__)


def rank(recipe: RankingRecipe, *, anew: bool = False) -> dict[str, Any]:
    """Runs a ranking recipe to its summary; started again with the same recipe it goes on where it stopped.

    anew: what the folder holds of a run is deleted first.
    Returns what it writes to OUTPUT/summary.json. Raises DataError, RecipeError, TowerError.
    """
    started = time.monotonic()
    run = Path(recipe.output)
    pairs, test = _read(recipe)
    check_sizes(recipe.training, pairs)
    with alone_in(run, "the same output"):
        if anew:
            restart(run)
        claim(run, claimed_content(recipe), title=recipe.title, seed=recipe.seed, changeable=("report_to",))
        teacher = load_cross_teacher(recipe.teacher)
        before = build_dual(recipe.student, pairs.texts, recipe.seed)
        models: dict[str, DualEncoder] = {"before": before}
        table = ScoreTable(teacher, pairs, run.parent / "teacher_scores", recipe.teacher.batch_size)
        if recipe.control:
            models["control"] = train_control(recipe, before, pairs, run)
        models["student"] = train_dual(recipe, "student", pairs, run, table)
        if not is_main_process():
            return {}
        table.save()
        return summarise(recipe, run, models, teacher, test, time.monotonic() - started)


def train_matching(recipe: MatchingRecipe, *, anew: bool = False) -> dict[str, Any]:
    """Trains a cross-encoder and scores it on the test set; the model is OUTPUT/model. `anew` as in `rank`.

    Raises DataError, TowerError.
    """
    started = time.monotonic()
    if world_size() > 1:
        raise DataError(f"a matching recipe draws its negatives in one process; {world_size()} are running")
    run = Path(recipe.output)
    pairs, test = _read(recipe)
    if recipe.evaluation.rerank is not None:
        raise DataError("evaluation.rerank: a matching recipe has no student whose order could be reranked; take it out")
    check_sizes(recipe.training, pairs)
    with alone_in(run, "the same output"):
        if anew:
            restart(run)
        claim(run, claimed_content(recipe), title=recipe.title, seed=recipe.seed, changeable=("report_to",))
        final = run / "model"
        if not final.exists():
            encoder = build_matching(recipe.model, pairs.texts, recipe.seed)
            model = MatchingModel(encoder, pairs, recipe.negatives, augment=recipe.training.augment)
            train_model(model, MatchingDataset(pairs, encoder), recipe.training, recipe.seed, "model", run, recipe.report_to)
            save_on_main(encoder, final)
            clear(run, "model")
        check_whole(final, "put it back, or delete it: the same command trains it again")
        teacher = load_matching(final, torch.float32)
        teacher.model.to(device_of_process())
        scores = ScoreTable(teacher.freeze(), test).all_scores()
        ranks = {"teacher": retrieval_ranks(scores, scores.T, test.relevance())}
        parameters = {"teacher": teacher.parameter_count()["total"]}
        return write_summary(recipe, run, ranks, test.relevance(), parameters, time.monotonic() - started)


def _read(recipe: RankingRecipe | MatchingRecipe) -> tuple[PairSet, PairSet]:
    """The pairs to train on, and the test set."""
    if wrong := list(tracker_errors(recipe.report_to)):
        raise DataError("; ".join(wrong))
    return tuple(read_pairs(data, recipe.seed, recipe.data_root) for data in (recipe.data, recipe.evaluation.data))


def check_sizes(training: TrainingSpec, pairs: PairSet) -> None:
    """Raises DataError where batches do not fit processes or data."""
    wrong = split_evenly(training.optimiser, world_size())
    if len(pairs) < training.optimiser.batch_size:
        wrong = [*wrong, f"there are {len(pairs)} pairs, fewer than batch_size {training.optimiser.batch_size}"]
    if wrong:
        raise DataError("; ".join(wrong))


def claimed_content(recipe: RankingRecipe | MatchingRecipe) -> dict[str, Any]:
    """What two runs in one folder have to share."""
    return recipe.model_dump(mode="json", exclude={"output", "title"})


# ---- training --------------------------------------------------------------------------------------------------------


def train_dual(recipe: RankingRecipe, role: str, pairs: PairSet, run: Path, table: ScoreTable | None) -> DualEncoder:
    """Trains one dual encoder, or loads it where it is done already; resumes from the last complete checkpoint."""
    final = run / role
    if not final.exists():
        student = build_dual(recipe.student, pairs.texts, recipe.seed)
        model = RankingModel(student, pairs, recipe.ranking, table, recipe.training.augment)
        train_model(model, PairDataset(pairs, student), recipe.training, recipe.seed, role, run, recipe.report_to)
        save_on_main(student, final)
        clear(run, role)
    check_whole(final, "put it back, or delete it: the same command trains it again")
    model = load_dual(final, dtype="float32", trust_remote_code=recipe.student.trust_remote_code)
    return model.to(device_of_process()).eval()


def train_model(
    model: nn.Module, dataset: PairDataset, training: TrainingSpec, seed: int, role: str, run: Path,
    report_to: Sequence[str] = (),
) -> None:  # fmt: skip
    """One training: checkpoints under OUTPUT/stages, losses in OUTPUT/log and on the dashboards `report_to`."""
    folder = run / "stages" / role
    arguments = training_arguments(training, role, folder, seed, world_size(), report_to=report_to)
    set_seed(seed)
    unreached = freeze_unreached(model, dataset.collate([dataset[0], dataset[1]])["batch"].to(arguments.device))
    if unreached:
        logger.info("not trained, since the loss does not reach them: %s", ", ".join(unreached[:4]))
    resume = last_checkpoint(folder)
    if resume is None:
        logger.info("%s: %d pairs, batches of %d", role, len(dataset), training.optimiser.batch_size)
    else:
        logger.info("%s: resumed at step %s", role, step_of(resume))
    set_seed(seed)
    trainer = PairTrainer(model, dataset, training.optimiser, arguments, run / "log" / f"{role}.jsonl")
    report(trainer, report_to, f"{run.name}, {role}", run / EVENTS / role)
    lines = TrainingLines(role, training.optimiser.batch_size)
    trainer.add_callback(lines)
    with ends_when_asked(trainer, role), closing(lines), refusals(report_to):
        trainer.train(resume_from_checkpoint=resume)
    trainer.finite.look()
    check_trained(model.state_dict().items(), role)


def save_on_main(model: Any, folder: Path) -> None:
    """Saves on the main process; the folder appears complete or not at all, and no process goes on before."""
    if is_main_process():
        save_whole(folder, model.save)
    wait_for_all()


def clear(run: Path, role: str) -> None:
    """Removes the checkpoints of a training that is done."""
    if is_main_process():
        shutil.rmtree(run / "stages" / role, ignore_errors=True)


def train_control(recipe: RankingRecipe, before: DualEncoder, pairs: PairSet, run: Path) -> DualEncoder:
    """The contrastive-only control, trained once for all runs beside this one that would train the very same."""
    shared = run.parent / "controls" / control_key(recipe, before, pairs)
    with alone_in(shared, "the control of this one, too,", wait=True):
        control = train_dual(recipe, "control", pairs, shared, None)
    if is_main_process():
        take_control(shared, run, "control")
    return control


def control_key(recipe: RankingRecipe, before: DualEncoder, pairs: PairSet) -> str:
    """What defines a control: student, untrained weights, training, seed, names of pictures, captions and this version."""
    spec = [part.model_dump(mode="json") for part in (recipe.student, recipe.training)]
    names = [ref.key for ref in pairs.images]
    facts = [mmkd.__version__, before.fingerprint(), spec, recipe.seed, names, pairs.texts, pairs.pairs.tolist()]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
