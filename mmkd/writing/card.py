"""Prompt cards: what a model is asked, in which form it answers, and which training row comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mmkd.base.cards import find_card, list_cards, load_card
from mmkd.base.schema import Strict
from mmkd.errors import DataError
from mmkd.writing.checks import CheckSpec
from mmkd.writing.forms import FormSpec
from mmkd.writing.templates import compiled

KIND = "prompts"
Shown = Literal["whole", "crop", "boxed", "none"]


class Example(Strict):
    """An earlier turn: a prompt and the answer to it, with a picture or without."""

    prompt: str
    answer: str
    image: str | None = Field(None, description="a file beside the card")


class PicturesSpec(Strict):
    """What is shown of a sample's pictures. `crop` and `boxed` need a region (`per: region`, or a box in `told`).

    boxed: the whole picture with a red frame around the region, which is `margin` larger on each side and `line` pixels wide.
    """

    author: Shown = "whole"
    without: int | None = Field(None, ge=1, description="the number of a picture that the author does not see, of several")
    row: Shown = "whole"
    margin: float = Field(0.05, ge=0, le=1)
    line: int = Field(5, ge=1, le=100)


class RowSpec(Strict):
    """Templates of the training row. Beside the prompt's fields they know `written`, what was read from the answer."""

    question: str = "{{ question }}"
    answer: str | None = Field(None, description="default: the answer; of one by letter its choice, and the choices stay")
    choices: str | None = Field(None, description="one choice a line")
    hint: str | None = None
    told: dict[str, str] = Field(default_factory=dict)
    categories: dict[str, str] = Field(default_factory=dict)
    keep_choices: bool | None = Field(None, description="whether the sample's choices stay; default: with an answer by letter")

    @model_validator(mode="after")
    def templates(self) -> RowSpec:
        for text in (self.question, self.answer, self.choices, self.hint, *self.told.values(), *self.categories.values()):
            if text is not None:
                compiled(text)
        return self


class PromptCard(Strict):
    """A card of `prompts/`. Keys that are not listed here are refused.

    Templates know: id, question, prompt (as the student is asked), answer, references, choices ({letter, text} each), hint, ocr,
    categories, told, region (label and box, with `per: region`), regions, context (what other stages left, see `WriteSpec`).
    """

    name: str = "inline"
    title: str = ""
    imports: tuple[str, ...] = Field((), description="modules that register a form or check of one's own")
    system: str = ""
    prompt: str
    examples: tuple[Example, ...] = ()
    pictures: PicturesSpec = PicturesSpec()
    regions: str = Field("regions", description="the key of `told` that holds regions: a box, or a JSON list of {label, box}")
    form: FormSpec = FormSpec(kind="plain")
    checks: tuple[CheckSpec, ...] = ()
    row: RowSpec = RowSpec()
    source: str = ""
    notes: str = ""

    @model_validator(mode="after")
    def templates(self) -> PromptCard:
        for text in (self.system, self.prompt, *(text for one in self.examples for text in (one.prompt, one.answer))):
            compiled(text)
        return self


def load_prompt(name: str) -> PromptCard:
    """A prompt card by name or by the path of a YAML file; pictures of its examples are looked for beside it. Raises
    DataError."""
    card, folder = load_card(KIND, name, PromptCard), find_card(KIND, name).parent
    examples = tuple(
        one if one.image is None else one.model_copy(update={"image": str((folder / one.image).absolute())})
        for one in card.examples
    )
    if missing := [one.image for one in examples if one.image is not None and not Path(one.image).is_file()]:
        raise DataError(f"prompt card {name!r}: there is no picture {missing[0]}; put it there, or take the example out")
    return card.model_copy(update={"examples": examples})


README_HEAD = """\
The code is in `mmkd/writing`; this folder holds cards only.

# Prompts

A card says what a model is asked by a stage of `kind: write`, in which form it must answer, which checks an answer must pass,
and what training row comes of it. A recipe names it (`prompt: short_answer`). How to write one:
[docs/write.md](../docs/write.md). Cards of your own go into `<folder>/prompts/`, with `MMKD_CARDS=<folder>`.

| card | what | form | source |
|---|---|---|---|
"""
README_FOOT = "\nThis table is written by `python -m mmkd.writing.card`; edit the cards, not the table.\n"


def readme() -> str:
    """The text of prompts/README.md: one row a card."""
    cards = {name: load_prompt(name) for name in list_cards(KIND)}
    rows = [f"| `{name}` | {c.title} | {c.form.kind} | {c.source} |" for name, c in cards.items()]
    return README_HEAD + "\n".join(rows) + "\n" + README_FOOT


if __name__ == "__main__":
    (Path(__file__).resolve().parents[2] / "prompts" / "README.md").write_text(readme(), encoding="utf-8")
