"""Where the projector sits in each family of image-text models. Data, not code.

Everything else about a family is asked of transformers: `get_image_features` gives the visual tokens,
`mm_encoder_outputs` takes them. Only the border between vision encoder and projector has no common name, and the
visual switch and vision-feature matching need it.
"""

from __future__ import annotations

from torch import nn

# model_type -> path of the projector below the base model (`LlavaModel`, `PaliGemmaModel`, ...).
# Its first positional input is the vision feature, its output the visual token.
PROJECTORS = {
    "llava": "multi_modal_projector",
    "llava_next": "multi_modal_projector",
    "llava_onevision": "multi_modal_projector",
    "vipllava": "multi_modal_projector",
    "aya_vision": "multi_modal_projector",
    "fast_vlm": "multi_modal_projector",
    "gemma3": "multi_modal_projector",
    "internvl": "multi_modal_projector",
    "mistral3": "multi_modal_projector",
    "paligemma": "multi_modal_projector",
    "perception_lm": "multi_modal_projector",
    "got_ocr2": "multi_modal_projector",
    "lfm2_vl": "multi_modal_projector",
    "idefics2": "connector",
    "idefics3": "connector",
    "smolvlm": "connector",
    "deepseek_vl": "aligner",
    "janus": "aligner",
    "qwen2_vl": "visual.merger",
    "qwen2_5_vl": "visual.merger",
    "qwen3_vl": "visual.merger",
    "glm4v": "visual.merger",
}

# Families that take their visual tokens as one tensor; the others take a list.
STACKED = frozenset(
    {"aya_vision", "deepseek_vl", "fast_vlm", "gemma3", "got_ocr2", "internvl", "janus", "paligemma", "perception_lm", "vipllava"}
)

# Families whose processors put the pictures of one sample on an axis of their own, [1, k, C, H, W].
NESTED = frozenset({"idefics2", "idefics3", "smolvlm"})

# Families that ask for `token_type_ids`, and the positions (of TowerInputs) that are of type 1: Gemma 3 lets the tokens of
# one picture see each other, PaliGemma everything before the answer.
TOKEN_TYPES = {"gemma3": "visual", "paligemma": "answer"}

# Names under which families keep their vision encoder and language model below the base model.
VISION_NAMES = ("vision_tower", "vision_model", "visual")
LANGUAGE_NAMES = ("language_model", "text_model")


def child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of `names` that is a direct child of `module`, or None."""
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)
