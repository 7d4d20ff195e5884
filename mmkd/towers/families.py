"""Where the projector sits in each family of image-text models. Data, not code.

Everything else about a family is asked of transformers: `get_image_features` gives the visual tokens,
`mm_encoder_outputs` takes them. Only the border between vision encoder and projector has no common name, and the
visual switch and vision-feature matching need it.
"""

from __future__ import annotations

from torch import nn

# model_type -> path of the projector below the base model (`LlavaModel`, `PaliGemmaModel`, ...), or the paths of modules that
# follow each other. Its first input is the vision feature, its output the visual token.
PROJECTORS: dict[str, str | tuple[str, ...]] = {
    "aria": "multi_modal_projector",
    "aya_vision": "multi_modal_projector",
    "cohere2_vision": "multi_modal_projector",
    "cohere_compass": "visual.merger",
    "cosmos3_edge": "projector",
    "cosmos3_omni": "visual.merger",
    "deepseek_ocr2": "multi_modal_projector",
    "deepseek_vl": "aligner",
    "deepseek_vl_hybrid": "aligner",
    "dots3_note": "vision_tower.merger",
    "ernie4_5_vl_moe": "resampler_model",
    "exaone4_5": "visual.merger",
    "fast_vlm": "multi_modal_projector",
    "gemma3": "multi_modal_projector",
    "gemma3n": "embed_vision",
    "gemma4": "embed_vision",
    "gemma4_unified": "embed_vision.multimodal_embedder",
    "glm46v": "visual.merger",
    "glm4v": "visual.merger",
    "glm4v_moe": "visual.merger",
    "glm5_next": "visual.merger",
    "glm_ocr": "visual.merger",
    "glmga": "visual.merger",
    "got_ocr2": "multi_modal_projector",
    "granite_docling": "vision_model.connector",
    "hunyuan_vl": "vision_tower.patch_merger",
    "hyperclovax_vision_v2": "projector",
    "idefics2": "connector",
    "idefics3": "connector",
    "inkling2": "vision_tower.merger",
    "internvl": "multi_modal_projector",
    "janus": "aligner",
    "kimi_k25": "mm_projector",
    "lfm2_vl": "multi_modal_projector",
    "lfm3_vl": "multi_modal_projector",
    "lighton_ocr": "vision_projection",
    "llava": "multi_modal_projector",
    "llava_next": "multi_modal_projector",
    "llava_next_video": "multi_modal_projector",
    "llava_onevision": "multi_modal_projector",
    "minicpm_ocr": "merger",
    "minicpmv4_6": "merger",
    "minicpmv4_7": "merger",
    "minimax_m3_vl": "multi_modal_projector",
    "mistral3": "multi_modal_projector",
    "mistral_large4": "multi_modal_projector",
    "molmo2": "multi_modal_projector",
    "muse_glimmer": ("vision_adapter", "vision_projection", "perception_emb_norm"),
    "muse_spark": ("vision_adapter", "vision_projection", "perception_emb_norm"),
    "nemotron_h_omni": "multi_modal_projector",
    "ovis2": "visual_embeddings_table",
    "paddleocr_vl": "projector",
    "paligemma": "multi_modal_projector",
    "perception_lm": "multi_modal_projector",
    "pp_chart2table": "multi_modal_projector",
    "qianfan_ocr": "multi_modal_projector",
    "qwen2_5_omni_thinker": "visual.merger",
    "qwen2_5_vl": "visual.merger",
    "qwen2_vl": "visual.merger",
    "qwen3_5": "visual.merger",
    "qwen3_5_moe": "visual.merger",
    "qwen3_omni_moe_thinker": "visual.merger",
    "qwen3_vl": "visual.merger",
    "qwen3_vl_moe": "visual.merger",
    "qwen4_exp": "visual.merger",
    "smolvlm": "connector",
    "step3p7": "multi_modal_projector",
    "unlimited_ocr": "multi_modal_projector",
    "video_llama_3": "projector",
    "video_llava": "multi_modal_projector",
    "vipllava": "multi_modal_projector",
}

# Families that take their visual tokens as one tensor; the others take a list.
STACKED = frozenset(
    "aria aya_vision cohere2_vision deepseek_vl deepseek_vl_hybrid fast_vlm gemma3 gemma3n got_ocr2 internvl "
    "janus ovis2 paligemma perception_lm pp_chart2table qianfan_ocr video_llava vipllava".split()
)

# Families that besides add features of the picture to the hidden states of their first layers.
DEEPSTACK = frozenset({"cohere_compass", "cosmos3_omni", "granite_docling", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe"})

# Families whose processors put the pictures of one sample on an axis of their own, [1, k, C, H, W].
NESTED = frozenset({"idefics2", "idefics3", "smolvlm"})

# Families that lay the patches of all pictures side by side, [1, C, patch, W].
WIDE = frozenset({"minicpm_ocr", "minicpmv4_6", "minicpmv4_7"})

# Families whose processors treat a picture by how many others its sample has, and so want to know which belong together.
GROUPED = frozenset({"llava_onevision"})

# Families whose attention depends on where a token stands, not only on how far from others: padding must not count.
ABSOLUTE = frozenset({"mistral_large4"})

# Inputs that point into another: indices of patches, counted over all pictures of one call of the processor.
INDEXED = {"molmo2": {"image_token_pooling": "pixel_values"}}

# Families that ask for `token_type_ids`, and the positions (of TowerInputs) that are of type 1: Gemma 3 lets the tokens of
# one picture see each other, PaliGemma everything before the answer.
TOKEN_TYPES = {"gemma3": "visual", "paligemma": "answer"}

# Inputs that say how a picture lies in patches: tokens are placed by them, beside ids and masks.
GRIDS = frozenset({"image_grid_thw", "video_grid_thw", "target_sizes"})

# Families that ask for further marks: argument -> the tokens (names in the configuration) that are of type 1.
TOKEN_MARKS: dict[str, dict[str, tuple[str, ...]]] = {
    "ernie4_5_vl_moe": {"moe_mm_token_type_ids": ("image_token_id", "image_start_token_id", "image_end_token_id")}
}

# Names that projectors give to the side of the square of patches that they put into one token.
SHUFFLE_NAMES = ("scale_factor", "downsample_factor", "factor", "spatial_merge_size", "spatial_conv_size")

# Names under which families keep their vision encoder and language model below the base model.
VISION_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower", "embed_vision")
LANGUAGE_NAMES = ("language_model", "text_model")


def child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of `names` that is a direct child of `module`, or None."""
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)
