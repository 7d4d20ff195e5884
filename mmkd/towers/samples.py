"""What a tower prepares: chat turns and pictures. `mmkd.data` makes samples of data sets; nothing here imports PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mmkd.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class Picture(Protocol):
    """A picture that has not been read yet, such as `mmkd.data.samples.ImageRef`."""

    @property
    def key(self) -> str:
        """Names the picture: the same key, the same picture."""

    def load(self) -> Image:
        """The picture in RGB. Raises ImageError where it cannot be read."""


@dataclass(frozen=True)
class Turn:
    """What one side says, with the pictures that it shows.

    role: "system", "user" or "assistant".  images: how many of the sample's pictures, in order, this turn shows.
    places: where each of them stands, as an offset in `text`, from small to large: the text of "Is <picture> left of
    <picture>?" is "Is  left of ?" and its places are (3, 12). Empty: all at the head. No mark of a picture ever stands in `text`,
    in which every word is a word.
    """

    role: str
    text: str
    images: int = 0
    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ordered = list(self.places) == sorted(self.places)
        inside = all(0 <= place <= len(self.text) for place in self.places)
        if self.places and (len(self.places) != self.images or not ordered or not inside):
            raise DataError(
                f"a turn of {len(self.text)} characters and {self.images} pictures has its pictures at {self.places}; give each "
                "picture one offset in the text, from small to large, or none to put all at the head"
            )

    @property
    def parts(self) -> list[str | None]:
        """The turn as it is read: texts, and None where a picture stands. Pictures without places come first."""
        if not self.places:
            return [*[None] * self.images, self.text]
        parts: list[str | None] = []
        start = 0
        for place in self.places:
            parts += [self.text[start:place], None] if place > start else [None]
            start = place
        return [*parts, self.text[start:]] if start < len(self.text) else parts


@dataclass(frozen=True)
class Sample:
    """What a tower prepares. Training samples end with an assistant turn; each assistant turn is a target, unless `last_only`."""

    id: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    last_only: bool = False  # only the last answer is a target; those before are what was said

    @property
    def content(self) -> list[Any]:
        """What is said, by whom, and where pictures stand, as plain values by which a sample can be known."""
        rows: list[Any] = [[turn.role, turn.text, turn.images, *turn.places] for turn in self.turns]
        return [*rows, "last only"] if self.last_only else rows

    @property
    def prompt_turns(self) -> tuple[Turn, ...]:
        """The turns up to and without a final assistant turn."""
        return self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns

    @property
    def answer(self) -> str:
        return self.turns[-1].text if self.turns and self.turns[-1].role == "assistant" else ""

    def without_images(self) -> Sample:
        """The blind form of the sample: the same words, no picture."""
        turns = tuple(Turn(t.role, t.text) for t in self.turns)
        return Sample(self.id, (), turns, self.meta, self.last_only)

    @property
    def answers(self) -> int:
        """How many answers are targets."""
        count = sum(turn.role == "assistant" for turn in self.turns)
        return min(count, 1) if self.last_only else count

    def by_answer(self) -> list[Sample]:
        """A sample for each of its answers; the sample itself where it has but one."""
        return [self.up_to_answer(number) for number in range(self.answers)] if self.answers > 1 else [self]

    def up_to_answer(self, number: int) -> Sample:
        """The sample with its answer `number` (from 0) as the last turn and the only target, behind what was said before."""
        places = [place for place, turn in enumerate(self.turns) if turn.role == "assistant"]
        turns = self.turns[: places[number] + 1]
        shown = sum(turn.images for turn in turns)
        name = f"{self.id} answer {number + 1}"
        return Sample(name, self.images[:shown], turns, self.meta, last_only=True)
