"""A data entry of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from mmkd.base.schema import Strict, is_default
from mmkd.data.mixup import MixupSpec
from mmkd.data.prompts import PromptStyle
from mmkd.data.views import ViewsSpec
from mmkd.errors import did_you_mean
from mmkd.registry import registry


class DataSpec(Strict):
    """One data set of a stage: a card by name, or its fields given here (fields given here win over the card's), or what an
    earlier stage of `kind: write` wrote (`from: STAGE`)."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    # the stage of `kind: write` whose rows these are
    from_: str | None = Field(None, alias="from", exclude_if=is_default(None))
    card: str | None = None  # a name of `mmkd list data`; the other keys win over it
    format: str | None = None  # a name of `mmkd list formats`
    root: str | None = None  # the folder of its files, below data_root or here; a hub id for format `datasets`
    split: str = "train"  # in the names of its files
    prompt: PromptStyle | None = None  # how questions are put: letter, short, plain, mmmu
    ocr: bool | None = None  # whether the prompt names the data's OCR tokens
    files: dict[str, str] | None = None  # names of files and columns that differ from the format's own
    # "teacher": its greedy answers, whether or not the data have any; asked once, before training.
    target: Literal["first", "majority", "sampled", "teacher"] | None = None
    answers: str | None = Field(None, exclude_if=is_default(None))  # a file of {"id", "answer"} lines in the place of the data's
    text_only: bool = Field(False, exclude_if=is_default(False))  # whether it is right that no sample has a picture
    # some of its pictures mixed with others, for terms that compare vision features alone
    mixup: MixupSpec | None = Field(None, exclude_if=is_default(None))
    # copies of its samples with other views of their pictures, for the sampler hard_views
    views: ViewsSpec | None = Field(None, exclude_if=is_default(None))
    # what a sample is asked in place of its prompt, as `teacher.prompt` says it: trains a teacher that is told more
    asked: str | None = Field(None, exclude_if=is_default(None))
    tag: str | None = Field(None, exclude_if=is_default(None))  # names its samples for routed_teachers; default: its card
    limit: int | None = Field(None, gt=0)  # at most this many questions, drawn with the recipe's seed
    image_limit: int | None = Field(None, gt=0)  # at most this many distinct images, with all their questions
    weight: float = Field(1.0, gt=0, le=1000)  # how many times the set stands in one epoch (fractions by drawing)

    @field_validator("format")
    @classmethod
    def known_format(cls, value: str | None) -> str | None:
        if value is not None and value not in registry("formats"):
            raise ValueError(f"there is no format {value!r}; {did_you_mean(value, registry('formats'))}")
        return value
