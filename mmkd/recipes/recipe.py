"""The recipe: one YAML file that says everything about a distillation run.

It is validated as a whole before anything is loaded; all errors come at once, each with the key's path and what to do.
Experiments are overrides on the command line (`stages.sft.terms.kl.weight=2`), not copies of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmkd.base.yaml_files import Loader, read_mapping
from mmkd.errors import RecipeError, did_you_mean

FORMATS = ("scienceqa", "textvqa", "jsonl", "easy_vqa", "llava", "preference", "shards", "datasets")
PARTS = ("vision", "projector", "language")
TRAINABLE = (*PARTS, "mlp")  # "mlp": of the language model its feed-forward layers, with experts and routers, alone

Model = TypeVar("Model", bound=BaseModel)
Spec = TypeVar("Spec", bound=BaseModel)


def is_default(default: Any) -> Callable[[Any], bool]:
    """Keys that came later are left out of a run's record at their default: records of earlier versions stay valid."""
    return lambda value: value == default


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


def one_of(spec: Spec, **ways: str) -> Spec:
    """The spec, if exactly one of these keys is given; `ways` says what each is. Raises ValueError."""
    if sum(getattr(spec, name) is not None for name in ways) != 1:
        named = [f"`{name}` ({what})" if what else f"`{name}`" for name, what in ways.items()]
        raise ValueError("give either " + " or ".join(named))
    return spec


class DataSpec(Strict):
    """One data set of a stage: a card by name, or its fields given here (fields given here win over the card's)."""

    card: str | None = None
    format: Literal[FORMATS] | None = None  # type: ignore[valid-type]
    root: str | None = None
    split: str = "train"
    prompt: Literal["letter", "short", "plain"] | None = None
    ocr: bool | None = None
    files: dict[str, str] | None = None
    target: Literal["first", "majority", "sampled"] | None = None
    limit: int | None = Field(None, gt=0)  # at most this many questions, drawn with the recipe's seed
    image_limit: int | None = Field(None, gt=0)  # at most this many distinct images, with all their questions
    weight: float = Field(1.0, gt=0)  # how many times the set stands in one epoch (fractions by drawing)


class VisionConfig(Strict):
    source: str | None = None
    config: dict[str, Any] | None = None
    image_size: int | tuple[int, int] | None = None
    feature_layer: int | None = None
    mean: list[float] | None = Field(None, min_length=3, max_length=3)
    std: list[float] | None = Field(None, min_length=3, max_length=3)

    @model_validator(mode="after")
    def one_origin(self) -> VisionConfig:
        return one_of(self, source="pretrained weights", config="random weights")


class LanguageConfig(Strict):
    source: str | None = None
    config: dict[str, Any] | None = None
    chat_template: str | None = None

    @model_validator(mode="after")
    def one_origin(self) -> LanguageConfig:
        return one_of(self, source="pretrained weights", config="random weights")


class TokenizerConfig(Strict):
    """Tokenizer of a language model with random weights: the teacher's, one from a folder, or one trained on the data."""

    source: str | None = None  # "teacher", a folder or a hub id
    vocab_size: int | None = Field(None, gt=0)  # train a byte-level BPE of this size on the stages' texts

    @model_validator(mode="after")
    def one_origin(self) -> TokenizerConfig:
        return one_of(self, source='"teacher", a folder or a hub id', vocab_size="train one")


class AssembleSpec(Strict):
    vision: VisionConfig
    language: LanguageConfig
    projector: Literal["mlp", "linear", "average_pool", "pixel_shuffle", "ldp", "resampler"] = "mlp"
    # Of those that give fewer tokens: `factor`, the side of the squares, and `queries`, of the resampler.
    projector_options: dict[Literal["factor", "queries"], int] = Field(default_factory=dict, exclude_if=is_default({}))
    tokenizer: TokenizerConfig | None = None
    import_module: str | None = None  # a Python module that registers your own encoder

    @model_validator(mode="after")
    def tokenizer_is_known(self) -> AssembleSpec:
        if self.language.config is not None and self.tokenizer is None:
            raise ValueError("a language model from `config` needs `tokenizer:`, for example {source: teacher}")
        return self


class TeacherSpec(Strict):
    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantise: Literal["8bit", "4bit"] | None = None
    trust_remote_code: bool = False
    # For the visual switch: its layers keep their inputs alone and are computed again on the way back.
    gradient_checkpointing: bool = Field(False, exclude_if=is_default(False))
    cache: str | None = None  # a folder that `mmkd cache` wrote; the model itself is then not loaded
    # Its pass over the next micro-batch begins before the student works on this one; on CUDA on a stream of its own.
    ahead: bool = Field(False, exclude_if=is_default(False))
    # For a teacher with another tokenizer: terms of kind `spans` compare pieces of text instead of tokens.
    alignment: Literal["spans"] | None = Field(None, exclude_if=is_default(None))


class StudentSpec(Strict):
    model: str | None = None
    assemble: AssembleSpec | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def one_origin(self) -> StudentSpec:
        return one_of(self, model="a folder or hub id", assemble="parts")


class WeightSpec(Strict):
    start: float = Field(ge=0)
    end: float = Field(ge=0)
    over: float = Field(1.0, ge=0, le=1)


class TermSpec(Strict):
    model_config = ConfigDict(extra="allow")  # options of the kind's function, checked against its signature

    kind: str
    weight: float | WeightSpec = 1.0
    positions: Literal["response", "prompt", "visual", "answer", "text", "all"] = "response"
    path: Literal["student", "switch"] = "student"
    bridge: bool = False  # switch only: a trained linear map where the encoders' widths differ (not in the paper)
    # Over rows; "sum": of each sample's rows, and the mean over samples.
    reduction: Literal["mean", "sum"] = Field("mean", exclude_if=is_default("mean"))

    @model_validator(mode="after")
    def known(self) -> TermSpec:
        from mmkd.terms.term import KINDS

        kind = KINDS.get(self.kind)
        wrong = self._wrong_options(kind)
        if kind is None:
            wrong.insert(0, f"unknown kind {self.kind!r}{_suggest(self.kind, KINDS)}")
        if kind is not None and self.path == "switch" and not (kind.rows and kind.teacher):
            wrong.append(f"{self.kind} cannot run on the visual switch; use a divergence such as dbild or forward_kl")
        if self.bridge and self.path != "switch":
            raise ValueError("`bridge` belongs to terms with `path: switch`; feature_match builds its own")
        if kind is not None and kind.rows and not kind.teacher and self.positions not in ("response", "prompt", "text"):
            wrong.append(f"{self.kind} has no target at positions: {self.positions}; choose response, prompt or text")
        if kind is not None and not kind.rows and self.reduction != "mean":
            wrong.append(f"{self.kind} is no loss of rows and has no `reduction`")
        if _is_number(self.weight) and self.weight < 0:
            wrong.append(f"weight is {self.weight}; it must not be negative")
        if wrong:
            raise ValueError("; and ".join(wrong))
        return self

    def _wrong_options(self, kind: Any) -> list[str]:
        from inspect import signature

        wrong, parameters = [], {} if kind is None else signature(kind.function).parameters
        keys = (*type(self).model_fields, *(() if kind is None else kind.options))
        for name, value in (self.model_extra or {}).items():
            if name not in keys:
                wrong.append(f"{self.kind} has no option {name!r}{_suggest(name, keys)}")
            elif _is_number(parameters[name].default) and not _is_number(value):
                wrong.append(f"{name} is {value!r}, not a number")
            elif name in kind.choices and value not in kind.choices[name]:
                wrong.append(f"{name} is {value!r}{_suggest(str(value), kind.choices[name])}")
            elif kind.preference and (problem := _wrong_preference(name, value)):
                wrong.append(problem)
        if kind is not None and kind.rows and not wrong:
            try:
                kind.function(**(self.model_extra or {}))
            except ValueError as error:
                wrong.append(str(error))
        return wrong


def _wrong_preference(name: str, value: Any) -> str | None:
    if name == "beta" and value <= 0:
        return f"beta is {value}; it must be above 0"
    if name == "label_smoothing" and not 0 <= value < 0.5:
        return f"label_smoothing is {value}; it must be at least 0 and below 0.5"
    return None


class AdamWSpec(Strict):
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)  # share of the stage's steps
    max_grad_norm: float = Field(1.0, ge=0)


class OptimiserSpec(AdamWSpec):
    learning_rates: dict[Literal[PARTS], float] = {}  # type: ignore[valid-type]  # per part, over learning_rate
    batch_size: int = Field(32, gt=0)  # samples a step, over all processes and micro-batches
    micro_batch_size: int | None = Field(None, gt=0)  # samples a process holds at once


class LoraSpec(Strict):
    rank: int = Field(16, gt=0)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    dora: bool = False


class UpcycleSpec(Strict):
    """Makes the student sparse before its stage: experts copied from its feed-forward layers (LLaVA-MoD's values)."""

    experts: int = Field(4, ge=2)
    top_k: int = Field(2, ge=1)
    layers: Literal["every-other", "all"] | list[int] = "every-other"

    @model_validator(mode="after")
    def enough_experts(self) -> UpcycleSpec:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts; lower it or raise experts")
        return self


class LoopSpec(Strict):
    """How long training lasts, in which precision, and how often it is kept and logged."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    save_every: int = Field(200, gt=0)
    log_every: int = Field(20, gt=0)

    @model_validator(mode="after")
    def one_length(self) -> LoopSpec:
        return one_of(self, epochs="", steps="")


class StageSpec(LoopSpec):
    data: list[DataSpec] = Field(min_length=1)
    upcycle: UpcycleSpec | None = None
    train: list[Literal[TRAINABLE]] = Field(list(PARTS), min_length=1)  # type: ignore[valid-type]
    lora: LoraSpec | None = None  # on the language model
    terms: dict[str, TermSpec] = Field(min_length=1)
    control_terms: dict[str, TermSpec] | None = None  # of the SFT control; default: those without a teacher, or cross-entropy
    optimiser: OptimiserSpec = OptimiserSpec()
    gradient_checkpointing: bool = False
    group_by_length: bool = False  # batches of samples of similar length: less padding

    @field_validator("terms", "control_terms", mode="before")
    @classmethod
    def short_forms(cls, terms: Any) -> Any:
        """`cross_entropy: 1.0` means {kind: cross_entropy, weight: 1.0}; a kind left out is the term's name."""
        if not isinstance(terms, dict):
            return terms
        long = {}
        for name, spec in terms.items():
            spec = {"weight": spec} if _is_number(spec) else spec
            long[name] = {"kind": name, **spec} if isinstance(spec, dict) else spec
        return {name: spec for name, spec in long.items() if not (isinstance(spec, dict) and spec.get("weight") == 0)}

    @model_validator(mode="after")
    def consistent(self) -> StageSpec:
        if self.lora is not None and ("mlp" in self.train or self.upcycle is not None):
            raise ValueError("LoRA's adapters do not reach experts; take `lora` out of a stage with `upcycle` or `train: [mlp]`")
        if any(t.path == "switch" for t in self.terms.values()) and "vision" not in self.train:
            raise ValueError(
                "the visual switch teaches only the vision encoder, which this stage does not train, so its loss would be a "
                "constant; add `vision` to `train` or take the switch term out"
            )
        return self


class EvaluationSpec(Strict):
    benchmarks: list[str] = []
    limit: int | None = Field(None, gt=0)
    batch_size: int = Field(64, gt=0)
    blind: bool = False  # also score the student without its pictures
    every: int | None = Field(None, gt=0)  # also score the student in training, every so many steps

    @model_validator(mode="after")
    def something_to_ask(self) -> EvaluationSpec:
        if self.every and not self.benchmarks:
            raise ValueError(f"every is {self.every}, but there are no benchmarks to ask; name some in `benchmarks`")
        return self


class GuardSpec(Strict):
    """Checks before step 1; each can be told off by name, with the reason in the recipe's comment."""

    pixels_matter: bool = True
    teacher_is_better: bool = True
    samples: int = Field(32, gt=1)
    max_skipped_images: float = Field(0.01, ge=0, le=1)  # share of a training set that may be unreadable


class RunSpec(Strict):
    """What every recipe says of its run."""

    title: str
    output: str
    data_root: str | None = None  # folder that holds the data sets of cards, for training and for benchmarks
    seed: int = 0


class Recipe(RunSpec):
    max_length: int = Field(2048, gt=1)
    chunk_bytes: int = Field(256 * 2**20, gt=0)  # budget of the row engine
    compile: bool = Field(False, exclude_if=is_default(False))  # the row engine's loss maths, by torch.compile
    workers: int = Field(0, ge=0)  # processes that read and resize pictures, beside each training process
    teacher: TeacherSpec | None = None
    student: StudentSpec
    stages: dict[str, StageSpec] = Field(min_length=1)
    control: bool = True
    evaluation: EvaluationSpec = EvaluationSpec()
    guards: GuardSpec = GuardSpec()

    @model_validator(mode="after")
    def teacher_is_there(self) -> Recipe:
        from mmkd.terms.term import KINDS

        if self.teacher is None:
            users = [
                f"stages.{s}.terms.{t}" for s, stage in self.stages.items() for t, spec in stage.terms.items()
                if KINDS[spec.kind].teacher
            ]
            if users:
                raise ValueError(f"no teacher is given, but {', '.join(users)} compare with one; add `teacher: {{model: ...}}`")
            tokenizer = self.student.assemble.tokenizer if self.student.assemble else None
            if tokenizer is not None and tokenizer.source == "teacher":
                raise ValueError("the student's tokenizer is the teacher's, but no teacher is given")
        return self

    @model_validator(mode="after")
    def ahead_is_possible(self) -> Recipe:
        if self.teacher is None or not self.teacher.ahead:
            return self
        if self.teacher.cache is not None:
            raise ValueError("teacher.ahead: a cached teacher made its passes already; take teacher.ahead or teacher.cache out")
        switched = [
            f"stages.{s}.terms.{t}"
            for s, stage in self.stages.items() for t, spec in stage.terms.items() if spec.path == "switch"
        ]
        if switched:
            raise ValueError(
                f"teacher.ahead: {', '.join(switched)} put the student's features through the teacher within the step, where its "
                "next pass would be under way; take teacher.ahead out"
            )
        return self

    @model_validator(mode="after")
    def alignment_is_meant(self) -> Recipe:
        users = [
            f"stages.{s}.terms.{t}" for s, stage in self.stages.items() for t, spec in stage.terms.items() if spec.kind == "spans"
        ]
        aligned = self.teacher is not None and self.teacher.alignment == "spans"
        if users and not aligned:
            raise ValueError(
                f"{', '.join(users)} compare pieces of text, since tokens of different tokenizers do not correspond; say that "
                "this is meant: teacher.alignment=spans"
            )
        if aligned and not users:
            raise ValueError("teacher.alignment is spans, but no term is of kind `spans`; add one, or take it out")
        return self


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe at `path` with `key=value` overrides. Raises RecipeError with every error at once."""
    raw = read_raw(path, overrides)
    if "kind" in raw:
        raise RecipeError(f"{path} is a recipe of kind {raw['kind']!r}, for dual encoders; run it with: mmkd rank {path}")
    return validate(raw, str(path), Recipe)


def read_raw(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The keys and values of a recipe with what it extends, overrides and environment variables. Raises RecipeError."""
    raw = read_mapping(Path(path), "recipe", RecipeError)
    if "extends" in raw:
        parent = Path(path).parent / str(raw.pop("extends"))
        base = read_mapping(parent, "recipe", RecipeError)
        if "extends" in base:
            raise RecipeError(f"{parent} extends another recipe; `extends` goes one level deep")
        raw = _merge(base, raw)
    for override in overrides or []:
        _apply(raw, override)
    return _expand(raw, str(path))


def _merge(base: Any, top: Any, key: str = "") -> Any:
    if isinstance(base, dict) and isinstance(top, dict):
        changed = {k: _weighted(base[k], v, key) if k in base else v for k, v in top.items()}
        return {**base, **{k: _merge(base[k], v, k) if k in base else v for k, v in changed.items()}}
    return top


def _weighted(old: Any, new: Any, parent: str) -> Any:
    """A number in the place of a term written out is its new weight, not a new term."""
    is_term = parent in ("terms", "control_terms") and isinstance(old, dict)
    return {**old, "weight": new} if is_term and _is_number(new) else new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one dotted key; numbers index lists."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key != key.strip() or text.startswith("="):
        raise RecipeError(f"override {override!r} is not key=value, for example seed=1")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of override {override!r} is not YAML: {error}") from error
    *path, last = key.split(".")
    place: Any = raw
    for step in path:
        if isinstance(place, list):
            place = place[_index(step, place, override)]
            continue
        if not isinstance(place, dict):
            break
        if not isinstance(place.get(step), dict | list):
            place[step] = {"weight": place[step]} if _is_number(place.get(step)) else {}
        place = place[step]
    if isinstance(place, list):
        place[_index(last, place, override)] = value
    elif isinstance(place, dict):
        place[last] = _weighted(place.get(last), value, path[-1] if path else "")
    else:
        raise RecipeError(f"override {override!r} goes into {place!r}, which holds no keys")


def _index(step: str, place: list, override: str) -> int:
    if not step.isdigit() or int(step) >= len(place):
        raise RecipeError(f"override {override!r}: {step!r} is no index of a list of {len(place)}")
    return int(step)


def _expand(value: Any, where: str = "") -> Any:
    """Environment variables in strings: ${NAME} and ${NAME:-default}. Raises RecipeError that lists all that are not set."""
    missing: list[str] = []

    def replace(text: str, path: str) -> str:
        def found(match: re.Match) -> str:
            name, default = match["name"], match["default"]
            if name not in os.environ and default is None:
                missing.append(f"  {path}: the environment variable {name} is not set; set it or write ${{{name}:-default}}")
            return os.environ.get(name, default or "")

        return _VARIABLE.sub(found, text)

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{path}.{i}") for i, v in enumerate(value)]
        return replace(value, path) if isinstance(value, str) else value

    expanded = walk(value, "")
    if missing:
        raise RecipeError(f"{where} has {_errors(len(missing))}:\n" + "\n".join(missing))
    return expanded


_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>[^}]*))?\}")


def _errors(count: int) -> str:
    return f"{count} error{'s' * (count > 1)}"


def validate(raw: dict[str, Any], where: str, model: type[Model]) -> Model:
    """`raw` as an instance of a recipe's model. Raises RecipeError that lists every error."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e, model) for e in error.errors()]
        raise RecipeError(f"{where} has {_errors(len(lines))}:\n" + "\n".join(lines)) from error


def _explain(error: dict[str, Any], model: type[BaseModel]) -> str:
    path = ".".join(str(p) for p in error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"  {path}: unknown key{_suggest(str(error['loc'][-1]), _fields_at(error['loc'][:-1], model))}"
    if kind == "missing":
        return f"  {path}: missing"
    if kind == "invalid_key":
        return (
            f"  {path}: the key {error['input']!r} is not text; YAML reads on, off, yes and no as true and false "
            "(the field of a term is called `positions`)"
        )
    message = error["msg"].removeprefix("Value error, ")
    given = "" if kind == "value_error" else f" (given: {error['input']!r})"
    return f"  {path or 'recipe'}: {message}{given}"


def _fields_at(loc: tuple, model: Any) -> list[str]:
    """Names that are allowed at a place of the recipe, for suggestions."""
    for step in loc:
        field = model.model_fields.get(str(step))
        if field is not None:
            model = _inner_model(field.annotation) or model
        # a step that is no field is a name or an index inside a dict or list of models: the model stays
    return list(model.model_fields)


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"; {did_you_mean(name, known)}" if known else ""
