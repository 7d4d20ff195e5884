"""Checks of one answer's words."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from mmkd.errors import did_you_mean
from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check
from mmkd.writing.words import numbers_in, spaced, texts_in, words_of


@register("checks", "length")
@dataclass
class Length(Check):
    """Texts of the row that are neither too short nor too long, in words or characters."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1000
    unit: Literal["words", "characters"] = "words"
    of: tuple[Literal["question", "answer"], ...] = ("answer",)

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max {self.max}")

    def refuse(self, one: Candidate) -> str | None:
        for name in self.of:
            text = one.row[name]
            count = len(text) if self.unit == "characters" else len(text.split())
            # A script without spaces is one word however long it is; a word of prose has some six characters.
            if self.unit == "words" and len(text) > 20 * self.max:
                return f"{name} too long"
            if not self.min <= count <= self.max:
                return f"{name} too {'short' if count < self.min else 'long'}"
        return None


# Words that stand in most sentences of a language and not in those of its neighbours.
_COMMON = {
    "en": "the of and to in is are was were that it with for on as this there what which at by from an be has have not",
    "de": "der die das und ist sind ein eine nicht mit auf für den dem im zu von es wird sich auch des einen einem",
    "fr": "le la les des est et un une dans sur pas pour que qui avec il elle du au ce cette sont aux de",
    "es": "el la los las es y un una en que no con por para del se su al lo como está son más de",
    "it": "il lo la gli le è e un una di che non con per del della sono nel si alla dei più",
    "pt": "o a os as é e um uma em que não com por para do da no na se ao dos das são mais de",
    "nl": "de het een en is van op niet met dat die voor zijn aan er ook in te wordt naar",
}
# Of other languages the script tells.
_SCRIPTS = {
    "zh": ("CJK",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "ko": ("HANGUL",), "ru": ("CYRILLIC",), "uk": ("CYRILLIC",),
    "ar": ("ARABIC",), "he": ("HEBREW",), "el": ("GREEK",), "hi": ("DEVANAGARI",), "th": ("THAI",),
}  # fmt: skip
_SETS = {name: frozenset(words.split()) for name, words in _COMMON.items()}
LANGUAGES = (*_COMMON, *_SCRIPTS)
_ENOUGH = 5  # words from which on common words are looked for


@register("checks", "language")
@dataclass
class Language(Check):
    """Answers in one language: nine letters of ten of its script, and in texts of 5 words or more its common words.

    A text without letters passes, and so does a short one of the right script: a rule on scripts and some 25 common
    words a language (en, de, fr, es, it, pt, nl) cannot tell "rouge" from "red". In longer texts the
    language must have at least as many common words as any other, and at least one in ten.
    """

    name: str = "en"
    of: tuple[Literal["question", "answer"], ...] = ("answer",)

    def __post_init__(self) -> None:
        if self.name not in LANGUAGES:
            raise ValueError(f"name: there is no language {self.name!r}; {did_you_mean(self.name, LANGUAGES)}")

    def refuse(self, one: Candidate) -> str | None:
        for name in self.of:
            if not _is_in(self.name, one.row[name]):
                return f"{name} not in {self.name}"
        return None


def _is_in(language: str, text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    scripts = _SCRIPTS.get(language, ("LATIN",))
    own = sum(unicodedata.name(c, "").startswith(scripts) for c in letters)
    if own < 0.9 * len(letters):
        return False
    words = words_of(text)
    if language not in _COMMON or len(words) < _ENOUGH:
        return True
    counts = {name: sum(word in common for word in words) for name, common in _SETS.items()}
    return counts[language] == max(counts.values()) and counts[language] >= 0.1 * len(words)


@register("checks", "words")
@dataclass
class Words(Check):
    """Texts that hold required words and none of the forbidden ones (I2D2's constraints), compared as whole words."""

    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    of: Literal["question", "answer"] = "answer"

    def refuse(self, one: Candidate) -> str | None:
        text = spaced(one.row[self.of])
        if any(spaced(word) not in text for word in self.required):
            return "lacks a required word"
        return "has a forbidden word" if any(spaced(word) in text for word in self.forbidden) else None


# What a text says that speaks to a model or program instead of answering: of it nothing is ever run, and none of it is taught.
_INSTRUCTIONS = re.compile(
    r"""
    \b(?:ignore|disregard|forget|override|bypass)\b.{0,40}
      \b(?:instruction|prompt|rule|guideline|direction|message|above|previous|prior|everything)
    | \b(?:system|developer)\s+(?:prompt|message|instruction)
    | \byou\s+are\s+now\b | \bnew\s+instructions?\b | \bact\s+as\s+(?:a|an|the)\b | \bpretend\s+(?:to\s+be|that)\b
    | \b(?:change|set|replace|overwrite|modify|relabel|mark)\b.{0,30}\b(?:label|ground\s*truth|score|reference|verdict)s?\b
    | \b(?:label|score|grade|rate|mark)\s+(?:this|it|me|the\s+(?:answer|sample|row))\s+(?:as|with|to)\b
    | \b(?:read|open|cat|print|load|include|upload|send|exfiltrate|delete|remove|execute|run|download|curl|wget)\b.{0,40}
      (?:/etc/|/proc/|/home/|/root/|~/|\.\./|\.ssh|\.env\b|file://|https?://|[a-z]:\\|\bpasswd\b|\bpassword|\bapi[\s_-]?key|\bsecret)
    | \b(?:os\.system|subprocess|__import__|eval|exec)\s*\( | \brm\s+-rf?\b | \$\(.{0,80}\) | <\s*script\b | \bdrop\s+table\b
    | <\|?\s*/?\s*(?:im_start|im_end|system|assistant|user|endoftext|eot_id|start_header_id)\s*\|?> | \[/?INST\] | <</?SYS>>
    | \{\{.*\}\} | \{%.*%\}
    | \bas\s+an?\s+(?:ai|artificial|language\s+model|large\s+language)\b | \bi(?:\s+am|['’]m)\s+(?:sorry|unable|an\s+ai)\b
    | \bi\s+can(?:no|['’])t\s+(?:help|assist|answer|see|view|provide|comply)
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)


@register("checks", "instructions")
@dataclass
class Instructions(Check):
    """Drops rows that speak to a model, a labeller or a program instead of answering, and refusals to answer.

    A list of patterns: ignored instructions, changed labels or scores, files and addresses to read, chat and template markers,
    code that starts programs, "as an AI". It stands before all other checks of every write stage;
    `checks: [{instructions: {off: true}}]` takes it away.
    """

    also: tuple[str, ...] = ()  # further words that no row may have
    off: bool = False

    def refuse(self, one: Candidate) -> str | None:
        if self.off:
            return None
        for text in {one.text, *texts_in(one.row)}:
            if _INSTRUCTIONS.search(text[: 2**16]):
                return "speaks to a model"
            if any(spaced(word) in spaced(text) for word in self.also):
                return "has a forbidden word"
        return None


@register("checks", "grounded")
@dataclass
class Grounded(Check):
    """Answers whose words stand in what was read from the picture: `ocr_tokens`, or a key of `told` (TAIL's labels).

    share: of the answer's words, at least.  numbers: only numbers count, in digits by their value and in English words up to
    twenty (CodePercept's captions, against a trace).
    """

    told: str = ""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    numbers: bool = False
    of: tuple[str, ...] = field(default=("answer",))

    def refuse(self, one: Candidate) -> str | None:
        text = one.question.told.get(self.told, "") if self.told else " ".join(one.question.ocr_tokens)
        found = numbers_in if self.numbers else words_of
        read = set(found(text))
        for name in self.of:
            said = found(one.row.get(name) or "")
            if not said and self.numbers:
                continue
            if not said or sum(part in read for part in said) < self.share * len(said):
                return f"{name} not in the picture's words"
        return None
