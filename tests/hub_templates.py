"""What the chat templates of published models do, written anew: headers, spaces, ends, thinking, how contents are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mmkd.testing.tiny_families import tiny_family
from mmkd.towers.reading import Reading
from mmkd.towers.tower import Tower

TEMPLATES = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Hub:
    """One published template, a file of `chat_templates` or one of our own names, on the tiny model of its family.

    tokens: control tokens of the vocabulary that it uses.  ends: those of the generation configuration.
    end: the one that ends an answer.  steady: whether all answers of a talk can be learned in one sequence.
    system: whether it takes a system turn.  opens: whether its generation prompt opens a thinking block.
    """

    family: str
    template: str
    tokens: tuple[str, ...]
    ends: tuple[str, ...]
    end: str
    bos: str | None = None
    steady: bool = True
    system: bool = True
    opens: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def chat_template(self) -> str:
        file = TEMPLATES / f"{self.template}.jinja"
        return str(file) if file.is_file() else self.template


_QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
_KIMI_TOKENS = (
    "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>",
    "<|media_begin|>", "<|media_content|>", "<|media_end|>",
)  # fmt: skip


def _qwen(family: str, template: str, **other: Any) -> Hub:
    return Hub(family, template, _QWEN_TOKENS, _QWEN_ENDS, "<|im_end|>", **other)


HUB: dict[str, Hub] = {
    "llava-1.5": Hub("llava", "llava", ("</s>",), ("</s>",), "</s>"),
    "llava-1.5 with an end": Hub("llava", "llava_with_end", ("</s>",), ("</s>",), "</s>"),
    "llava-next vicuna": Hub("llava_next", "llava", ("</s>",), ("</s>",), "</s>"),
    "llava-next mistral": Hub("llava_next", "llava_next_mistral", ("</s>",), ("</s>",), "</s>"),
    "llava-onevision": _qwen("llava_onevision", "llava_onevision", steady=False),
    "qwen2-vl": _qwen("qwen2_vl", "qwen2_vl"),
    "qwen2.5-vl": _qwen("qwen2_5_vl", "qwen2_vl"),
    "qwen3-vl": _qwen("qwen3_vl", "qwen3_vl"),
    "qwen3, hybrid": _qwen("qwen3_vl", "qwen3_hybrid"),
    "qwen3, thinking off": _qwen("qwen3_vl", "qwen3_hybrid", steady=False, options={"template": {"enable_thinking": False}}),
    "qwen3.5": _qwen("qwen3_5", "qwen3_5", steady=False, opens=True),
    "qwen3.5, thinking off": _qwen("qwen3_5", "qwen3_5", steady=False, options={"template": {"enable_thinking": False}}),
    "internvl3": _qwen("internvl", "internvl3"),
    "smolvlm": Hub("smolvlm", "smolvlm", ("<|im_start|>", "<end_of_utterance>"), ("<end_of_utterance>",),
        "<end_of_utterance>"),
    "idefics2": Hub("idefics2", "idefics", ("<end_of_utterance>",), ("<end_of_utterance>",), "<end_of_utterance>"),
    "idefics3": Hub("idefics3", "idefics3", ("<|begin_of_text|>", "<end_of_utterance>"),
        ("<end_of_utterance>",), "<end_of_utterance>"),
    "gemma3": Hub("gemma3", "gemma3", ("<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",), "<end_of_turn>"),
    "paligemma": Hub("paligemma", "paligemma", ("<eos>",), ("<eos>",), "<eos>", steady=False),
    "pixtral": Hub("mistral3", "pixtral", ("[INST]", "[/INST]", "<s>", "</s>"), ("</s>",), "</s>", bos="<s>"),
    "mistral-small-3.1": Hub("mistral3", "mistral_small",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<s>", "</s>"), ("</s>",), "</s>", bos="<s>"),
    "glm-4.1v": Hub("glm4v", "glm4_1v", ("[gMASK]", "<sop>", "<|endoftext|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"), "<|user|>"),
    "glm-4.5v": Hub("glm4v_moe", "glm4_5v", ("[gMASK]", "<sop>", "<|endoftext|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"), "<|user|>", steady=False),
    "deepseek-vl": Hub("deepseek_vl", "deepseek_vl", ("<eos>",), ("<eos>",), "<eos>"),
    "molmo2": Hub("molmo2", "molmo2", _QWEN_TOKENS, _QWEN_ENDS, "<|im_end|>", steady=False, system=False),
    "kimi": Hub("kimi_k25", "kimi", _KIMI_TOKENS, ("<|im_end|>",), "<|im_end|>", steady=False, opens=True),
    "kimi, thinking off": Hub("kimi_k25", "kimi", _KIMI_TOKENS, ("<|im_end|>",), "<|im_end|>",
        options={"template": {"thinking": False}}),
    "lfm2-vl": Hub("lfm2_vl", "lfm2_vl", ("<|startoftext|>", "<|im_start|>", "<|im_end|>"), ("<|im_end|>",), "<|im_end|>",
        bos="<|startoftext|>"),
    "minicpm-v": _qwen("minicpmv4_6", "minicpm_v", steady=False),
    "mllama": Hub("llava", "mllama", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>",), "<|eot_id|>", bos="<|begin_of_text|>", system=False),
}  # fmt: skip


@cache
def hub_tower(name: str) -> Tower:
    """The tiny model of a family with a published template, its control tokens and its ends."""
    hub = HUB[name]
    tower = tiny_family(hub.family)
    tokenizer = tower.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(hub.tokens)}, replace_extra_special_tokens=False)
    tokenizer.eos_token = hub.ends[-1] if hub.ends[0] != "<|endoftext|>" else "<|endoftext|>"
    if hub.bos:
        tokenizer.bos_token = hub.bos
    tower.model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(hub.ends))
    reading = Reading(chat_template=hub.chat_template, **hub.options)
    return Tower(tower.model, tower.processor, max_length=4096, reading=reading)
