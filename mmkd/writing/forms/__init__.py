"""Forms of answers: what an answer must look like, and what is read from it.

A form is one dataclass in one file; its fields are options of a card's or stage's `form:`. A user's own stands in a module
that the recipe names by `imports:`:

    @register("forms", "number")
    @dataclass(frozen=True)
    class Number(Form):
        '''A whole number.'''

        def read(self, text, question):
            if not text.strip().isdigit():
                raise FormError("is no whole number")
            return text.strip()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from mmkd.base.plugged import Plugged
from mmkd.data.samples import Question


class FormError(ValueError):
    """Why an answer has not the form that was asked for; the text is counted and shown, so it names no content."""


@dataclass(frozen=True)
class Form(ABC):
    """How an answer is read."""

    @abstractmethod
    def read(self, text: str, question: Question) -> Any:
        """What an answer says: a text, or a mapping of values. Raises FormError for an answer of another form.

        text: not empty, without white space around it.  question: what was asked about.
        """

    def keys(self) -> tuple[str, ...] | None:
        """The keys of the mapping that `read` gives; None for a text."""
        return None


class FormSpec(Plugged):
    """A card's or stage's `form:`."""

    of: ClassVar[str] = "forms"
    one: ClassVar[str] = "form of answers"
