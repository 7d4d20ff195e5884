"""How a recipe describes a term."""

from __future__ import annotations

from dataclasses import fields, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, model_validator

from mmkd.base.schema import Strict, is_default, is_number
from mmkd.engine.positions import POSITIONS
from mmkd.errors import did_you_mean
from mmkd.registry import registry
from mmkd.terms.term import Place, Schedule, Term


class WeightSpec(Strict):
    start: float = Field(ge=0)  # at the first step
    end: float = Field(ge=0)  # at the end of the line, and behind it
    over: float = Field(1.0, ge=0, le=1)  # share of the stage's steps that the line takes


class TermSpec(Strict):
    model_config = ConfigDict(extra="allow")  # the options of the kind: fields of its class

    kind: str  # a name of `mmkd list terms`; default: the term's own name
    weight: float | WeightSpec = 1.0  # default: the kind's own (`default_weight` of its class)
    # rows that count: response, prompt, text, visual, all, answer, given, generated
    positions: Literal[tuple(POSITIONS)] = "response"  # type: ignore[valid-type]
    # switch: the student's vision features go through the teacher's projector and language model
    path: Literal["student", "switch"] = "student"
    bridge: bool = False  # switch only: a trained linear map where the encoders' widths differ (not in the paper)
    # Over rows; "sum": of each sample's rows, and the mean over samples.
    reduction: Literal["mean", "sum"] = Field("mean", exclude_if=is_default("mean"))
    teacher: str | None = Field(None, exclude_if=is_default(None))  # which of several teachers

    @model_validator(mode="before")
    @classmethod
    def papers_weight(cls, given: Any) -> Any:
        """Without a weight a term has that of its paper."""
        kind = given.get("kind") if isinstance(given, dict) else None
        if not isinstance(kind, str) or "weight" in given or kind not in registry("terms"):
            return given
        return {**given, "weight": getattr(registry("terms").get(kind), "default_weight", 1.0)}

    @model_validator(mode="after")
    def known(self) -> TermSpec:
        found = registry("terms").get(self.kind) if self.kind in registry("terms") else None
        wrong = [] if found is not None else [f"unknown kind {self.kind!r}; {did_you_mean(self.kind, registry('terms'))}"]
        wrong += self._wrong_options(found)
        if self.bridge and self.path != "switch":
            raise ValueError("`bridge` belongs to terms with `path: switch`; feature_match builds its own")
        if found is not None and not wrong:
            wrong += self._wrong_place(self.build("term"))
        if is_number(self.weight) and self.weight < 0:
            wrong.append(f"weight is {self.weight}; it must not be negative")
        if wrong:
            raise ValueError("; and ".join(wrong))
        return self

    def build(self, name: str) -> Term:
        """The term that this describes."""
        weight = self.weight
        schedule = Schedule(weight.start, weight.end, weight.over) if isinstance(weight, WeightSpec) else Schedule(weight, weight)
        place = Place(name, self.kind, schedule, self.positions, self.path, self.bridge, self.reduction, self.teacher)
        return registry("terms").get(self.kind)(**(self.model_extra or {}), place=place)

    def _wrong_place(self, term: Term) -> list[str]:
        if term.is_row_term:
            return term.errors()
        wrong = term.errors()
        if self.path == "switch":
            wrong.append(f"{self.kind} cannot run on the visual switch; use a divergence such as dbild or forward_kl")
        if self.reduction != "mean":
            wrong.append(f"{self.kind} is no loss of rows and has no `reduction`")
        return wrong

    def _wrong_options(self, found: type[Term] | None) -> list[str]:
        given = self.model_extra or {}
        options = options_of_term(found) if found is not None else {}
        keys = (*type(self).model_fields, *options)
        wrong = []
        for name, value in given.items():
            if name not in options:
                wrong.append(f"{self.kind} has no option {name!r}; {did_you_mean(name, keys)}")
            elif problem := _wrong_value(name, value, options[name]):
                wrong.append(problem)
        return wrong


def options_of_term(found: type[Term]) -> dict[str, Any]:
    """The options of a term's class with their types."""
    hints = get_type_hints(found)
    return {field.name: hints[field.name] for field in fields(found) if field.name != "place"}


def _wrong_value(name: str, value: Any, kind: Any) -> str | None:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in kinds and value is None:
        return None
    for one in kinds:
        if get_origin(one) is Literal:
            words = get_args(one)
            return None if value in words else f"{name} is {value!r}; {did_you_mean(str(value), map(str, words))}"
    if (float in kinds or int in kinds) and not is_number(value):
        return f"{name} is {value!r}, not a number"
    if float not in kinds and int in kinds and value != int(value):
        return f"{name} is {value!r}, not a whole number"
    if kinds == (bool,) and not isinstance(value, bool):
        return f"{name} is {value!r}; it must be true or false"
    return None


def build_terms(specs: dict[str, TermSpec], generated: bool = False) -> list[Term]:
    """The terms of a stage by their names in the recipe.

    generated: whether some answers of the stage are the student's own; terms that take answers for right then count only
        the data's.
    """
    terms = [spec.build(name) for name, spec in specs.items()]
    return [_on_given_answers(term) for term in terms] if generated else terms


def _on_given_answers(term: Term) -> Term:
    if not term.learns_answers or term.positions != "response":
        return term
    return replace(term, place=replace(term.place, positions="given"))
