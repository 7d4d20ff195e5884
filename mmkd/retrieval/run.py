"""A whole ranking run: recipe -> control and student -> retrieval of before, control, student, teacher -> summary.

The control is the same dual encoder on the same data, order, steps and seed with the contrastive loss alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

import mmkd
from mmkd.base.distributed import is_main_process, wait_for_all, world_size
from mmkd.base.files import copy_whole, save_whole, write_whole
from mmkd.errors import DataError
from mmkd.evaluation.statistics import verdict
from mmkd.retrieval.cross_encoders import CrossEncoder, PromptedTower, ScoreTable, load_matching
from mmkd.retrieval.dual import DualEncoder, load_dual
from mmkd.retrieval.dual_models import assemble_from
from mmkd.retrieval.matching import MatchingDataset, MatchingModel, build_cross_encoder, build_fusion
from mmkd.retrieval.measures import CUTOFFS, DIRECTIONS, compare_retrieval, retrieval_ranks
from mmkd.retrieval.pairs import PairSet, read_pairs
from mmkd.retrieval.ranking import PairDataset, RankingModel, RankingTrainer, freeze_unreached
from mmkd.retrieval.recipe import CrossTeacherSpec, MatchingRecipe, RankingRecipe, RetrievalSpec, TrainingSpec
from mmkd.runs.run import claim
from mmkd.towers.loading import device_of_process, dtype_of
from mmkd.towers.tower import Tower
from mmkd.train.trainer import last_checkpoint, split_evenly, training_arguments

logger = logging.getLogger(__name__)

ROLES = ("before", "control", "student", "teacher")
HEADLINE = "recall@10_both"


def rank(recipe: RankingRecipe) -> dict[str, Any]:
    """Runs a ranking recipe to its summary; started again with the same recipe it goes on where it stopped.

    Returns what it writes to OUTPUT/summary.json. Raises DataError, RecipeError, TowerError.
    """
    started = time.monotonic()
    run = Path(recipe.output)
    pairs = read_pairs(recipe.data, recipe.seed, recipe.data_root)
    test = test_pairs(recipe)
    check_sizes(recipe.training, pairs)
    claim(run, recipe)
    teacher = load_cross_teacher(recipe.teacher)
    before = build_dual(recipe, pairs)
    models: dict[str, DualEncoder] = {"before": before}
    table = ScoreTable(teacher, pairs, run.parent / "teacher_scores", recipe.teacher.batch_size)
    if recipe.control:
        models["control"] = train_control(recipe, before, pairs, run)
    models["student"] = train_dual(recipe, "student", build_dual(recipe, pairs), pairs, run, table)
    if not is_main_process():
        return {}
    table.save()
    return summarise(recipe, run, models, teacher, test, time.monotonic() - started)


def test_pairs(recipe: RankingRecipe | MatchingRecipe) -> PairSet:
    return read_pairs(recipe.evaluation.data, recipe.seed, recipe.data_root)


def check_sizes(training: TrainingSpec, pairs: PairSet) -> None:
    wrong = split_evenly(training.optimiser, world_size())
    if len(pairs) < training.optimiser.batch_size:
        wrong = [*wrong, f"there are {len(pairs)} pairs, fewer than batch_size {training.optimiser.batch_size}"]
    if wrong:
        raise DataError("; ".join(wrong))


# ---- models ----------------------------------------------------------------------------------------------------------


def load_cross_teacher(spec: CrossTeacherSpec) -> CrossEncoder:
    """The frozen teacher of a recipe, on this process's device."""
    if spec.kind == "itm":
        teacher: CrossEncoder = load_matching(spec.model, dtype_of(spec.dtype))
    else:
        tower = Tower.load(spec.model, dtype=dtype_of(spec.dtype), trust_remote_code=spec.trust_remote_code)
        teacher = PromptedTower(tower, **spec.prompt())
    teacher.model.to(device_of_process())
    return teacher.freeze()


def build_dual(recipe: RankingRecipe, pairs: PairSet) -> DualEncoder:
    """The student before training."""
    spec = recipe.student
    if spec.model is not None:
        model = load_dual(spec.model, dtype="float32", seed=recipe.seed, trust_remote_code=spec.trust_remote_code)
    else:
        model = assemble_from(spec.assemble, pairs.texts, recipe.seed)
    return model.to(device_of_process())


# ---- training --------------------------------------------------------------------------------------------------------


def train_dual(
    recipe: RankingRecipe, role: str, student: DualEncoder, pairs: PairSet, run: Path, table: ScoreTable | None
) -> DualEncoder:
    """Trains one dual encoder, or loads it where it is done already; resumes from the last complete checkpoint."""
    final = run / role
    if not final.exists():
        set_seed(recipe.seed)
        dataset = PairDataset(pairs, student)
        model = RankingModel(student, pairs, recipe.ranking, table, recipe.training.augment)
        train_model(model, dataset, recipe.training, recipe.seed, role, run)
        save_on_main(student, final)
        clear(run, role)
    model = load_dual(final, dtype="float32", trust_remote_code=recipe.student.trust_remote_code)
    return model.to(device_of_process()).eval()


def train_model(model: Any, dataset: Any, training: TrainingSpec, seed: int, role: str, run: Path) -> None:
    """One training with transformers' Trainer: checkpoints under OUTPUT/stages, losses in OUTPUT/log."""
    folder = run / "stages" / role
    arguments = training_arguments(training, role, folder, seed, world_size())
    unreached = freeze_unreached(model, dataset.collate([dataset[0], dataset[1]])["batch"].to(arguments.device))
    if unreached:
        logger.info("not trained, since the loss does not reach them: %s", ", ".join(unreached[:4]))
    resume = last_checkpoint(folder)
    if resume is None:
        logger.info("%s: %d pairs, batches of %d", role, len(dataset), training.optimiser.batch_size)
    set_seed(seed)
    trainer = RankingTrainer(model, dataset, training, arguments, run / "log" / f"{role}.jsonl")
    trainer.train(resume_from_checkpoint=resume)


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
    control = train_dual(recipe, "control", build_dual(recipe, pairs), pairs, shared, None)
    if is_main_process():
        (run / "log").mkdir(parents=True, exist_ok=True)
        if not (run / "control").exists():
            copy_whole(shared / "control", run / "control")
        shutil.copy(shared / "log" / "control.jsonl", run / "log" / "control.jsonl")
    return control


def control_key(recipe: RankingRecipe, before: DualEncoder, pairs: PairSet) -> str:
    """What defines a control: student, untrained weights, training, seed, names of pictures, captions and this version."""
    spec = [part.model_dump(mode="json") for part in (recipe.student, recipe.training)]
    names = [ref.key for ref in pairs.images]
    facts = [mmkd.__version__, before.fingerprint(), spec, recipe.seed, names, pairs.texts, pairs.pairs.tolist()]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dual_similarities(model: DualEncoder, pairs: PairSet, batch_size: int) -> Tensor:
    """Cosines of every picture and every caption, on the CPU. [images, texts]"""
    model.eval()
    images, texts = [], []
    for start in range(0, len(pairs.images), batch_size):
        pixels = model.prepare_images([ref.load() for ref in pairs.images[start : start + batch_size]])
        images.append(model.embed_images({k: v.to(model.device) for k, v in pixels.items()}))
    for start in range(0, len(pairs.texts), batch_size):
        tokens = model.prepare_texts(pairs.texts[start : start + batch_size])
        texts.append(model.embed_texts({k: v.to(model.device) for k, v in tokens.items()}))
    return (torch.cat(images).float() @ torch.cat(texts).float().T).cpu()


def teacher_similarities(table: ScoreTable, spec: RetrievalSpec, student: Tensor | None) -> tuple[Tensor, Tensor]:
    """The teacher's order of a test set both ways: [I, T], [T, I].

    Every pair is scored; with `rerank` only the best of the student's order `student` [I, T] are, which come first then.
    """
    if spec.rerank is None:
        scores = table.all_scores()
        return scores, scores.T
    return _reranked(student, spec.rerank, table), _reranked(student.T, spec.rerank, table, transposed=True)


def _reranked(similarities: Tensor, k: int, table: ScoreTable, transposed: bool = False) -> Tensor:
    best = similarities.topk(min(k, similarities.shape[1]), dim=-1).indices  # [Q, k]
    rows = torch.arange(len(similarities))[:, None].expand_as(best)
    scores = table.scores(*((best, rows) if transposed else (rows, best)))  # [Q, k], in 0..1
    # Cosines lie within -1..1: scores lifted by 2 stand before all that the teacher has not seen.
    return similarities.scatter(-1, best, scores + 2)


def summarise(
    recipe: RankingRecipe, run: Path, models: dict[str, DualEncoder], teacher: CrossEncoder, test: PairSet, seconds: float
) -> dict[str, Any]:
    """Recall, median rank, intervals and paired differences on the test set; writes OUTPUT/summary.json."""
    spec, relevant = recipe.evaluation, test.relevance()
    similarities = {role: dual_similarities(model, test, spec.batch_size) for role, model in models.items()}
    ranks = {role: retrieval_ranks(s, s.T, relevant) for role, s in similarities.items()}
    table = ScoreTable(teacher, test, run.parent / "teacher_scores", recipe.teacher.batch_size)
    ranks["teacher"] = retrieval_ranks(*teacher_similarities(table, spec, similarities["student"]), relevant)
    table.save()
    parameters = {role: m.parameter_count()["total"] for role, m in [*models.items(), ("teacher", teacher)]}
    return write_summary(recipe, run, ranks, relevant, parameters, seconds)


def write_summary(
    recipe: RankingRecipe | MatchingRecipe, run: Path, ranks: dict, relevant: Tensor, parameters: dict[str, int], seconds: float
) -> dict[str, Any]:
    compared = compare_retrieval(ranks, relevant)
    for entry in compared["recall"].values():
        entry["parameters"] = parameters
        if "student_minus_control" in entry:
            lead = entry["student_minus_control"]
            entry["verdict"] = verdict({"difference": lead["mean"], "ci95": lead["ci95"]})
    summary = {
        "title": recipe.title,
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        "images": relevant.shape[0],
        "texts": relevant.shape[1],
        "rerank": recipe.evaluation.rerank,
        "benchmarks": compared["recall"],
        "median_rank": compared["median_rank"],
    }
    write_whole(run / "ranks.json", json.dumps(ranks) + "\n")
    write_whole(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def ranking_table(summary: dict[str, Any]) -> str:
    """The summary for the terminal."""
    recalls, medians = summary["benchmarks"], summary["median_rank"]
    roles = [role for role in ROLES if role in recalls[HEADLINE]]
    lines = []
    for direction in DIRECTIONS:
        lines.append(f"{direction.replace('_', ' ')} ({summary['images']} pictures, {summary['texts']} captions)")
        for role in roles:
            cells = "  ".join(f"R@{k} {_share(recalls[f'recall@{k}_{direction}'], role)}" for k in CUTOFFS)
            lines.append(f"  {role:<8} {cells}  median rank {medians[direction][role]:g}")
    entry = recalls[HEADLINE]
    lines += [f"{role:<8} {entry['parameters'][role]:>13,} parameters" for role in roles if role != "before"]
    if summary["rerank"] is not None:
        lines.append(f"the teacher orders the student's {summary['rerank']} best candidates of each query")
    if "verdict" in entry:
        lines.append(f"R@10: {entry['verdict']}")
    return "\n".join([*lines, f"{summary['seconds']:.0f} seconds"])


def _share(entry: dict[str, Any], role: str) -> str:
    low, high = entry[f"{role}_ci95"]
    return f"{100 * entry[role]:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


# ---- the teacher's own recipe ----------------------------------------------------------------------------------------


def train_matching(recipe: MatchingRecipe) -> dict[str, Any]:
    """Trains a cross-encoder and scores it on the test set; the model is OUTPUT/model. Raises DataError, TowerError."""
    started = time.monotonic()
    if world_size() > 1:
        raise DataError(f"a matching recipe draws its negatives in one process; {world_size()} are running")
    run = Path(recipe.output)
    pairs = read_pairs(recipe.data, recipe.seed, recipe.data_root)
    test = test_pairs(recipe)
    if recipe.evaluation.rerank is not None:
        raise DataError("evaluation.rerank: a matching recipe has no student whose order could be reranked; take it out")
    check_sizes(recipe.training, pairs)
    claim(run, recipe)
    final = run / "model"
    if not final.exists():
        spec = recipe.model
        if spec.model is not None:
            encoder = load_matching(spec.model, torch.float32)
        elif spec.config is not None:
            encoder = build_cross_encoder(spec.config, pairs.texts, recipe.seed)
        else:
            encoder = build_fusion(spec.fuse, pairs.texts, recipe.seed)
        encoder.model.to(device_of_process())
        set_seed(recipe.seed)
        model = MatchingModel(encoder, pairs, recipe.negatives, augment=recipe.training.augment)
        train_model(model, MatchingDataset(pairs, encoder), recipe.training, recipe.seed, "model", run)
        save_on_main(encoder, final)
        clear(run, "model")
    teacher = load_matching(final, torch.float32)
    teacher.model.to(device_of_process())
    scores = ScoreTable(teacher.freeze(), test).all_scores()
    ranks = {"teacher": retrieval_ranks(scores, scores.T, test.relevance())}
    parameters = {"teacher": teacher.parameter_count()["total"]}
    return write_summary(recipe, run, ranks, test.relevance(), parameters, time.monotonic() - started)
