"""A chat template as it is met: what it writes around answers, found out once by rendering a few probes.

A template is asked with a list of parts or with plain text, whichever it reads, role by role. Facts of the template are what
stands between its generation prompt and an answer, what stands behind one, and whether a later prompt holds earlier answers as
they were given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.errors import SampleError, TowerError
from mmkd.towers.samples import Turn
from mmkd.towers.thinking import PAIRS, ends_within, holds_thinking
from mmkd.towers.time_limit import limited
from mmkd.towers.tokens import END, START

_ASKED, _ANSWERED, _NEXT = "wq1x", "wa1x", "wq2x"  # texts of the probes; no template writes them itself
_EMPTY = "|".join(rf"{re.escape(opening)}\s*{re.escape(closing)}" for opening, closing in PAIRS)
_EMPTY_BLOCK = re.compile(rf"(?:{_EMPTY})\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Facts:
    """What a template does around answers.

    generation: the generation prompt.
    lead: what stands between it and an answer's first word and is learned with it: white space, or the thinking block that the
        template writes, where thinking is a target.
    behind: a rendered conversation does not go on as the generation prompt does; answers are put behind that.
    steady: earlier answers stand in a later prompt as they were given.
    after: what the template writes behind an answer, with a next turn and at the end of a conversation.
    block: length of the empty thinking block at the end of the generation prompt, 0 where there is none.
    """

    generation: str
    lead: str
    behind: bool
    steady: bool
    after: tuple[str, str]
    block: int

    @property
    def opens(self) -> bool:
        """Whether the generation prompt ends within a thinking block."""
        return ends_within(self.generation)


class Chat:
    """Renders turns by one template."""

    def __init__(self, processor: Any, template: str, *, thinking: bool | None):
        self.processor, self.template, self._thinking = processor, template, thinking
        self._listed: dict[str, bool] = {}
        self._image = getattr(processor, "image_token", None)
        self._find_contents()
        self.facts = self._find_facts()

    # ---- rendering ---------------------------------------------------------------------------------------------------

    def render(
        self, turns: Sequence[Turn], hide: Callable[[str], str] = str, *, prompt: bool, marked: bool = False, name: str = ""
    ) -> str:
        """The text of turns, with the generation prompt if `prompt`. `hide` is applied to every text of a user.

        marked: answers stand between START and END.  name: the sample's, for the error.
        Raises SampleError where the template refuses the turns.
        """
        messages = []
        for turn in turns:
            parts = [part if part is None else hide(part) for part in turn.parts]
            if marked and turn.role == "assistant":
                parts = [START + "".join(part or "" for part in parts).strip() + END]
            messages.append({"role": turn.role, "content": self._content(turn.role, parts)})
        try:
            return self._apply(messages, prompt)
        except TowerError:  # it loops, whatever it is given
            raise
        except Exception as error:  # whatever a template's own code raises
            roles = ", ".join(turn.role for turn in turns)
            raise SampleError(
                f"{f'sample {name!r}: ' if name else ''}the chat template refuses these turns ({roles}): {error}; leave them out "
                "of the data, or give the tower a `chat_template` that takes them"
            ) from error

    def _content(self, role: str, parts: Sequence[str | None]) -> Any:
        if self._listed.get(role, True):
            return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        return "".join((self._image or "") if part is None else part for part in parts)

    def _apply(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        with limited():
            return self.processor.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )

    # ---- probing -----------------------------------------------------------------------------------------------------

    def _find_contents(self) -> None:
        """Whether the template reads the content of each role as a list of parts (as most do), or as a text."""
        turns = {
            "user": [Turn("user", _ASKED)],
            "assistant": [Turn("user", _NEXT), Turn("assistant", _ASKED)],
            "system": [Turn("system", _ASKED), Turn("user", _NEXT)],
        }
        for role, probe in turns.items():
            for listed in (True, False):
                self._listed[role] = listed
                text = self._tried(probe, prompt=role != "assistant")
                if text is not None and _ASKED in text and not re.search(rf"'text'\s*:\s*'{_ASKED}", text):
                    break
            else:
                self._listed[role] = True  # refused either way, which each sample is told of

    def _tried(self, turns: Sequence[Turn], *, prompt: bool, marked: bool = False) -> str | None:
        try:
            return self.render(turns, prompt=prompt, marked=marked)
        except SampleError:
            return None

    def _find_facts(self) -> Facts:
        user, said, more = Turn("user", _ASKED), Turn("assistant", _ANSWERED), Turn("user", _NEXT)
        try:
            asked = self.render([user], prompt=True)
        except SampleError as error:
            raise TowerError(f"the chat template does not take a single question: {error.__cause__}") from error
        generation = asked[asked.rfind(_ASKED) + len(_ASKED) :]
        # With a next turn behind the answer first: that border is the one that is met.
        talks = [
            talk for talk in (
                self._tried([user, said, more], prompt=False, marked=True), self._tried([user, said], prompt=False, marked=True)
            )
            if talk is not None and START in talk and END in talk
        ]  # fmt: skip
        between = [_between(asked, talk[: talk.index(START)]) for talk in talks]
        lead = next((text for text in between if text is not None and not text.strip()), None)
        behind = lead is None
        if not generation:  # nothing stands before answers; what separates the turns of a talk is not theirs
            lead = ""
        elif lead is None:  # what is changed stands further ahead
            lead = next((space for talk in talks if (space := _space_behind(generation, talk[: talk.index(START)]))), None)
        if self._thinking:
            lead = next((text for text in reversed(between) if text and holds_thinking(text)), lead)
            if lead is None and ends_within(generation):
                lead = closing_of(generation)
        later = self._tried([user, said, more], prompt=True, marked=True)
        steady = later is not None and START in later and END in later and later[: later.index(START)] == asked + (lead or "")
        after = [talk[talk.index(END) + 1 :] for talk in talks]
        with_next = after[0].partition(_NEXT)[0] if after else ""
        block = _EMPTY_BLOCK.search(generation)
        return Facts(
            generation, lead or "", behind, steady, (with_next, after[-1] if after else ""), len(block[0]) if block else 0
        )


def _between(asked: str, before: str) -> str | None:
    """What a conversation writes between the generation prompt and the answer; None where it does not go on as that does."""
    return before[len(asked) :] if before.startswith(asked) else None


def _space_behind(generation: str, before: str) -> str:
    """The white space at the end of `before`, where the generation prompt stands before it; else "" (as where there is none)."""
    for length in range(len(before) - len(before.rstrip()), 0, -1):
        if before[:-length].endswith(generation):
            return before[-length:]
    return ""


def closing_of(generation: str) -> str:
    """What closes the thinking block that a generation prompt leaves open, with the white space that it opened with."""
    found: Iterator[tuple[int, str, str]] = (
        (generation.lower().rfind(opening.lower()), opening, closing) for opening, closing in PAIRS
    )
    place, opening, closing = max(found)
    space = generation[place + len(opening) :]
    return f"{space}{closing}{space * 2}" if space.strip() == "" else closing
