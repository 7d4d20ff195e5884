"""How a recipe describes a student: a model, or parts to be put together."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmkd.base.schema import Strict, is_default, is_number, one_of
from mmkd.errors import did_you_mean, shown
from mmkd.registry import options_of, registry
from mmkd.towers.reading import Reading

Side = Annotated[int, Field(gt=0, le=2**14)]  # pixels
PARTS = ("vision", "projector", "language")
Attention = Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]


class VisionConfig(Strict):
    source: str | None = None  # pretrained weights: hf-hub:NAME, local-dir:PATH, timm:NAME, open_clip:NAME/TAG
    config: dict[str, Any] | None = None  # random weights: a configuration of transformers with its `model_type`
    # pixels, one side or [height, width]; default: what the encoder was made for
    image_size: Side | tuple[Side, Side] | None = None
    # hidden state that is the feature: -1 the last, -2 the one before (the default, as in LLaVA)
    feature_layer: int | None = Field(None, ge=-1000, le=1000)
    # of the pixels, by colour; default: what the weights expect
    mean: list[float] | None = Field(None, min_length=3, max_length=3)
    # of the pixels, by colour; default: what the weights expect
    std: list[Annotated[float, Field(ge=1e-6, le=1e6)]] | None = Field(None, min_length=3, max_length=3)

    @model_validator(mode="after")
    def one_origin(self) -> VisionConfig:
        return one_of(self, source="pretrained weights", config="random weights")


class LanguageConfig(Strict):
    source: str | None = None  # pretrained weights: a folder or hub id
    config: dict[str, Any] | None = None  # random weights: a configuration of transformers with its `model_type`
    chat_template: str | None = None  # a template, or a name: simple, chatml, llama3, vicuna; default: by its tokens

    @model_validator(mode="after")
    def one_origin(self) -> LanguageConfig:
        return one_of(self, source="pretrained weights", config="random weights")


class TokenizerConfig(Strict):
    """Tokenizer of a language model with random weights: the teacher's, one from a folder, or one trained on the data."""

    source: str | None = None  # "teacher", a folder or a hub id
    vocab_size: int | None = Field(None, gt=0, le=2**24)  # train a byte-level BPE of this size on the stages' texts

    @model_validator(mode="after")
    def one_origin(self) -> TokenizerConfig:
        return one_of(self, source='"teacher", a folder or a hub id', vocab_size="train one")


class AssembleSpec(Strict):
    vision: VisionConfig  # the vision encoder
    language: LanguageConfig  # the language model
    projector: str = "mlp"  # a name of `mmkd list projectors`
    # Of those that give fewer tokens: `factor`, the side of the squares, and `queries`, of the resampler.
    projector_options: dict[str, int | float | bool | str] = Field(default_factory=dict, exclude_if=is_default({}))
    tokenizer: TokenizerConfig | None = None  # of a language model with random weights
    import_module: str | None = None  # a Python module that registers your own encoder

    @model_validator(mode="after")
    def projector_is_known(self) -> AssembleSpec:
        known = registry("projectors")
        if self.projector not in known:
            raise ValueError(f"there is no projector {self.projector!r}; {did_you_mean(self.projector, known)}")
        options = options_of(known.get(self.projector))
        small = [name for name, value in self.projector_options.items() if is_number(value) and not 0 < value <= 2**16]
        if small:
            raise ValueError(f"projector_options.{small[0]} is {shown(self.projector_options[small[0]])}; it must be above 0")
        wrong = [name for name in self.projector_options if name not in options]
        if wrong:
            has = ", ".join(options) or "none"
            raise ValueError(f"projector_options has no {wrong[0]!r} for {self.projector!r}, which has {has}")
        return self

    @model_validator(mode="after")
    def tokenizer_is_known(self) -> AssembleSpec:
        if self.language.config is not None and self.tokenizer is None:
            raise ValueError("a language model from `config` needs `tokenizer:`, for example {source: teacher}")
        return self


class ReadingSpec(Strict):
    """How a tower reads samples, where that is not as its folder says (`mmkd.towers.options.Reading`)."""

    processor: dict[str, Any] = Field(default_factory=dict, exclude_if=is_default({}))  # options, such as max_pixels
    chat_template: str | None = Field(None, exclude_if=is_default(None))  # a file, a template or a name of ours
    template: dict[str, Any] = Field(default_factory=dict, exclude_if=is_default({}))  # arguments, such as enable_thinking
    thinking: bool | None = Field(None, exclude_if=is_default(None))  # whether thinking is a target; None: what answers hold
    date: dt.date | None = Field(None, exclude_if=is_default(None))  # what a template that prints the day prints; None: today

    @property
    def reading_keys(self) -> dict[str, Any]:
        """The keys that were given, without the date."""
        return self.model_dump(mode="json", include=set(ReadingSpec.model_fields) - {"date"}, exclude_defaults=True)

    @property
    def reading(self) -> Reading:
        return Reading(self.processor, self.chat_template, self.template, self.thinking, self.date)


class StudentSpec(ReadingSpec):
    model: str | None = None  # a folder or hub id
    assemble: AssembleSpec | None = None  # parts that are put together
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of the weights that are trained
    trust_remote_code: bool = False  # whether code in its folder may run
    # "eager", "sdpa", "flash_attention_2" ...; None for what transformers takes, but windows of a Qwen2.5-VL encoder in groups.
    attn_implementation: Attention | None = Field(None, exclude_if=is_default(None))
    # Of a `model`: parts that begin with random weights all the same, drawn with the recipe's seed.
    fresh: list[Literal["vision"]] = Field(default_factory=list, exclude_if=is_default([]))

    @model_validator(mode="after")
    def one_origin(self) -> StudentSpec:
        one_of(self, model="a folder or hub id", assemble="parts")
        if self.fresh and self.model is None:
            raise ValueError("`fresh` is of a student from `model`; one that is assembled has fresh parts by their `config`")
        return self
