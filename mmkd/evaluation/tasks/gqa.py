"""GQA: answers as LLaVA prepares them."""

from __future__ import annotations

from mmkd.registry import register


@register("parsers", "gqa")
def gqa_parse(text: str) -> str:
    """Lower case without periods at the end (LLaVA, `convert_gqa_for_eval.py`)."""
    return text.rstrip(".").lower()
