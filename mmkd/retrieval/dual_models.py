"""Dual encoders as recipes describe them."""

from __future__ import annotations

from collections.abc import Sequence

from mmkd.retrieval.dual import TextSpec, TransformersDual, assemble_dual, train_text_tokenizer
from mmkd.retrieval.recipe import DualSpec
from mmkd.towers.assemble import VisionSpec


def assemble_from(spec: DualSpec, texts: Sequence[str], seed: int) -> TransformersDual:
    """A recipe's `assemble`, its tokenizer trained on `texts` where its text encoder starts from random weights."""
    size, text = spec.vision.image_size, spec.text
    vision = {k: v for k, v in spec.vision.model_dump(exclude={"image_size"}).items() if v is not None}
    tokenizer = None if text.vocab_size is None else train_text_tokenizer(texts, text.vocab_size, words=text.tokenizer == "words")
    return assemble_dual(
        VisionSpec(**vision, image_size=(size, size) if isinstance(size, int) else size),
        TextSpec(text.source, text.config, text.pooling, text.frozen),
        embedding=spec.embedding,
        tokenizer=tokenizer,
        seed=seed,
    )
