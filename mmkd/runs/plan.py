"""What a run will take, before it runs: stages, what is trained, rows a step, memory of the losses, disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmkd.data.samples import Sample
from mmkd.engine.positions import rows_at
from mmkd.errors import shown
from mmkd.recipes.recipe import Recipe
from mmkd.runs.answers_apart import with_answers_apart
from mmkd.runs.data import all_samples, texts_of
from mmkd.runs.preflight import preflight
from mmkd.runs.run import check_benchmarks
from mmkd.runs.towers import build_student, load_teachers
from mmkd.runs.writes import write_lines
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Term
from mmkd.towers.export import serving_remarks
from mmkd.towers.tower import Encoded, Tower
from mmkd.train.batch import Pair
from mmkd.train.build_stage import Stage, build_stage
from mmkd.train.optimisers import OPTIMISERS
from mmkd.train.token_batches import count_line

PROBE = 64  # samples prepared to learn lengths


def plan(recipe: Recipe) -> str:
    """The plan of `mmkd distill --dry-run`: everything is read and checked, nothing is trained or written."""
    check_benchmarks(recipe)
    samples = all_samples(recipe)
    teachers = load_teachers(recipe)
    student = build_student(recipe, teachers, texts_of(samples))
    recipe = with_answers_apart(recipe, student, teachers)
    samples = all_samples(recipe)
    surveys = preflight(recipe, student, teachers)
    lines = [recipe.title, f"output: {recipe.output}", ""]
    for name, teacher in teachers.items():
        lines += _tower(name, teacher.body)
    lines += [*(["teacher: none"] if not teachers else []), *_tower("student", student)]
    lines += [f"  served elsewhere: {remark}" for remark in serving_remarks(student.model)]
    for name, teacher in teachers.items():
        ratio = student.parameter_count()["total"] / teacher.body.parameter_count()["total"]
        lines.append(f"the student has {100 * ratio:.1f} % of the {name}'s parameters")
    lines += write_lines(recipe)
    for name, spec in recipe.stages.items():
        stage = build_stage(name, spec, recipe, student, teachers, samples[name])
        student = stage.student
        lines += ["", *(stage.receipt.lines() if stage.receipt else []), *_stage(recipe, stage, samples[name])]
        lines += [line for survey in surveys[name] for line in survey.lines()]
        stage.leave()
    lines += ["", disk_line(recipe, student)]
    return "\n".join(lines)


def _tower(role: str, tower: Tower) -> list[str]:
    parts = {part: sum(p.numel() for _, p in found) for part, found in tower.part_parameters().items()}
    shares = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    weights = sum(p.numel() * p.element_size() for p in tower.model.parameters())
    return [f"{role}: {sum(parts.values()):,} parameters ({shares}), weights {bytes_text(weights)}"]


def _stage(recipe: Recipe, stage: Stage, samples: list[Sample]) -> list[str]:
    spec, student = stage.spec, stage.student
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    batch = spec.optimiser.batch_size
    steps = spec.steps or int((spec.epochs or 1) * (len(samples) // batch))
    probed = [stage.dataset.prepare(s) for s in samples[:: max(1, len(samples) // PROBE)][:PROBE]]
    usable = [pair for pair in probed if isinstance(pair, Pair)]
    rows = _rows(student, [pair.student for pair in usable], stage.terms, batch)
    optimiser = round((OPTIMISERS[spec.optimiser.kind].moments + 1) * 4 * trained)  # its moments and the gradient, float32
    ours, naive = loss_memory(student, stage.teachers, stage.terms, rows, recipe.chunk_bytes)
    lines = [
        f"stage {stage.name}: {len(samples):,} samples, {steps:,} steps of {batch}, trains {', '.join(spec.train)} "
        f"({trained:,} parameters)",
        "  terms: " + ", ".join(term_text(t) for t in stage.terms),
        f"  a step: about {rows:,} rows of {student.vocabulary:,} logits",
        f"  memory: gradients and optimiser {bytes_text(optimiser)}, losses {bytes_text(ours)} "
        f"(a naive computation: {bytes_text(naive)})",
    ]
    if (tokens := spec.optimiser.micro_batch_tokens) is not None:
        lines.insert(2, "  " + count_line(usable, batch, tokens))
    if spec.generates:
        lines.insert(1, "  answers: " + ", ".join(f"{name} {shown(given)}" for name, given in spec.answers.items()))
    if stage.quantised is not None:
        lines.append(f"  {stage.quantised.line()}")
    if any(t.switched for t in stage.terms):
        lines.append("  the visual switch needs the live teacher: a third pass, with gradients through its language model")
    return lines


def term_text(term: Term) -> str:
    """A term by name and kind, with the rows that it counts on, where it counts on rows, and its teacher, of several."""
    rows = f" on {term.positions}" if term.reads_logits and not term.needs_pairs else ""
    compared = f" with {term.place.teacher}" if term.place.teacher else ""
    return f"{term.name} ({term.kind}{rows}{', switched' if term.switched else ''}{compared})"


def _rows(student: Tower, encoded: list[Encoded], terms: list[Term], batch: int) -> int:
    """Rows of logits a step, from the probed samples."""
    positions = [*{t.positions for t in terms if t.reads_logits and not t.needs_pairs}]
    if any(t.needs_pairs for t in terms):
        positions += ["response", "response"]  # the rejected answers are about as long as the chosen ones
    inputs = student.collate(encoded)
    return round(batch * sum(int(rows_at(inputs, name).sum()) for name in positions) / len(encoded))


def loss_memory(
    student: Tower, teachers: Mapping[str, Teacher], terms: Sequence[Term], rows: int, budget: int
) -> tuple[int, int]:
    """(ours, naive) bytes at the peak of the row losses. Ours: one chunk, the stored hidden rows, the head's gradient."""
    row_terms = [t for t in terms if t.reads_logits]
    if not row_terms:
        return 0, 0
    size = 4
    head = student.head.weight
    width_t = max((teacher.head.weight.shape[1] for teacher in teachers.values()), default=0)
    tensors = 2 + max(t.memory_factor for t in row_terms)
    naive = rows * student.vocabulary * size * tensors
    stored = rows * (2 * head.shape[1] + width_t) * size + (head.numel() * size if head.requires_grad else 0)
    return min(budget, naive) + stored, naive + stored


def disk_line(recipe: Recipe, student: Tower) -> str:
    weights = sum(p.numel() * 4 for p in student.model.parameters())
    models = len(recipe.stages) + 1
    total = models * weights + 2 * 3 * weights  # one model a stage and the last; two checkpoints with two moments each
    controls = len(recipe.controls) if recipe.teacher_specs else 0
    again = f" ({1 + controls} times, with the controls)" if controls else ""
    return f"disk: at most {bytes_text(total)}{again} in {Path(recipe.output)}"


def bytes_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError(count)
