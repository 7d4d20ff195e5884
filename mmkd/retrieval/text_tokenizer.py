"""Tokenizers for text encoders that start from random weights, trained on the captions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmkd.errors import TowerError


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, words: bool = False) -> Any:
    """A lower-casing tokenizer that writes `<|cls|> text <|end|>`: encoders pool at either end.

    Byte-level BPE, whose `vocab_size` counts the three special tokens and the 256 bytes (TowerError when it is smaller); or, with
    `words`, the most frequent words, numbers and signs as they stand, every other one becoming `<|pad|>`.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    specials = {"pad_token": "<|pad|>", "cls_token": "<|cls|>", "eos_token": "<|end|>"}
    train = _word_tokenizer if words else _bpe_tokenizer
    raw = train(texts, vocab_size, list(specials.values()))
    ends = [(token, raw.token_to_id(token)) for token in (specials["cls_token"], specials["eos_token"])]
    raw.post_processor = processors.TemplateProcessing(single="<|cls|> $A <|end|>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="right", unk_token="<|pad|>", **specials)


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    least = len(specials) + 256
    if vocab_size < least:
        raise TowerError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone are {least}")
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return raw


def _word_tokenizer(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.WordLevel(unk_token=specials[0]))
    raw.normalizer = normalizers.Lowercase()
    # Underscores and white space separate words; every other sign is a word by itself.
    gaps, signs = Regex(r"[\s_]+"), Regex(r"[^\p{L}\p{M}\p{N}]")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(gaps, "removed"), pre_tokenizers.Split(signs, "isolated")]
    )
    raw.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    )
    return raw
