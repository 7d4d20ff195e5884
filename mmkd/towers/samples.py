"""What a tower prepares: chat turns and pictures. `mmkd.data` makes samples of data sets; nothing here imports PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

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
    role: str  # "system", "user" or "assistant"
    text: str
    images: int = 0  # how many of the sample's images stand at the head of this turn, in order


@dataclass(frozen=True)
class Sample:
    """What a tower prepares. Training samples end with an assistant turn; each assistant turn is a target."""

    id: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)

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
        return Sample(self.id, (), turns, self.meta)
