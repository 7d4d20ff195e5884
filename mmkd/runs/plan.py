"""What a run will take, before it runs: stages, what is trained, rows a step, memory of the losses, disk."""

from __future__ import annotations

from pathlib import Path

from mmkd.data.samples import Sample
from mmkd.runs.run import check_answers, check_benchmarks
from mmkd.train.experts import check_experts, upcycled
from mmkd.runs.stages import build_student, load_teacher, set_trainable, stage_samples, terms_of
from mmkd.terms.term import Term, rows_at
from mmkd.recipes.recipe import Recipe, StageSpec
from mmkd.towers.tower import Encoded, Tower

PROBE = 64  # samples prepared to learn lengths
# float32 tensors [rows, V] alive at the peak of a naive loss, beside the logits themselves (measured for KL and JSD)
NAIVE_TENSORS = {"jsd": 10, "cross_entropy": 2, "dpo": 2, "kto_pair": 2}


def plan(recipe: Recipe) -> str:
    """The plan of `mmkd distill --dry-run`: everything is read and checked, nothing is trained or written."""
    check_benchmarks(recipe)
    samples = {name: stage_samples(recipe, stage) for name, stage in recipe.stages.items()}
    check_answers(samples)
    teacher = load_teacher(recipe)
    student = build_student(recipe, teacher, [t.text for stage in samples.values() for s in stage for t in s.turns])
    check_experts(recipe, student)
    lines = [recipe.title, f"output: {recipe.output}", ""]
    lines += [*_tower("teacher", teacher), *_tower("student", student)]
    if teacher is not None:
        ratio = student.parameter_count()["total"] / teacher.parameter_count()["total"]
        lines.append(f"the student has {100 * ratio:.1f} % of the teacher's parameters")
    for name, stage in recipe.stages.items():
        student, receipt = upcycled(stage, student, recipe.seed)
        lines += ["", *(receipt.lines() if receipt else []), *_stage(recipe, name, stage, samples[name], student, teacher)]
    lines += ["", disk_line(recipe, student)]
    return "\n".join(lines)


def _tower(role: str, tower: Tower | None) -> list[str]:
    if tower is None:
        return [f"{role}: none"]
    parts = {part: sum(p.numel() for _, p in found) for part, found in tower.part_parameters().items()}
    shares = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    weights = sum(p.numel() * p.element_size() for p in tower.model.parameters())
    return [f"{role}: {sum(parts.values()):,} parameters ({shares}), weights {bytes_text(weights)}"]


def _stage(
    recipe: Recipe, name: str, stage: StageSpec, samples: list[Sample], student: Tower, teacher: Tower | None
) -> list[str]:
    set_trainable(student, stage)
    terms = terms_of(stage.terms)
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    batch = stage.optimiser.batch_size
    steps = stage.steps or int((stage.epochs or 1) * (len(samples) // batch))
    encoded = [student.encode(s) for s in samples[:: max(1, len(samples) // PROBE)][:PROBE]]
    rows = _rows(student, encoded, terms, batch)
    optimiser = 2 * 4 * trained + 4 * trained  # AdamW's two moments and the gradient, float32
    ours, naive = loss_memory(student, teacher, terms, rows, recipe.chunk_bytes)
    lines = [
        f"stage {name}: {len(samples):,} samples, {steps:,} steps of {batch}, trains {', '.join(stage.train)} "
        f"({trained:,} parameters)",
        "  terms: " + ", ".join(_term(t) for t in terms),
        f"  a step: about {rows:,} rows of {student.vocabulary:,} logits",
        f"  memory: gradients and optimiser {bytes_text(optimiser)}, losses {bytes_text(ours)} "
        f"(a naive computation: {bytes_text(naive)})",
    ]
    if any(t.path == "switch" for t in terms):
        lines.append("  the visual switch needs the live teacher: a third pass, with gradients through its language model")
    return lines


def _term(term: Term) -> str:
    return f"{term.name} ({term.kind} on {term.positions}{', switched' if term.path == 'switch' else ''})"


def _rows(student: Tower, encoded: list[Encoded], terms: list[Term], batch: int) -> int:
    """Rows of logits a step, from the probed samples."""
    positions = [*{t.positions for t in terms if t.is_row_term}]
    if any(t.is_preference for t in terms):
        positions += ["response", "response"]  # the rejected answers are about as long as the chosen ones
    inputs = student.collate(encoded)
    return round(batch * sum(int(rows_at(inputs, name).sum()) for name in positions) / len(encoded))


def loss_memory(student: Tower, teacher: Tower | None, terms: list[Term], rows: int, budget: int) -> tuple[int, int]:
    """(ours, naive) bytes at the peak of the row losses. Ours: one chunk, the stored hidden rows, the head's gradient."""
    row_terms = [t for t in terms if t.is_row_term or t.is_preference]
    if not row_terms:
        return 0, 0
    size = 4
    head = student.head.weight
    width_t = teacher.head.weight.shape[1] if teacher is not None else 0
    tensors = 2 + max(NAIVE_TENSORS.get(t.kind, 6) for t in row_terms)
    naive = rows * student.vocabulary * size * tensors
    stored = rows * (2 * head.shape[1] + width_t) * size + (head.numel() * size if head.requires_grad else 0)
    return min(budget, naive) + stored, naive + stored


def disk_line(recipe: Recipe, student: Tower) -> str:
    weights = sum(p.numel() * 4 for p in student.model.parameters())
    models = len(recipe.stages) + 1
    total = models * weights + 2 * 3 * weights  # one model a stage and the last; two checkpoints with two moments each
    control = " (twice, with the SFT control)" if recipe.control and recipe.teacher else ""
    return f"disk: at most {bytes_text(total)}{control} in {Path(recipe.output)}"


def bytes_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError(count)
