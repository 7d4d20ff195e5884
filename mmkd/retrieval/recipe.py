"""Recipes for dual encoders, run by `mmkd rank`: `kind: ranking` distils one, `kind: matching` trains a cross-encoder to teach.

Read and checked as `mmkd.recipes.recipe` does it: all errors at once, each with the key's path and what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mmkd.base.schema import Strict, is_default, one_of
from mmkd.data.spec import DataSpec
from mmkd.errors import RecipeError
from mmkd.recipes.reading import found_recipe, read_raw, validate, with_found_paths
from mmkd.recipes.recipe import RunSpec
from mmkd.towers.spec import VisionConfig
from mmkd.train.spec import AdamWSpec, LoopSpec

KINDS = ("ranking", "matching")


class TextConfig(Strict):
    source: str | None = None
    config: dict[str, Any] | None = None
    vocab_size: int | None = Field(None, gt=0, le=2**24)  # of the tokenizer trained on the captions; goes with `config`
    tokenizer: Literal["bpe", "words"] = "bpe"  # what it cuts captions into: byte pairs, or the most frequent whole words
    # The encoder's own pooled output, or the mean of its last states.
    pooling: Literal["own", "mean"] = Field("own", exclude_if=is_default("own"))
    frozen: bool = Field(False, exclude_if=is_default(False))  # not trained, and each text is read once; goes with the mean

    @model_validator(mode="after")
    def one_origin(self) -> TextConfig:
        one_of(self, source="pretrained weights", config="random weights")
        if (self.config is None) != (self.vocab_size is None):
            raise ValueError("`vocab_size` (of a tokenizer trained on the captions) goes with `config`, and only with it")
        if self.frozen and (self.pooling != "mean" or self.source is None):
            raise ValueError("`frozen` goes with `source` (pretrained weights) and `pooling: mean`")
        return self


class DualSpec(Strict):
    vision: VisionConfig
    text: TextConfig
    embedding: int = Field(256, gt=0, le=2**16)


class FusionSpec(DualSpec):
    """Cross-attention over the parts of a dual encoder, which may be pretrained or start from random weights."""

    heads: int = Field(4, gt=0, le=1024)
    dropout: float = Field(0.1, ge=0, lt=1)  # of the matching head


class DualStudentSpec(Strict):
    model: str | None = None
    assemble: DualSpec | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def one_origin(self) -> DualStudentSpec:
        return one_of(self, model="a folder, hub id or open_clip:NAME/TAG", assemble="parts")


class CrossTeacherSpec(Strict):
    """The cross-encoder: BLIP's image-text-matching head ("itm"), or a vision-language model that is asked ("prompted")."""

    model: str
    kind: Literal["itm", "prompted"] = "itm"
    question: str | None = None  # prompted: holds {text}; None: mmkd.retrieval.cross_encoders.QUESTION
    yes: str | None = None
    no: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    batch_size: int = Field(256, gt=0, le=2**20)  # pairs scored at once

    @model_validator(mode="after")
    def question_is_asked(self) -> CrossTeacherSpec:
        given = [name for name in ("question", "yes", "no") if getattr(self, name) is not None]
        if self.kind == "itm" and given:
            raise ValueError(f"{', '.join(given)}: a matching head is asked nothing; take it out or set kind: prompted")
        if self.question is not None and "{text}" not in self.question:
            raise ValueError(f"the question {self.question!r} has no place for the text; write {{text}} in it")
        return self

    def prompt(self) -> dict[str, str]:
        """What the recipe says of the question, for PromptedTower."""
        return {name: getattr(self, name) for name in ("question", "yes", "no") if getattr(self, name) is not None}


class RankingSpec(Strict):
    """CPRD's options. The paper's text was not available; every default here is our choice (docs/methods/cprd.md)."""

    weight: float = Field(1.0, ge=0)  # of CPRD beside the contrastive loss
    candidates: int = Field(16, gt=1)  # K, hard negatives of a query
    threshold: float = Field(0.1, ge=0, le=1)  # teacher score from which a hard negative is valid
    top_m: int | None = Field(None, gt=0)  # instead of the threshold: so many are valid
    margin: float | None = Field(None, gt=0)  # end the list where neighbouring scores differ by less
    # Leave out what the teacher scores so high: probably unlabelled positives.
    ceiling: float | None = Field(None, gt=0, le=1, exclude_if=is_default(None))
    rank_reduction: Literal["sum", "mean_valid"] = "sum"
    query_reduction: Literal["all", "with_valid"] = "all"
    detach_temperature: bool = False
    include_easy: bool = False  # the rest of the pool stands in every denominator


class StepSpec(AdamWSpec):
    """The optimiser. A contrastive pool is the batch, so a batch is never cut into micro-batches."""

    weight_decay: float = Field(0.02, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    batch_size: int = Field(128, gt=1, le=2**20)  # pairs a step, over all processes
    micro_batch_size: ClassVar[None] = None
    micro_batch_tokens: ClassVar[None] = None


class AugmentSpec(Strict):
    """Random shifts (share of a picture's side) and scalings (1 - scale ... 1 + scale) of pictures in training."""

    shift: float = Field(0.0, ge=0, lt=1)
    scale: float = Field(0.0, ge=0, lt=1)


class TrainingSpec(LoopSpec):
    optimiser: StepSpec = StepSpec()
    augment: AugmentSpec | None = None


class RetrievalSpec(Strict):
    data: list[DataSpec] = Field(min_length=1)
    batch_size: int = Field(128, gt=0)
    # The teacher orders so many of the student's best candidates of each query; None: it scores every pair of the test set.
    rerank: int | None = Field(None, gt=0)


class RetrievalRecipe(RunSpec):
    """What both kinds have: pairs of pictures and captions, how to train on them, and what is searched in the end."""

    data: list[DataSpec] = Field(min_length=1)
    training: TrainingSpec
    evaluation: RetrievalSpec


class RankingRecipe(RetrievalRecipe):
    kind: Literal["ranking"]
    teacher: CrossTeacherSpec
    student: DualStudentSpec
    ranking: RankingSpec = RankingSpec()
    control: bool = True


class CrossSpec(Strict):
    """A BLIP with random weights: keys of its vision and text configurations."""

    vision: dict[str, Any]
    text: dict[str, Any]
    vocab_size: int = Field(gt=0)
    embedding: int = Field(128, gt=0)


class MatchingSpec(Strict):
    model: str | None = None
    config: CrossSpec | None = None
    fuse: FusionSpec | None = None

    @model_validator(mode="after")
    def one_origin(self) -> MatchingSpec:
        return one_of(self, model="a folder or BLIP to train on", config="a BLIP from random weights", fuse="two encoders")


class MatchingRecipe(RetrievalRecipe):
    """Trains a cross-encoder by image-text contrast and matching, with negatives drawn by its own contrast (ALBEF, BLIP)."""

    kind: Literal["matching"]
    model: MatchingSpec
    negatives: int = Field(1, gt=0)  # drawn for each picture and for each caption


MODELS = {"ranking": RankingRecipe, "matching": MatchingRecipe}


def load_ranking_recipe(path: str | Path, overrides: list[str] | None = None) -> RankingRecipe | MatchingRecipe:
    """The recipe at `path`, of the kind that it names; its `imports` are imported first.

    Raises RecipeError with every error at once, RegistryError for a module that cannot be imported.
    """
    path = found_recipe(path)
    raw = read_raw(path, overrides)
    kind = raw.get("kind")
    if kind not in KINDS:
        stated = "says no `kind`" if kind is None else f"is of kind {kind!r}"
        raise RecipeError(f"{path} {stated}; `mmkd rank` runs kind: {' or '.join(KINDS)}, `mmkd distill` recipes without one")
    return validate(with_found_paths(raw, Path(path)), str(path), MODELS[kind])
