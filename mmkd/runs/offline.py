"""The plan of a recipe without weights and data: models are made from configurations alone, and memory is reckoned.

`mmkd distill RECIPE --dry-run --offline` is for machines that have neither. Configurations are cards in `models/configs`, or the
`config.json` of a folder. Nothing is downloaded, and no data are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    BlipForImageTextRetrieval,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from mmkd.base.cards import list_cards, load_card
from mmkd.base.schema import Strict
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError, did_you_mean
from mmkd.recipes.recipe import Recipe
from mmkd.retrieval.recipe import RankingRecipe
from mmkd.runs.plan import bytes_text, term_text
from mmkd.terms.spec import build_terms
from mmkd.terms.term import Term
from mmkd.towers.families import LANGUAGE_NAMES, VISION_NAMES, family_of
from mmkd.towers.spec import StudentSpec
from mmkd.train.optimisers import OPTIMISERS
from mmkd.train.spec import LoopSpec, StageSpec

FOLDER = "models/configs"
GPU = 80e9  # bytes
USABLE = 0.92  # of them, beside what CUDA and the allocator keep
COUNTS = (1, 8)
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


class Configuration(Strict):
    """A card of `models/configs`: of a part or a whole model by its `config`, of a LLaVA by the cards of its parts."""

    name: str
    sources: list[str] = Field(min_length=1)  # ids or folders that recipes name it by
    config: dict[str, Any] | None = None
    vision: str | None = None
    language: str | None = None

    @model_validator(mode="after")
    def part_or_whole(self) -> Configuration:
        if (self.config is None) == (self.vision is None) or (self.vision is None) != (self.language is None):
            raise ValueError("give either `config`, or `vision` and `language`")
        return self


def configuration(source: str) -> Configuration:
    """The card of a hub id or folder. Raises DataError."""
    cards = [load_card(FOLDER, name, Configuration) for name in list_cards(FOLDER)]
    wanted = source.removeprefix("hf-hub:").removeprefix("local-dir:")
    by_source = {known: card for card in cards for known in card.sources}
    if wanted not in by_source:
        raise DataError(
            f"--offline: no configuration of {source!r} is known; {did_you_mean(wanted, by_source)}, or put a card into {FOLDER} "
            "of a folder in MMKD_CARDS"
        )
    return by_source[wanted]


def model_of(source: str) -> PreTrainedModel:
    """A whole image-text model without weights, by its folder or card. Raises DataError."""
    if (Path(source) / "config.json").is_file():
        return _whole(AutoConfig.from_pretrained(source))
    card = configuration(source)
    if card.vision is not None:
        parts = (load_card(FOLDER, name, Configuration).config for name in (card.vision, card.language))
        return _llava(*parts, feature_layer=-2)
    if "vision_config" not in card.config:
        raise DataError(f"--offline: {source!r} is a part, not a whole image-text model")
    return _whole(AutoConfig.for_model(**card.config))


def student_of(spec: StudentSpec) -> PreTrainedModel:
    """The student of a recipe without weights. Raises DataError."""
    if spec.model is not None:
        return model_of(spec.model)
    vision, language = spec.assemble.vision, spec.assemble.language
    configs = [part.config or configuration(part.source).config for part in (vision, language)]
    if any(config is None or "vision_config" in config for config in configs):
        raise DataError("--offline: vision and language of a student are parts, not whole models")
    return _llava(*configs, feature_layer=vision.feature_layer or -1)


def _whole(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _llava(vision: dict[str, Any], language: dict[str, Any], feature_layer: int) -> PreTrainedModel:
    parts = [AutoConfig.for_model(**part) for part in (vision, language)]
    config = LlavaConfig(
        vision_config=parts[0], text_config=parts[1], vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if vision["model_type"] == "clip_vision_model" else "full",
    )  # fmt: skip
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


@dataclass(frozen=True)
class Shape:
    """What memory follows from: parameters by part, of the language model's feed-forward layers ("mlp"), and sizes."""

    parts: dict[str, int]
    hidden: int
    inner: int
    layers: int
    vocabulary: int
    patches: int | None  # of a picture in the vision encoder; None where they follow from the picture's area
    merged: int  # patches that become one visual token
    vision: tuple[int, int, int]  # hidden, inner, layers of the vision encoder

    @property
    def total(self) -> int:
        return sum(count for part, count in self.parts.items() if part != "mlp")


def shape_of(model: PreTrainedModel) -> Shape:
    """Counts and sizes of a model."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    paths = family_of(model.config.model_type).projector or ()
    projector = tuple(f"{path}." for path in ([paths] if isinstance(paths, str) else paths))
    parts = dict.fromkeys(("vision", "projector", "language", "mlp"), 0)
    for name, parameter in model.named_parameters():
        names = set(name.split("."))
        language, within = names & {*LANGUAGE_NAMES, "lm_head"}, name.removeprefix(f"{model.base_model_prefix}.")
        vision_only = names & set(VISION_NAMES) and not within.startswith(projector)
        part = "vision" if vision_only else "language" if language else "projector"
        parts[part] += parameter.numel()
        parts["mlp"] += parameter.numel() * (part == "language" and "mlp" in names)
    hidden = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the language model's
    vision_inner = getattr(vision, "intermediate_size", 4 * hidden)
    depths = (getattr(vision, name, None) for name in ("num_hidden_layers", "depth", "depths"))
    depth = next(depth for depth in depths if depth)
    sizes = (hidden, vision_inner, depth if isinstance(depth, int) else sum(depth))
    sides, patch = _sides(getattr(vision, "image_size", None)), _sides(vision.patch_size)
    merge = getattr(vision, "spatial_merge_size", None) or round(1 / getattr(model.config, "downsample_ratio", 1))
    merge *= 1 if isinstance(depth, int) else 2 ** (len(depth) - 1)  # encoders that halve their grid from stage to stage
    inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
    patches = sides and math.prod(side // one for side, one in zip(sides, patch, strict=True))
    return Shape(parts, text.hidden_size, inner, text.num_hidden_layers, text.vocab_size, patches, merge * merge, sizes)


def _sides(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size and tuple(size)


def upcycled_shape(shape: Shape, spec: StageSpec) -> Shape:
    """With experts copied from the feed-forward layers."""
    if spec.upcycle is None:
        return shape
    layers = spec.upcycle.layers
    sparse = {"all": shape.layers, "every-other": (shape.layers + 1) // 2}.get(layers) if isinstance(layers, str) else len(layers)
    more = (spec.upcycle.experts - 1) * shape.parts["mlp"] * sparse // shape.layers
    more += sparse * spec.upcycle.experts * shape.hidden  # routers
    parts = shape.parts | {"language": shape.parts["language"] + more, "mlp": shape.parts["mlp"] + more}
    return replace(shape, parts=parts)


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes of one process: weights of both models, gradients and optimiser, and what grows with the samples held at once."""

    teacher: float
    student: float
    training: float
    samples: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.training + self.samples


def need_of(recipe: Recipe, spec: StageSpec, student: Shape, teacher: Shape | None, samples: int, shards: int = 1) -> Need:
    """What a stage holds at its peak with so many samples of `max_length` tokens at once, in one of `shards` processes.

    Weights in the dtypes of the recipe; gradients and moments in float32; activations by layer, recomputed with gradient
    checkpoints; the teacher's pass before the student's; losses in blocks of `chunk_bytes`. Reckoned, not measured (that is
    `mmkd estimate`): the kernels' own room is not in it.
    """
    trained = sum(student.parts[part] for part in spec.train)
    weight = _SIZES["float32" if recipe.student.dtype == "auto" else recipe.student.dtype]
    moments = OPTIMISERS[spec.optimiser.kind].moments
    terms = build_terms(spec.terms)
    compared = any(term.needs_teacher for term in terms)
    teacher_bytes = _teacher_bytes(recipe, teacher) if teacher is not None and compared else 0.0
    samples *= 2 if any(term.needs_pairs for term in terms) else 1  # a chosen and a rejected answer
    held = samples * recipe.max_length
    saved = _activations(student, spec, held, weight, samples)
    rows = held * len({t.positions for t in terms if t.reads_logits})
    widths = 2 * student.hidden + (teacher.hidden if teacher is not None and compared else 0)
    losses = recipe.chunk_bytes + 4 * rows * widths
    passing = 0.0
    if teacher is not None and compared:
        passing = 2 * held * (teacher.hidden * 4 + 3 * teacher.inner)
        if any(term.switched for term in terms):  # gradients pass through it
            passing += 2 * held * teacher.hidden * teacher.layers
    layer = 4 * student.parts["language"] / student.layers  # what is gathered at a time where weights are shared out
    return Need(
        teacher_bytes, weight * student.total / shards + (layer if shards > 1 else 0), 4 * (1 + moments) * trained / shards,
        passing + saved + losses,
    )  # fmt: skip


def _teacher_bytes(recipe: Recipe, teacher: Shape) -> float:
    """Weights of all teachers, which stay in memory whether or not a stage reads them. teacher: the first one."""
    total, first = 0.0, next(iter(recipe.teacher_specs))
    for name, spec in recipe.teacher_specs.items():
        shape = teacher if name == first or spec.self else _known_shape(spec.model)
        size = {"8bit": 1.0, "4bit": 0.55}.get(spec.quantise or "", _SIZES[spec.dtype])
        total += 0.0 if name != first and (spec.served or spec.self == "current") else shape.total * size
    return total


@lru_cache
def _known_shape(model: str) -> Shape:
    return shape_of(model_of(model))


def _activations(shape: Shape, spec: StageSpec, tokens: int, weight: int, samples: int) -> float:
    """Bytes that a backward pass needs of the language model, and of the vision encoder where it is trained."""
    size = 2 if spec.precision != "float32" else 4
    if not set(spec.train) & {"vision", "projector", "language", "mlp"}:
        return 0.0
    one = tokens * (8 * shape.hidden + 4 * shape.inner) * size  # all that one layer keeps
    found = shape.layers * tokens * shape.hidden * 4 + one if spec.gradient_checkpointing else shape.layers * one
    hidden, inner, layers = shape.vision
    patches = tokens * shape.merged if shape.patches is None else samples * shape.patches  # at most, where the area decides
    one = patches * (8 * hidden + 2 * inner) * size
    if "vision" not in spec.train:
        return found + one
    return found + (layers * patches * hidden * 4 + one if spec.gradient_checkpointing else layers * one)


def most_samples(recipe: Recipe, spec: StageSpec, student: Shape, teacher: Shape | None, processes: int, shards: int) -> int:
    """How many samples a process of 80 GB holds at once, a power of two; 0 where not even one fits."""
    most, count = 0, 1
    while count <= max(1, spec.optimiser.batch_size // processes):
        if need_of(recipe, spec, student, teacher, count, shards).total > USABLE * GPU:
            break
        most, count = count, 2 * count
    return most


def plan_offline(recipe: Recipe) -> str:
    """The plan of `--dry-run --offline`. Raises DataError for a model of which no configuration is known."""
    student = shape_of(student_of(recipe.student))
    here = {name: spec for name, spec in recipe.teacher_specs.items() if not spec.served and spec.self != "current"}
    teachers = {name: student if spec.self else shape_of(model_of(spec.model)) for name, spec in here.items()}
    lines = [recipe.title, "offline: sizes and memory from configurations alone; no data are read", ""]
    lines += [_line(name, shape) for name, shape in [*teachers.items(), ("student", student)]]
    for name, spec in recipe.stages.items():
        student = upcycled_shape(student, spec)
        used = next(iter(teachers.values()), None)
        lines += ["", *_stage_lines(recipe, name, spec, student, used)]
    return "\n".join(lines)


def _line(role: str, shape: Shape) -> str:
    parts = ", ".join(f"{part} {shape.parts[part]:,}" for part in ("vision", "projector", "language"))
    tokens = "by the picture's area" if shape.patches is None else f"{shape.patches // shape.merged} a picture"
    return f"{role}: {shape.total:,} parameters ({parts}); visual tokens: {tokens}"


def _stage_lines(recipe: Recipe, name: str, spec: StageSpec, student: Shape, teacher: Shape | None) -> list[str]:
    trained = sum(student.parts[part] for part in spec.train)
    optimiser = spec.optimiser
    length = _length(spec)
    lines = [
        f"stage {name}: {length} of {optimiser.batch_size}, rate {optimiser.learning_rate:g}, trains {', '.join(spec.train)} "
        f"({trained:,} parameters)" + (f", {student.total:,} in all" if spec.upcycle else ""),
        "  data: " + ", ".join(map(_named, spec.data)),
        "  terms: " + ", ".join(_weighted(term) for term in spec.build_terms()),
    ]
    for count in COUNTS:
        for shards in dict.fromkeys((1, count)):
            most = most_samples(recipe, spec, student, teacher, count, shards)
            held = min(most or 1, optimiser.micro_batch_size or most or 1)
            need = need_of(recipe, spec, student, teacher, held, shards)
            how = "" if count == 1 else ", whole weights in each" if shards == 1 else ", weights and optimiser shared out"
            fits = f"up to {most} samples at once" if most else "does not fit"
            lines.append(
                f"  {count} x 80 GB{how}: {fits}; with {held}: {bytes_text(need.total)} (teacher {bytes_text(need.teacher)}, "
                f"student {bytes_text(need.student)}, gradients and optimiser {bytes_text(need.training)}, "
                f"samples {bytes_text(need.samples)})"
            )
    return lines


def _named(entry: DataSpec) -> str:
    return entry.card or (f"what {entry.from_} writes" if entry.from_ else f"{entry.format} in {entry.root}")


def _length(spec: LoopSpec) -> str:
    if spec.steps is not None:
        return f"{spec.steps:,} steps"
    return "1 epoch" if spec.epochs in (None, 1) else f"{spec.epochs:g} epochs"


def _weighted(term: Term) -> str:
    schedule = term.place.weight
    weight = f"{schedule.start:g}" if schedule.start == schedule.end else f"{schedule.start:g} to {schedule.end:g}"
    return f"{weight} {term_text(term)}"


# ---- dual encoders ---------------------------------------------------------------------------------------------------

TEXT_TOKENS = 64


def plan_ranking_offline(recipe: RankingRecipe) -> str:
    """The same for `mmkd rank`: a dual encoder that is assembled, and a cross-encoder with a matching head. Raises DataError."""
    if recipe.student.assemble is None:
        raise DataError("--offline: a student that is put together (student.assemble) has configurations; this one is a model")
    parts, side = recipe.student.assemble, recipe.student.assemble.vision.image_size
    vision, text = (dict(part.config or configuration(part.source).config) for part in (parts.vision, parts.text))
    vision |= {"image_size": side} if isinstance(side, int) else {}
    counts = {"vision": _count(vision), "text": _count(text)}
    counts["projections"] = parts.embedding * (vision["hidden_size"] + text["hidden_size"])
    teacher = _count(configuration(recipe.teacher.model).config)
    spec = recipe.training
    length = _length(spec)
    lines = [
        recipe.title, "offline: sizes and memory from configurations alone; no data are read", "",
        f"teacher: {teacher:,} parameters",
        f"student: {sum(counts.values()):,} parameters ({', '.join(f'{name} {count:,}' for name, count in counts.items())})",
        f"{length} of {spec.optimiser.batch_size} pairs, rate {spec.optimiser.learning_rate:g}; {recipe.ranking.candidates} hard "
        f"negatives, valid from {recipe.ranking.threshold:g} on",
    ]  # fmt: skip
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    states, size = 4 * 4 * sum(counts.values()), _SIZES[spec.precision]
    for count in COUNTS:
        held = -(-spec.optimiser.batch_size // count)
        saved = sum(
            held * tokens * (8 * c["hidden_size"] + 2 * c["intermediate_size"]) * c["num_hidden_layers"] * size
            for c, tokens in ((vision, patches), (text, TEXT_TOKENS))
        )
        total = 4 * teacher + states + saved
        fits = "" if total <= USABLE * GPU else " (does not fit)"
        lines.append(
            f"  {count} x 80 GB: {held} pairs in each: {bytes_text(total)}{fits} (teacher {bytes_text(4 * teacher)}, student "
            f"with gradients and optimiser {bytes_text(states)}, activations {bytes_text(saved)})"
        )
    return "\n".join(lines)


def _count(config: dict[str, Any]) -> int:
    """Parameters of an encoder, or of BLIP with its matching head."""
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = BlipForImageTextRetrieval(made) if made.model_type == "blip" else AutoModel.from_config(made)
    return sum(parameter.numel() for parameter in model.parameters())
