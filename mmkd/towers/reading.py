"""What a user can change of how a tower reads samples. Nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any


@dataclass(frozen=True)
class Reading:
    """How a tower reads samples, where that is not as its folder says.

    processor: options of the processor or its image processor, such as `max_pixels`.
    chat_template: a file, a template, or a name of `mmkd.towers.templates.CHAT_TEMPLATES`.
    template: arguments of the chat template, such as `enable_thinking`.
    thinking: None: thinking that an answer holds is a target, blocks that the template alone writes are not. True: these too.
        False: neither; thinking is taken off answers, and a block that the generation prompt opens is closed there.
    date: what a template that prints the day prints; None: today.

    All but `thinking` and `date` is written into the processor, and so into a model that is saved.
    """

    processor: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    date: date | None = None


AS_SAVED = Reading()
