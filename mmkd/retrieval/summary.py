"""What a run ends in: how well each model finds captions and pictures of the test set, and by how much they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.base.files import write_whole
from mmkd.evaluation.statistics import verdict
from mmkd.retrieval.cross_encoders import CrossEncoder
from mmkd.retrieval.dual_encoders import DualEncoder
from mmkd.retrieval.measures import CUTOFFS, DIRECTIONS, compare_retrieval, retrieval_ranks
from mmkd.retrieval.pairs import PairSet
from mmkd.retrieval.recipe import MatchingRecipe, RankingRecipe, RetrievalSpec
from mmkd.retrieval.score_table import ScoreTable

ROLES = ("before", "control", "student", "teacher")
HEADLINE = "recall@10_both"


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
    """Writes OUTPUT/ranks.json and OUTPUT/summary.json and returns the latter. `ranks`: {role: as from `retrieval_ranks`}."""
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
