"""How a recipe describes a teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mmkd.base.schema import is_default
from mmkd.errors import did_you_mean
from mmkd.registry import registry
from mmkd.teachers.view import View, ViewSpec
from mmkd.teachers.wires import REFUSED, WIRES
from mmkd.towers.spec import Attention, ReadingSpec

NOT_SERVED = frozenset({"self", "cache", "quantise", "ahead", "attn_implementation", "gradient_checkpointing", "alignment"})


class TeacherSpec(ReadingSpec, ViewSpec):
    model: str | None = Field(None, exclude_if=is_default(None))  # a folder or hub id
    # In place of a model the student itself: as the stage began, as a moving average of its weights, or as it is at each step.
    self: Literal["start", "ema", "current"] | None = Field(None, exclude_if=is_default(None))
    decay: float = Field(0.999, ge=0, le=1, exclude_if=is_default(0.999))  # of the moving average, a step
    # A name of the registry (`mmkd list teachers`); None: "stored" where a cache is given, else "live".
    kind: str | None = Field(None, exclude_if=is_default(None))
    # The address of a server that runs `model`, whose weights are then not loaded, and how it is spoken to.
    served: str | None = Field(None, pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", exclude_if=is_default(None))
    served_name: str | None = Field(None, exclude_if=is_default(None))  # what the server calls the model, where not `model`
    wire: str = Field("vllm", exclude_if=is_default("vllm"))  # how a served teacher is spoken to
    top_k: int = Field(20, ge=1, le=2**20, exclude_if=is_default(20))  # likeliest tokens of a row that are asked for
    verify: bool = Field(False, exclude_if=is_default(False))  # before step 1 against the weights of `model` in this process
    patience: float = Field(300.0, ge=0, le=1e6, exclude_if=is_default(300.0))  # seconds that a silent server is waited for
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of its weights; auto: as they are stored
    quantise: Literal["8bit", "4bit"] | None = None  # loads its language model in fewer bits (bitsandbytes)
    trust_remote_code: bool = False  # whether code in its folder may run
    # "eager", "sdpa", "flash_attention_2" ...; None for what transformers takes, but windows of a Qwen2.5-VL encoder in groups.
    attn_implementation: Attention | None = Field(None, exclude_if=is_default(None))
    # For the visual switch: its layers keep their inputs alone and are computed again on the way back.
    gradient_checkpointing: bool = Field(False, exclude_if=is_default(False))
    cache: str | None = None  # a folder that `mmkd cache` wrote; the model itself is then not loaded
    # A run writes such a folder itself, beside its output, before it trains: each sample is read by the teacher once.
    keep: bool = Field(False, exclude_if=is_default(False))
    # Its pass over the next micro-batch begins before the student works on this one; on CUDA on a stream of its own.
    ahead: bool = Field(False, exclude_if=is_default(False))
    # For a teacher with another tokenizer: terms of kind `spans` compare pieces of text instead of tokens.
    alignment: Literal["spans"] | None = Field(None, exclude_if=is_default(None))

    @model_validator(mode="after")
    def kept_once(self) -> TeacherSpec:
        if self.keep and (self.ahead or self.kind is not None):
            other = "ahead" if self.ahead else "kind"
            raise ValueError(f"keep: what is kept is read from the disk in training, where `{other}` has no place; take one out")
        return self

    @field_validator("kind")
    @classmethod
    def known(cls, value: str | None) -> str | None:
        if value is not None and value not in registry("teachers"):
            raise ValueError(f"there is no kind of teacher {value!r}; {did_you_mean(value, registry('teachers'))}")
        return value

    @model_validator(mode="after")
    def one_origin(self) -> TeacherSpec:
        if self.self is None and self.model is None:
            raise ValueError("model: it must be given (a folder or hub id), or `self: start`, `ema` or `current`")
        if self.self is None and self.decay != 0.999:
            raise ValueError("decay belongs to `self: ema`; take it out")
        if self.self is not None:
            allowed = {"self", "prompt", "images", *(["decay"] if self.self == "ema" else [])}
            if other := sorted(self.model_dump(exclude_defaults=True).keys() - allowed):
                raise ValueError(f"self: {self.self} is the student, which has no {', '.join(other)} of its own; take it out")
        given = self.model_dump(exclude_defaults=True).keys()
        if self.served is None and (own := sorted(given & {"served_name", "wire", "top_k", "verify", "patience"})):
            raise ValueError(f"{', '.join(own)} belong to a served teacher; take them out, or give its address as `served`")
        if self.served is not None and (other := sorted(given & NOT_SERVED)):
            raise ValueError(f"{', '.join(other)} cannot go with `served`, where the model runs elsewhere; take them out")
        if self.wire in REFUSED:
            raise ValueError(f"wire {self.wire!r}: {REFUSED[self.wire]}")
        if self.wire not in WIRES:
            raise ValueError(f"there is no wire {self.wire!r}; {did_you_mean(self.wire, WIRES)}")
        if self.cache is not None and self.view is not None:
            raise ValueError("prompt and images are a live teacher's own view; a cache has the student's; take `cache` out")
        return self

    @property
    def view(self) -> View | None:
        """What it sees of a sample; None for what the student sees."""
        return View(self.prompt, self.images) if self.prompt is not None or self.images is not None else None

    @property
    def registered(self) -> str:
        """The kind's name in the registry."""
        return self.kind or ("self" if self.self else "served" if self.served else "live" if self.cache is None else "stored")
