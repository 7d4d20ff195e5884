"""Teacher and student with different tokenizers: which of their answer tokens stand for the same bytes.

Both towers prepare the same sample by their own tokenizer. The bytes of their answers are compared, and cut where both have a
border between tokens: each piece is a span of one or more tokens of each. Ids of one tokenizer never reach the other model.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mmkd.engine.rows import Head
from mmkd.engine.span_rows import Side, span_sum
from mmkd.errors import TowerError
from mmkd.losses.spans import Spans
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)

LITTLE = 0.9  # share of answer tokens that spans cover, below which that is a warning
END = b"<end>\xff"  # stands for either tokenizer's end token; \xff is in no text

Span = tuple[int, int, int, int]  # student's tokens [a, b), teacher's tokens [c, d)


def token_bytes(tower: Tower) -> list[bytes]:
    """The bytes of each token id, `END` for those that end an answer.

    Raises TowerError for tokenizers that do not keep the text's bytes (WordPiece).
    """
    tokenizer = tower.tokenizer
    kind = _decoder_kind(tokenizer)
    special, ends = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}, tower.stop_ids
    of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    table = []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if index in ends:
            table.append(END)
        elif index in special or token is None:
            table.append((token or "").encode())
        elif kind == "ByteLevel":
            table.append(bytes(of_character[character] for character in token))
        else:
            table.append(_pieces_bytes(token))
    return table


def silent_tokens(tokenizer: Any) -> set[int]:
    """The special tokens of a tokenizer, which decoding leaves out of what was said."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def _decoder_kind(tokenizer: Any) -> str:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {part["type"] for part in (decoder, *decoder.get("decoders", ()))}
    if "ByteLevel" in kinds:
        return "ByteLevel"
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return "SentencePiece"
    raise TowerError(
        f"{type(tokenizer).__name__} decodes by {sorted(kinds)}, which does not keep the bytes of a text, so its tokens cannot "
        "be aligned with another tokenizer's; use a teacher with a byte-level or SentencePiece tokenizer"
    )


def _pieces_bytes(token: str) -> bytes:
    """A SentencePiece token: `▁` is a space, `<0x0A>` a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def common_spans(own: Sequence[bytes], other: Sequence[bytes]) -> list[Span]:
    """Smallest pieces at whose ends both have a border; leading white space does not count where only one has it.

    Where the texts differ (one is cut off), only their common beginning is aligned. A token without bytes belongs to the piece
    behind it, at the end of an answer to its end. Answers of several turns are aligned turn by
    turn, each end with the other's end.
    """
    found: list[Span] = []
    for (a, own_turn), (c, other_turn) in zip(_turns(own), _turns(other), strict=False):
        found += [(a + s, a + e, c + t, c + f) for s, e, t, f in _turn_spans(own_turn, other_turn)]
    return found


def _turns(tokens: Sequence[bytes]) -> list[tuple[int, Sequence[bytes]]]:
    """(index of its first token, tokens) of each turn, its end included."""
    starts = [0, *(i + 1 for i, token in enumerate(tokens) if token == END)]
    return [(a, tokens[a:b]) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True) if b > a]


def _turn_spans(own: Sequence[bytes], other: Sequence[bytes]) -> list[Span]:
    ended = [bool(tokens) and tokens[-1] == END for tokens in (own, other)]
    own_text, other_text = own[: len(own) - ended[0]], other[: len(other) - ended[1]]
    texts = [b"".join(tokens) for tokens in (own_text, other_text)]
    ends = [list(accumulate(map(len, tokens))) for tokens in (own_text, other_text)]
    if texts[0] != texts[1]:
        broken = [_errors(text) for text in reversed(texts)]  # how each side's bytes that are no text are read
        both = [_normalised(*given) for given in zip((own_text, other_text), texts, broken, strict=True)]
        texts, ends = [text for text, _ in both], [found for _, found in both]
    blanks = [len(text) - len(text.lstrip()) for text in texts]
    if texts[0][: blanks[0]] == texts[1][: blanks[1]]:
        blanks = [0, 0]
    shared = _common_length(texts[0][blanks[0] :], texts[1][blanks[1] :])
    found, last = [], (0, 0)
    borders = {end - blanks[1]: index + 1 for index, end in enumerate(ends[1]) if 0 < end - blanks[1] <= shared}
    for index, end in enumerate(end - blanks[0] for end in ends[0]):
        if end in borders and 0 < end:
            found.append((last[0], index + 1, last[1], borders[end]))
            last = (index + 1, borders.pop(end))
    if all(ended) and not any(own_text[last[0] :]) and not any(other_text[last[1] :]):
        found.append((last[0], len(own), last[1], len(other)))
    return found


def _errors(beside: bytes) -> str:
    """How bytes that are no text are read beside another text: as the sign for them (U+FFFD), where the other one is a text.

    A model may say half a character. Who is told its words reads that sign, as decoding has it; two broken texts stay so.
    """
    try:
        beside.decode("utf-8")
    except UnicodeDecodeError:
        return "surrogateescape"
    return "replace"


def _normalised(tokens: Sequence[bytes], raw: bytes, errors: str) -> tuple[bytes, list[int]]:
    """A text in Unicode's NFKC, and the bytes of it up to and with each token; -1 for a border within what becomes one character.

    Tokenizers normalise differently: Qwen's compose accents (NFC), SentencePiece's also unfold ligatures and full-width letters
    (NFKC), Llama 3's leave a text as it is. `raw`: the tokens' bytes.  errors: as in `bytes.decode`.
    """
    whole = _nfkc(raw, errors)
    if whole == raw:
        return raw, list(accumulate(map(len, tokens)))
    ends, at = [], 0
    for token in tokens:
        at += len(token)
        before = _nfkc(raw[:at], errors)
        ends.append(len(before) if before + _nfkc(raw[at:], errors) == whole else -1)
    return whole, ends


def _nfkc(text: bytes, errors: str) -> bytes:
    return unicodedata.normalize("NFKC", text.decode("utf-8", errors)).encode("utf-8", "surrogateescape")


def _common_length(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Aligned:
    """Spans of a batch over the response rows of both towers, in order."""

    own: Tensor  # [G, 2] first and behind-the-last row of the student's
    other: Tensor  # [G, 2] of the teacher's

    @property
    def tokens(self) -> Tensor:
        """The student's tokens in each span. [G]"""
        return self.own[:, 1] - self.own[:, 0]


class Alignment:
    """What two tokenizers have in common, and the spans of a batch."""

    def __init__(self, student: Tower, teacher: Tower):
        self.student, self.teacher = student, teacher
        self._told = False

    @cached_property
    def _tables(self) -> tuple[list[bytes], list[bytes]]:
        return token_bytes(self.student), token_bytes(self.teacher)

    @property
    def columns(self) -> tuple[int, int]:
        """Entries of each tower's vocabulary that its head predicts; a tokenizer may know further ones."""
        own, other = (min(tower.vocabulary, tower.head.weight.shape[0]) for tower in (self.student, self.teacher))
        return own, other

    @cached_property
    def matched(self) -> Tensor:
        """Ids, the student's and the teacher's, of strings that are in both vocabularies. [2, M]"""
        own, other = ({text: index for index, text in reversed(list(enumerate(table))) if text} for table in self._tables)
        both = [(own[text], other[text]) for text in own.keys() & other.keys()]
        pairs = sorted(pair for pair in both if all(i < n for i, n in zip(pair, self.columns, strict=True)))
        logger.info(
            "alignment: %s strings are in both vocabularies, of the student's %s and the teacher's %s tokens",
            *(f"{n:,}" for n in (len(pairs), len(self._tables[0]), len(self._tables[1]))),
        )
        return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T

    def of(self, own: Tensor, other: Tensor) -> Aligned:
        """own, other: the targets of both towers' batches [B, L] (on the CPU, IGNORE where nothing is to be predicted)."""
        found, rows = [], [0, 0]
        for mine, theirs in zip(own, other, strict=True):
            ids = [row[row >= 0].tolist() for row in (mine, theirs)]
            spans_here = common_spans(*map(self._words, (0, 1), ids))
            found += [(rows[0] + a, rows[0] + b, rows[1] + c, rows[1] + d) for a, b, c, d in spans_here]
            rows = [rows[0] + len(ids[0]), rows[1] + len(ids[1])]
        borders = torch.tensor(found, dtype=torch.long).reshape(-1, 4)
        aligned = Aligned(borders[:, :2], borders[:, 2:])
        self._tell(int(aligned.tokens.sum()), rows[0], len(found))
        return aligned

    def _words(self, side: int, ids: Sequence[int]) -> list[bytes]:
        """The bytes of an answer's tokens; none of a special token within it, which the other tower was not told."""
        return [b"" if token in self._silent[side] else self._tables[side][token] for token in ids]

    @cached_property
    def _silent(self) -> tuple[set[int], set[int]]:
        own, other = (silent_tokens(tower.tokenizer) - tower.stop_ids for tower in (self.student, self.teacher))
        return own, other

    def _tell(self, covered: int, tokens: int, groups: int) -> None:
        if not self._told and tokens:
            self._told = True
            facts = (100 * covered / tokens, tokens, groups)
            logger.info("alignment: %.1f %% of the student's %d answer tokens of the first batch, in %d spans", *facts)
            if covered < LITTLE * tokens:
                logger.warning(
                    "alignment: the teacher's words stand beside only %.1f %% of the student's answer tokens, so the others "
                    "learn nothing from it; the towers write answers differently, or one cuts them off (max_length)", facts[0],
                )  # fmt: skip


def span_losses(
    hidden: tuple[Tensor, Tensor],
    heads: tuple[Head, Head],
    vocabularies: tuple[int, int],
    targets: tuple[Tensor, Tensor],
    aligned: Aligned,
    matched: Tensor,
    chunk_bytes: int,
    **options: Any,
) -> Tensor:
    """The losses of all spans, each times its number of student tokens, summed.

    hidden: rows [Rs, Ds] and [Rt, Dt] of student and teacher that predict `targets` [Rs] and [Rt].  See `mmkd.engine.span_rows`.
    """
    sides = [Side(*given) for given in zip(heads, vocabularies, targets, (aligned.own, aligned.other), strict=True)]
    return span_sum(hidden, (sides[0], sides[1]), Spans(**options), matched, aligned.tokens, chunk_bytes)
