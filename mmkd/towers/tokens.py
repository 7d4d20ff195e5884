"""Tokens of rendered conversations: what users wrote is text, also where it reads like a control token.

Control strings in users' texts (a tokenizer's special tokens, a processor's placeholders) are put behind one character each, of a
private Unicode plane, before a template or a processor sees them. When the text is tokenised they come back, and a copy of the
tokenizer, which knows the template's own control tokens by other names, reads them as the text that they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import BatchEncoding

from mmkd.errors import SampleError
from mmkd.towers.thinking import MARKS

_PRIVATE = "\U000f0000-\U0010fffd"  # planes 15 and 16; characters of a text that are in them are hidden like control strings
_FIRST = 0xF0000  # stands for the first string that a guard hides
START, END = "\U00100000", "\U00100001"  # before and behind an answer in a rendered conversation
_MARK = re.compile(f"[{START}{END}]")
_RENAMED = "\U00100002"  # begins the other names of control tokens


def control_strings(processor: Any, template: str) -> frozenset[str]:
    """What users' texts must not say to tokenizer and processor: special tokens, placeholders, and what the template writes.

    Thinking marks are left out: an answer that reasons is learned with the tokens with which a model writes it. So are single
    characters, such as the "!" that some tokenizers pad with.
    """
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {token.content for token in added if token.special or token.content in template} | {*tokenizer.all_special_tokens}
    named = {name: value for name, value in vars(processor).items() if isinstance(value, str)}
    found |= {value for name, value in named.items() if name.endswith(("_token", "_placeholder"))}
    return frozenset(text for text in found if len(text.strip()) > 1 and text not in MARKS)


def pattern_of(strings: Iterable[str]) -> re.Pattern:
    """Matches any of `strings`, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)")


@dataclass
class Guard:
    """Hides control strings of one sample's texts behind characters, and shows them again."""

    controls: Controls
    hidden: dict[str, str] = field(default_factory=dict)  # character -> what it stands for

    def hide(self, text: str) -> str:
        if not self.controls.beginnings.search(text):
            return text
        return self.controls.texts.sub(lambda found: self._character(found[0]), text)

    def show(self, text: str) -> str:
        return text.translate({ord(c): string for c, string in self.hidden.items()}) if self.hidden else text

    def _character(self, string: str) -> str:
        known = next((c for c, s in self.hidden.items() if s == string), None)
        if known is None:
            known = chr(_FIRST + len(self.hidden))
            self.hidden[known] = string
        return known


class Controls:
    """The control strings of one tokenizer, as patterns."""

    def __init__(self, strings: frozenset[str]):
        self.strings = strings
        self.own = pattern_of(strings)
        self.texts = re.compile(f"{self.own.pattern}|[{_PRIVATE}]")
        first = "".join(sorted(re.escape(c) for c in {s[0] for s in strings}))
        self.beginnings = re.compile(f"[{first}{_PRIVATE}]")


@dataclass(frozen=True)
class Text:
    """A text as it goes to a tokenizer, marks taken out."""

    plain: str
    marks: tuple[int, ...]  # offsets in `plain` at which marks stood


class TextTokenizer:
    """A tokenizer that says where marks stood between its tokens, and reads hidden strings as text."""

    def __init__(self, tokenizer: Any, controls: Controls):
        self.tokenizer, self.controls = tokenizer, controls
        self.is_fast = bool(getattr(tokenizer, "is_fast", False))
        self._copy: Any = None
        self._ids: list[int] = []  # id in the copy -> the tokenizer's own
        self._control_ids: set[int] = set()
        self._added = frozenset(token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
        self._around: tuple[list[int], list[int]] = ([], [])

    def ids(self, text: str, guard: Guard) -> list[int]:
        """Token ids of a text without the tokens that the tokenizer itself puts around one."""
        if not guard.hidden:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._as_text(self._named_otherwise(text, guard))[0]

    def marked(self, text: str, guard: Guard, *, add_special_tokens: bool) -> tuple[list[int], list[int | None]]:
        """(token ids, per mark the index of the first token behind it).

        The index is None where a mark stands within a token. Raises SampleError for hidden strings that cannot be read as text.
        """
        if guard.hidden:
            read = self._named_otherwise(text, guard)
            ids, offsets = self._as_text(read)
            before, after = self._around if add_special_tokens else ([], [])
            ids, shift = [*before, *ids, *after], len(before)
        else:
            read, shift = _unmarked(text), 0
            options = {"return_offsets_mapping": True} if self.is_fast and read.marks else {}
            batch = self.tokenizer(read.plain, add_special_tokens=add_special_tokens, **options)
            ids, offsets = batch["input_ids"], batch.get("offset_mapping", [])
        if read.marks and not offsets:
            return ids, [self._prefix_length(read.plain[:mark], ids, add_special_tokens) for mark in read.marks]
        return ids, [None if i is None else i + shift for i in _borders(offsets, read.marks)]

    def _prefix_length(self, text: str, ids: Sequence[int], special: bool) -> int | None:
        """How many of the tokens the beginning `text` has; None where it ends within one. For tokenizers without offsets."""
        prefix = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        while prefix and prefix != ids[: len(prefix)]:
            prefix = prefix[:-1] if prefix[-1] in self.tokenizer.all_special_ids else []
        return len(prefix) or None

    # ---- control strings as text -------------------------------------------------------------------------------------

    def _named_otherwise(self, text: str, guard: Guard) -> Text:
        """The text for the copy: the template's control tokens by their other names, hidden strings shown, marks taken out."""
        pieces, marks = [], []
        start = length = 0
        for found in self.controls.texts.finditer(text):
            string = found[0]
            kept = text[start : found.start()]
            length += len(kept)
            if string in (START, END):
                marks.append(length)
                new = ""
            else:
                new = guard.hidden.get(string) or (_RENAMED + string if string in self._added else string)
            pieces += [kept, new]
            length += len(new)
            start = found.end()
        return Text("".join([*pieces, text[start:]]), tuple(marks))

    def _as_text(self, text: Text) -> tuple[list[int], list[tuple[int, int]]]:
        if not self.is_fast:
            raise SampleError("a text holds a control token, and this tokenizer cannot read it as text")
        if self._copy is None:
            self._make_copy()
        encoding = self._copy.encode(text.plain, add_special_tokens=False)
        ids = [self._ids[number] for number in encoding.ids]
        if sum(number in self._control_ids for number in ids) != text.plain.count(_RENAMED):
            raise SampleError("a text holds a control token that this tokenizer does not read as text; take it out of the data")
        return ids, encoding.offsets

    def _make_copy(self) -> None:
        from tokenizers import Tokenizer

        raw = json.loads(self.tokenizer.backend_tokenizer.to_str())
        vocabulary = self.tokenizer.get_vocab()
        names = {}
        for token in raw["added_tokens"]:
            name = token["content"]
            if name in self.controls.strings:
                token["content"] = _RENAMED + name
            names[token["content"]] = name
        self._copy = Tokenizer.from_str(json.dumps(raw))
        own = self._copy.get_vocab(with_added_tokens=True)
        self._ids = [0] * (max(own.values()) + 1)
        for token, number in own.items():
            self._ids[number] = vocabulary[names.get(token, token)]
        self._control_ids = {vocabulary[string] for string in self.controls.strings if string in self._added}
        plain, whole = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self._around = (whole[:start], whole[start + len(plain) :])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copy": None}


class MarkedTokenizer:
    """In a tokenizer's place within one call of a processor. Keeps the ids that it gave, and where marks stood between them."""

    def __init__(self, words: TextTokenizer, guard: Guard):
        self._words, self._guard = words, guard
        self.ids: list[int] = []
        self.borders: list[int | None] = []

    def __call__(self, text: Any = None, *, add_special_tokens: bool = True, return_tensors: Any = None, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        if len(texts) != 1 or not (self._guard.hidden or _MARK.search(texts[0])):  # a processor counting tokens of its own
            return self._words.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors=return_tensors, **options)
        self.ids, self.borders = self._words.marked(texts[0], self._guard, add_special_tokens=add_special_tokens)
        data = {"input_ids": [self.ids], "attention_mask": [[1] * len(self.ids)]}
        if options.get("return_token_type_ids"):
            data["token_type_ids"] = [[0] * len(self.ids)]
        return _Batch(data, tensor_type=return_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._words.tokenizer, name)


class _Batch(BatchEncoding):
    """One tokenised text. Which token holds a character is asked for `mm_token_type_ids` alone, which towers make themselves."""

    def char_to_token(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int:
        return 0


def _unmarked(text: str) -> Text:
    pieces = _MARK.split(text)
    marks, length = [], 0
    for piece in pieces[:-1]:
        length += len(piece)
        marks.append(length)
    return Text("".join(pieces), tuple(marks))


def _borders(offsets: Sequence[tuple[int, int]], marks: Sequence[int]) -> list[int | None]:
    """Per mark the index of the first token that ends behind it; None where that token begins before it."""
    borders: list[int | None] = []
    index = 0
    for mark in marks:  # in order
        while index < len(offsets) and offsets[index][1] <= mark:
            index += 1
        inside = index < len(offsets) and offsets[index][0] < mark
        borders.append(None if inside else index)
    return borders
