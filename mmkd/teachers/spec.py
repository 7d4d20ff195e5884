"""How a recipe describes a teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mmkd.base.schema import is_default
from mmkd.errors import did_you_mean
from mmkd.registry import registry
from mmkd.towers.spec import Attention, ReadingSpec


class TeacherSpec(ReadingSpec):
    model: str
    # A name of the registry (`mmkd list teachers`); None: "stored" where a cache is given, else "live".
    kind: str | None = Field(None, exclude_if=is_default(None))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantise: Literal["8bit", "4bit"] | None = None
    trust_remote_code: bool = False
    # "eager", "sdpa", "flash_attention_2" ...; None for what transformers takes.
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

    @property
    def registered(self) -> str:
        """The kind's name in the registry."""
        return self.kind or ("live" if self.cache is None else "stored")
