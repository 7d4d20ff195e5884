"""How a recipe describes what its student is held against: controls that learn without the teacher's signals."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmkd.base.schema import Strict, is_default
from mmkd.train.spec import StageSpec

# Without a teacher: they tell whether distillation helped.
DEFAULT = ("equal_steps", "equal_compute")
KINDS = (*DEFAULT, "tuned", "hard_answers")


class TuningSpec(Strict):
    """Values that the control `tuned` tries: rates first, then label smoothing at the best rate, then which answers are learnt.

    rates: factors of the stage's learning rates.  label_smoothing: of cross-entropy.  targets: of data with several answers each;
    null: as the recipe has it; one that changes no answer is left out.
    """

    rates: list[Annotated[float, Field(gt=0, le=1e3)]] = Field([1.0, 0.5, 2.0], min_length=1)
    label_smoothing: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.0, 0.1], min_length=1)
    targets: list[Literal["first", "majority", "sampled"] | None] = Field([None, "majority"], min_length=1)


class ControlSpec(Strict):
    """One control.

    equal_steps: the student's stages, data, order and steps.
    equal_compute: as many steps as the student's training compute buys, counted in floating point operations.
    tuned: as equal_steps, with the rate, label smoothing and label choice that score best on the validation split.
    hard_answers: as equal_compute, on the teacher's greedy answers to all questions: what is left to its other signals
    (sequence-level distillation, Kim and Rush 2016, "Sequence-level knowledge distillation").
    """

    # equal_steps, equal_compute, tuned (rates, label smoothing and labels tried on the validation split), hard_answers (the
    # teacher's answers alone); default: the control's name
    kind: Literal[KINDS]  # type: ignore[valid-type]
    tries: TuningSpec | None = Field(None, exclude_if=is_default(None))  # of kind tuned
    stages: dict[str, dict[str, Any]] = Field({})  # by stage: keys that this control has otherwise (data, steps, optimiser, ...)

    @model_validator(mode="after")
    def tuned_alone_tries(self) -> ControlSpec:
        if self.tries is not None and self.kind != "tuned":
            raise ValueError(f"tries: only a control of kind `tuned` tries values, this one is of kind `{self.kind}`")
        return self


def named(given: Any) -> Any:
    """The long form of `controls`: {name: fields}. true: the default ones, false: none; a list names kinds."""
    if isinstance(given, bool):
        given = list(DEFAULT) if given else []
    if isinstance(given, list):
        items = [item if isinstance(item, dict) else {item: None} for item in given]
        given = {name: fields for item in items for name, fields in item.items()}
    if not isinstance(given, dict):
        return given
    return {name: {"kind": name, **fields} if isinstance(fields, dict) else fields or {"kind": name}
            for name, fields in given.items()}  # fmt: skip


def changed(stage: StageSpec, keys: dict[str, Any]) -> StageSpec:
    """The stage with other values for some keys; a new length takes the place of the old one. Raises ValueError."""
    if not keys:
        return stage
    fields = stage.model_dump(exclude_unset=True)
    if "steps" in keys or "epochs" in keys:
        fields = {name: value for name, value in fields.items() if name not in ("steps", "epochs")}
    return StageSpec.model_validate(_merged(fields, keys))


def _merged(fields: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Mappings within mappings alike; terms and data are replaced whole."""
    merged = dict(fields)
    for name, value in keys.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict) and name not in ("terms", "control_terms")
        merged[name] = _merged(merged[name], value) if both else value
    return merged
