"""How a recipe describes its stages: data, terms, what is trained, by which optimiser, how long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from mmkd.answers import generating, replaced, share_errors
from mmkd.base.schema import Strict, is_default, is_number, one_of
from mmkd.data.samplers.spec import SamplerSpec
from mmkd.data.spec import DataSpec
from mmkd.errors import did_you_mean
from mmkd.registry import registry
from mmkd.terms.spec import TermSpec, build_terms
from mmkd.terms.term import Place, RowTerm, Term
from mmkd.towers.quantise import FORMATS
from mmkd.towers.spec import PARTS
from mmkd.train.optimisers import OPTIMISERS

# What a term may read of a stage whose pictures are mixed.
OF_PICTURES = frozenset({
    f"{who}.{what}" for who in ("student", "teacher") for what in ("features", "tokens", "visual_rows", "gram")
})  # fmt: skip
# What a term may read to be a distance on answers.
OF_ANSWERS = frozenset(f"{who}.{what}" for who in ("student", "teacher") for what in ("rows", "hidden"))
TRAINABLE = (*PARTS, "mlp")  # "mlp": of the language model its feed-forward layers, with experts and routers, alone


Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what the generators of Python, NumPy and torch take
LARGEST_RATE = 1e6  # the optimiser's own products leave float32 beyond it


class AdamWSpec(Strict):
    learning_rate: float = Field(1e-3, gt=0, le=LARGEST_RATE)  # the highest one, after warm-up
    weight_decay: float = Field(0.0, ge=0, le=LARGEST_RATE)  # of all weights but biases and norms
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # decay of both moments
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"  # how the rate goes on after warm-up
    warmup: float = Field(0.03, ge=0, lt=1)  # share of the stage's steps
    max_grad_norm: float = Field(1.0, ge=0)  # longer gradients are cut to this length; 0: never


class OptimiserSpec(AdamWSpec):
    # A name of mmkd.train.optimisers.OPTIMISERS; `betas` are AdamW's and Lion's, `momentum` is SGD's.
    kind: str = Field("adamw", exclude_if=is_default("adamw"))
    momentum: float = Field(0.9, ge=0, lt=1, exclude_if=is_default(0.9))  # of `kind: sgd`
    learning_rates: dict[Literal[PARTS], Annotated[float, Field(ge=0, le=LARGEST_RATE)]] = Field({})  # type: ignore[valid-type]  # per part, over learning_rate
    batch_size: int = Field(32, gt=0, le=2**20)  # samples a step, over all processes and micro-batches
    micro_batch_size: int | None = Field(None, gt=0)  # samples a process holds at once
    # In its place: padded tokens that a process holds at once, of student and teachers, visual ones included. A step keeps its
    # `batch_size` samples; they are split by their lengths.
    micro_batch_tokens: int | None = Field(None, gt=0, le=2**40, exclude_if=is_default(None))

    @field_validator("kind")
    @classmethod
    def known(cls, value: str) -> str:
        if value not in OPTIMISERS:
            raise ValueError(f"there is no optimiser {value!r}; {did_you_mean(value, OPTIMISERS)}")
        return value

    @model_validator(mode="after")
    def one_measure(self) -> OptimiserSpec:
        if self.micro_batch_size is not None and self.micro_batch_tokens is not None:
            raise ValueError("give either `micro_batch_size` or `micro_batch_tokens`; the other is `null`")
        return self


class LoraSpec(Strict):
    rank: int = Field(16, gt=0, le=2**14)  # of the adapters
    alpha: float = Field(32, gt=0, le=1e6)  # the adapters are scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of the adapters' inputs
    # names of the matrices that get adapters
    targets: list[str] | Literal["all-linear"] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    dora: bool = False  # also learns the length of each row (DoRA)


class UpcycleSpec(Strict):
    """Makes the student sparse before its stage: experts copied from its feed-forward layers (LLaVA-MoD's values)."""

    experts: int = Field(4, ge=2, le=1024)  # copies of each feed-forward layer
    top_k: int = Field(2, ge=1)  # experts that read each token
    # which layers become sparse: these words, or numbers from 0
    layers: Literal["every-other", "all"] | list[int] = "every-other"

    @model_validator(mode="after")
    def enough_experts(self) -> UpcycleSpec:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts; lower it or raise experts")
        return self


class QuantiseSpec(Strict):
    """Trains the student through quantised weights, which it keeps; gradients pass the rounding (straight through)."""

    format: Literal[tuple(FORMATS)]  # type: ignore[valid-type]  # q4_0, q8_0: of llama.cpp (GGUF); nf4: of bitsandbytes
    # parts whose matrices are quantised; embeddings and head never are
    parts: list[Literal[PARTS]] = Field(["language"], min_length=1)  # type: ignore[valid-type]


class LoopSpec(Strict):
    """How long training lasts, in which precision, and how often it is kept and logged."""

    epochs: float | None = Field(None, gt=0, le=1e6)  # length as passes over the data, fractions too; or give `steps`
    steps: int | None = Field(None, gt=0, le=10**9)  # length as optimiser steps; or give `epochs`
    # of the forward and backward passes; weights and optimiser stay in float32
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    save_every: int = Field(200, gt=0, le=10**9)  # steps between checkpoints
    log_every: int = Field(20, gt=0, le=10**9)  # steps between lines of the log

    @model_validator(mode="after")
    def one_length(self) -> LoopSpec:
        return one_of(self, epochs="", steps="")


class UntilSpec(Strict):
    """Ends a stage before its length is over.

    plateau: after `patience` scores in a row on the validation split that are not above the best before; its student is that of
    the best score. golden: after `patience` golden losses of `monitor` in a row that are not below the lowest before; its student
    is that of the lowest. every: of `plateau`, steps between two scores; default: `evaluation.every`.
    """

    kind: Literal["plateau", "golden"]  # plateau: the score no longer rises; golden: the golden loss of `monitor` no longer falls
    patience: int = Field(3, gt=0, le=10**6)  # scores in a row that are not better than the best before
    every: int | None = Field(None, gt=0, le=10**9)

    @model_validator(mode="after")
    def one_rhythm(self) -> UntilSpec:
        if self.kind == "golden" and self.every is not None:
            raise ValueError("`golden` looks at what `monitor` measures; give `every` there")
        return self


class MonitorSpec(Strict):
    """Asks on prompts that the stage never trains on whether a student that comes closer to its teacher gets better, too."""

    data: list[DataSpec] = Field(min_length=1)  # the prompts with their labels, such as the split `val` of the stage's own data
    every: int = Field(100, gt=0, le=10**9)  # steps between two measurements; the stage's start and end are measured, too
    # The proxy: the distance to the stage's teachers, as the kind of a term that compares with one; other tokenizers: `spans`.
    proxy: str = "forward_kl"
    # The golden loss: the same distance to this one of `teachers`, which no term reads; without it the labels' cross-entropy.
    oracle: str | None = None

    @model_validator(mode="after")
    def can_be_measured(self) -> MonitorSpec:
        wrong = [
            "data: held-out prompts have labels of their own; take `from`, `answers`, `mixup` and `target: teacher` out"
            for entry in self.data
            if entry.from_ is not None or entry.answers is not None or entry.mixup is not None or entry.target == "teacher"
        ][:1]
        if error := proxy_error(self.proxy):
            wrong.append(error)
        if wrong:
            raise ValueError("; and ".join(wrong))
        return self


def proxy_error(kind: str) -> str:
    """Why terms of a kind are no distance to a teacher that can be measured by itself; "" if they are."""
    known = registry("terms")
    if kind not in known:
        return f"proxy {kind!r} is no term; {did_you_mean(kind, known)}"
    found = known.get(kind)
    own = (RowTerm.extra, RowTerm.extras, RowTerm.row_weights) if issubclass(found, RowTerm) else (Term.extra,)
    own += (Term.step_sums, Term.update)
    simple = not found.example and all(getattr(found, method.__name__) is method for method in own)
    term = found(place=Place(kind, kind)) if simple else None
    if term is not None and term.reads_teacher and set(term.needs) <= OF_ANSWERS and term.count == "response":
        return ""
    return f"proxy {kind}: it must compare with one teacher's logits at each row of an answer, such as forward_kl, jsd or spans"


class StageSpec(LoopSpec):
    data: list[DataSpec] = Field(min_length=1)  # data entries, one after the other in one set
    upcycle: UpcycleSpec | None = None  # makes the student sparse before this stage
    # parts that are trained; `mlp`: the feed-forward layers of the language model alone
    train: list[Literal[TRAINABLE]] = Field(list(PARTS), min_length=1)  # type: ignore[valid-type]
    lora: LoraSpec | None = None  # on the language model
    # Trains through quantised weights: a format, or {format, parts}. Its student has the quantised values.
    quantise: QuantiseSpec | None = Field(None, exclude_if=is_default(None))
    # what the loss is made of, by names of your own; a number is a weight: `cross_entropy: 1.0`
    terms: dict[str, TermSpec] = Field(min_length=1)
    control_terms: dict[str, TermSpec] | None = None  # of the SFT control; default: those without a teacher, or cross-entropy
    optimiser: OptimiserSpec = OptimiserSpec()  # how weights are changed
    gradient_checkpointing: bool = False  # activations are computed again on the way back: less memory, a third more time
    group_by_length: bool = False  # short for `sampler: {kind: length}`
    sampler: SamplerSpec | None = Field(None, exclude_if=is_default(None))  # the order of the samples; default: shuffle
    # Each answer of a talk as a sample of its own, behind what was said before. None: where a tower needs it.
    one_answer: bool | None = Field(None, exclude_if=is_default(None))
    until: UntilSpec | None = Field(None, exclude_if=is_default(None))  # ends the stage early, on the validation split
    # Whether the student comes closer to its teacher and gets no better (teacher hacking), on prompts that are held out.
    monitor: MonitorSpec | None = Field(None, exclude_if=is_default(None))
    # Where a step's answers come from: a share, or {share, and what options the source has}; "data": the answers of the data.
    answers: dict[str, Any] = Field({"data": 1.0}, exclude_if=is_default({"data": 1.0}))

    @field_validator("terms", "control_terms", mode="before")
    @classmethod
    def short_forms(cls, terms: Any) -> Any:
        """`cross_entropy: 1.0` means {kind: cross_entropy, weight: 1.0}; a kind left out is the term's name."""
        if not isinstance(terms, dict):
            return terms
        long = {}
        for name, spec in terms.items():
            spec = {"weight": spec} if is_number(spec) else spec
            long[name] = {"kind": name, **spec} if isinstance(spec, dict) else spec
        return {name: spec for name, spec in long.items() if not (isinstance(spec, dict) and spec.get("weight") == 0)}

    @field_validator("sampler", "until", mode="before")
    @classmethod
    def by_name(cls, given: Any) -> Any:
        """`sampler: length` means {kind: length}, `until: plateau` {kind: plateau}, and so on."""
        return {"kind": given} if isinstance(given, str) else given

    @field_validator("quantise", mode="before")
    @classmethod
    def by_format(cls, given: Any) -> Any:
        """`quantise: q4_0` means {format: q4_0}."""
        return {"format": given} if isinstance(given, str) else given

    @field_validator("answers")
    @classmethod
    def shares(cls, given: dict[str, Any]) -> dict[str, Any]:
        if wrong := share_errors(given):
            raise ValueError("; and ".join(wrong))
        return given

    @property
    def generates(self) -> bool:
        """Whether some of its answers are not the data's."""
        return bool(generating(self.answers))

    def build_terms(self) -> list[Term]:
        """Its terms as they are trained."""
        return build_terms(self.terms, self.generates)

    @model_validator(mode="after")
    def answers_suit_terms(self) -> StageSpec:
        terms = self.build_terms()
        if not self.generates:
            wrong = [
                f"terms.{t.name}: positions {t.positions} tells the student's own answers from the data's, but all answers of "
                "this stage are the data's; use response, or let the student answer (`answers: {student: 0.5, data: 0.5}`)"
                for t in terms if t.positions in ("given", "generated")
            ]  # fmt: skip
        else:
            wrong = own_answer_errors(terms, self.answers)
        if wrong:
            raise ValueError("; and ".join(wrong))
        return self

    @model_validator(mode="after")
    def mixed_pictures_suit_terms(self) -> StageSpec:
        wrong = [t.name for t in self.build_terms() if t.learns_answers or not set(t.needs) <= OF_PICTURES]
        if wrong and any(entry.mixup is not None for entry in self.data):
            raise ValueError(
                f"data.mixup: an answer to one picture is none to a mixture of two, and the terms {', '.join(wrong)} read "
                "answers; give mixed pictures a stage of terms on vision features (feature_match)"
            )
        return self

    @model_validator(mode="after")
    def monitor_has_a_teacher(self) -> StageSpec:
        if self.until is not None and self.until.kind == "golden" and self.monitor is None:
            raise ValueError("until: golden needs `monitor`, which measures on held-out prompts: `monitor: {data: [...]}`")
        terms = self.build_terms() if self.monitor is not None else []
        if self.monitor is not None and (any(t.needs_pairs for t in terms) or not any(t.reads_teacher for t in terms)):
            raise ValueError("monitor: it compares with the stage's teacher, and no term reads one in each step; take it out")
        return self

    @property
    def order(self) -> SamplerSpec:
        """The order of the samples."""
        return self.sampler or SamplerSpec(kind="length" if self.group_by_length else "shuffle")

    @model_validator(mode="after")
    def consistent(self) -> StageSpec:
        if self.generates and self.optimiser.micro_batch_tokens is not None:
            raise ValueError(
                "optimiser.micro_batch_tokens: answers that are generated have no length before the step; use micro_batch_size"
            )
        if self.group_by_length and self.sampler is not None:
            raise ValueError("give either `group_by_length` or `sampler`")
        if self.lora is not None and ("mlp" in self.train or self.upcycle is not None):
            raise ValueError("LoRA's adapters do not reach experts; take `lora` out of a stage with `upcycle` or `train: [mlp]`")
        if self.quantise is not None and (self.lora is not None or self.upcycle is not None):
            raise ValueError(
                "quantise: weights below adapters and those of experts are not quantised; take `lora` or `upcycle` out of the "
                "stage, and quantise in a stage behind it"
            )
        if any(t.path == "switch" for t in self.terms.values()) and "vision" not in self.train:
            raise ValueError(
                "the visual switch teaches only the vision encoder, which this stage does not train, so its loss would be a "
                "constant; add `vision` to `train` or take the switch term out"
            )
        return self


def own_answer_errors(terms: Sequence[Term], answers: Mapping[str, Any]) -> list[str]:
    """Why terms cannot be in a stage some of whose answers are generated."""
    shares, wrong = replaced(answers), []
    of_data = 1 - min(sum(share.at(place) for share in shares) for place in (0.0, 1.0))
    for term in terms:
        if term.needs_pairs:
            wrong.append(f"terms.{term.name}: {term.kind} compares two answers of the data; take `student` out of `answers`")
        elif term.learns_answers and (term.positions not in ("given", "prompt") or not term.is_row_term):
            wrong.append(
                f"terms.{term.name}: {term.kind} takes answers for right (positions: {term.positions}), and the student's own "
                "need not be; " + ("use positions: given" if term.is_row_term else "take it out")
            )
        elif term.positions == "given" and of_data < 1e-6:
            wrong.append(f"terms.{term.name}: {term.kind} reads the data's answers, of which there are none; give `data` a share")
    if all(t.positions in ("given", "prompt") for t in terms):
        wrong.append("no term learns from the student's own answers; add one that compares with a teacher, such as forward_kl")
    return wrong


TRACKERS = ("tensorboard", "wandb", "trackio")


class ReportSpec(Strict):
    """Where a training is shown while it runs."""

    # Dashboards: tensorboard (files in OUTPUT/tensorboard), wandb, trackio; the package must be installed.
    report_to: list[Literal[TRACKERS]] = Field([], exclude_if=is_default([]))  # type: ignore[valid-type]

    @field_validator("report_to", mode="before")
    @classmethod
    def one_or_several(cls, given: Any) -> Any:
        """`report_to: tensorboard` means [tensorboard], and `none` none."""
        given = [given] if isinstance(given, str) else given
        return [] if given in (None, ["none"]) else given


def tracker_errors(names: Sequence[str]) -> Iterator[str]:
    """What of `report_to` is not installed, with the way out."""
    for name in names:
        if find_spec(name) is None:
            yield f"report_to: {name} is not installed; pip install {name}, or take it out"


class GuardSpec(Strict):
    """Checks before step 1; each can be switched off by name, with the reason in the recipe's comment."""

    pixels_matter: bool = True  # other pictures must change what both towers compute
    teacher_is_better: bool = True  # the teacher's loss on the answers must be below the untrained student's
    samples: int = Field(32, gt=1, le=2**16)  # training samples that the guards look at
    # Share of a training set, rounded up, that may be left out: rows that cannot be used, pictures that cannot be read, samples
    # that are too long or that a processor or template refuses. `max_skipped_images` is its name in older recipes.
    max_skipped: float = Field(0.01, ge=0, le=1, validation_alias=AliasChoices("max_skipped", "max_skipped_images"))


class TrainSpec(Strict):
    """What holds for every stage of a recipe."""

    seed: Seed = 0  # moves everything that is drawn: batches, fresh weights, dropout, subsets of the data
    # tokens of one sample in each tower, visual ones included; longer samples are cut or left out
    max_length: int = Field(2048, gt=1, le=2**24)
    chunk_bytes: int = Field(256 * 2**20, gt=0)  # budget of the row engine
    compile: bool = Field(False, exclude_if=is_default(False))  # the row engine's loss maths, by torch.compile
    tf32: bool = Field(False, exclude_if=is_default(False))  # float32 products in TensorFloat-32, on GPUs from Ampere on
    workers: int = Field(0, ge=0, le=256)  # processes that read and resize pictures, beside each training process
    guards: GuardSpec = GuardSpec()  # checks before step 1
