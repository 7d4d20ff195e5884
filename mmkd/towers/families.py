"""What is particular to each family of image-text models. Data, not code.

Everything else about a family is asked of transformers: `get_image_features` gives the visual tokens,
`mm_encoder_outputs` takes them. Only the border between vision encoder and projector has no common name, and the
visual switch and vision-feature matching need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Family:
    """One family, by its `model_type`. The defaults describe most of them."""

    # Path of the projector below the base model (`LlavaModel`, `PaliGemmaModel`, ...), or the paths of modules that follow each
    # other. Its first input is the vision feature, its output the visual token. None: not known.
    projector: str | tuple[str, ...] | None = None

    # Visual tokens.
    stacked: bool = False  # takes them as one tensor; the others take a list
    deepstack: bool = False  # adds features of the picture to the hidden states of its first layers besides
    indicators: bool = False  # tokens between pictures are embeddings of the last entries of the projector's vocabulary

    # Pixels.
    nested: bool = False  # its processor puts the pictures of one sample on an axis of their own, [1, k, C, H, W]
    wide: bool = False  # lays the patches of all pictures side by side, [1, C, patch, W]
    grouped: bool = False  # treats a picture by how many others its sample has, and so wants to know which belong together
    # Inputs that point into another: indices of patches, counted over all pictures of one call of the processor.
    indexed: Mapping[str, str] = field(default_factory=dict)

    windows: bool = False  # its encoder's layers attend within windows of a picture

    # Positions.
    absolute: bool = False  # attention depends on where a token stands, not only on how far from others: padding must not count
    # The positions (of TowerInputs) that are of type 1 in `token_type_ids`: Gemma 3 lets the tokens of one picture see each
    # other, PaliGemma everything before the answer. None: it has no such input.
    token_types: str | None = None
    chat_template: str | None = None  # a name of `mmkd.towers.templates`, for models that are published without one
    # Models that can only be teachers of rows (see `mmkd.towers.tokenless`).
    tokenless: str = ""  # why a picture is no tokens of the text; "" where it is
    pictures: str = "any"  # how many of them a sample may have: "any", "some" (one at least), "one"
    head: str = ""  # path of the head below the model, where transformers does not tell it
    encoder_decoder: bool = False  # the prompt is read by an encoder, the answer by a decoder
    forbidden: str = ""  # path of the token ids, below the model, that its logits never allow
    generates: bool = True  # whether transformers' generation reads a prompt as the forward pass does
    # Inputs along the text -> what stands in them behind the prompt: a number, or None for their last entry.
    along: Mapping[str, int | None] = field(default_factory=dict)

    inner_projector: bool = False  # projects within its forward pass: what it takes are features of its encoder
    # Further marks: argument -> the tokens (names in the configuration) that are of type 1.
    token_marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def reads_ahead(self) -> bool:
        """Whether a token of the prompt sees what stands behind it in the prompt, so that no answer may stand there."""
        return self.token_types == "answered" or self.encoder_decoder


_LATENT = "pictures become latent queries within its forward pass"
_CROSS = "its text attends to the picture's features in cross-attention layers"
_DISCRETE = "pictures become discrete tokens by an argmax, through which no gradient reaches the encoder"
_ENCODER = "pictures are read by the encoder of an encoder-decoder model, and its decoder writes the text"

FAMILIES: dict[str, Family] = {
    "aria": Family("multi_modal_projector", stacked=True),
    "aya_vision": Family("multi_modal_projector", stacked=True),
    "blip": Family(tokenless=_CROSS, pictures="one", generates=False, head="text_decoder.cls.predictions.decoder"),
    "blip-2": Family(tokenless="a Q-Former stands between its encoder's features and the text", pictures="one"),
    "chameleon": Family(tokenless=_DISCRETE, forbidden="model.vocabulary_mapping.image_tokens"),
    "cohere2_vision": Family("multi_modal_projector", stacked=True),
    "cohere_compass": Family("visual.merger", deepstack=True),
    "cosmos3_edge": Family("projector"),
    "cosmos3_omni": Family("visual.merger", deepstack=True),
    "deepseek_ocr2": Family("multi_modal_projector"),
    "deepseek_vl": Family("aligner", stacked=True),
    "deepseek_vl_hybrid": Family("aligner", stacked=True),
    "dots3_note": Family("vision_tower.merger"),
    "emu3": Family(tokenless=_DISCRETE),
    "ernie4_5_vl_moe": Family(
        "resampler_model",
        token_marks={"moe_mm_token_type_ids": ("image_token_id", "image_start_token_id", "image_end_token_id")},
    ),
    "exaone4_5": Family("visual.merger"),
    "fast_vlm": Family("multi_modal_projector", stacked=True),
    "florence2": Family(tokenless=_ENCODER, encoder_decoder=True, pictures="one"),
    "gemma3": Family("multi_modal_projector", stacked=True, token_types="visual"),
    "gemma3n": Family("embed_vision", stacked=True),
    "gemma4": Family("embed_vision"),
    "gemma4_unified": Family("embed_vision.multimodal_embedder"),
    "git": Family(tokenless="the picture's features stand before the text, in no place of the prompt", pictures="one"),
    "glm46v": Family("visual.merger"),
    "glm4v": Family("visual.merger"),
    "glm4v_moe": Family("visual.merger"),
    "glm5_next": Family("visual.merger"),
    "glm_ocr": Family("visual.merger"),
    "glmga": Family("visual.merger"),
    "got_ocr2": Family("multi_modal_projector", stacked=True),
    "granite4_vision": Family(tokenless="pictures go into single layers of the language model only"),
    "granite_docling": Family("vision_model.connector", deepstack=True),
    "hunyuan_vl": Family("vision_tower.patch_merger"),
    "hyperclovax_vision_v2": Family("projector"),
    "idefics": Family(tokenless=_CROSS, grouped=True, pictures="some", along={"image_attention_mask": None}),
    "idefics2": Family("connector", nested=True),
    "idefics3": Family("connector", nested=True),
    "inkling2": Family("vision_tower.merger"),
    "inkling_mm_model": Family("vision_tower.final_norm", stacked=True),  # the place of its last layer is not always the same
    "instructblip": Family(tokenless="its Q-Former reads the question with the picture", pictures="one"),
    "internvl": Family("multi_modal_projector", stacked=True),
    "janus": Family("aligner", stacked=True),
    "kimi_k25": Family("mm_projector"),
    "kosmos-2": Family(tokenless=_LATENT, pictures="one", along={"image_embeds_position_mask": 0}),
    "kosmos-2.5": Family(tokenless=_LATENT, pictures="one", along={"image_embeds_position_mask": 0}),
    "lfm2_vl": Family("multi_modal_projector"),
    "lfm3_vl": Family("multi_modal_projector"),
    "lighton_ocr": Family("vision_projection"),
    "llama4": Family("multi_modal_projector", stacked=True, inner_projector=True),
    "llava": Family("multi_modal_projector"),
    "llava_next": Family("multi_modal_projector"),
    "llava_next_video": Family("multi_modal_projector"),
    "llava_onevision": Family("multi_modal_projector", grouped=True),
    "minicpm_ocr": Family("merger", wide=True),
    "minicpmv4_6": Family("merger", wide=True),
    "minicpmv4_7": Family("merger", wide=True),
    "minimax_m3_vl": Family("multi_modal_projector"),
    "mistral3": Family("multi_modal_projector"),
    "mistral_large4": Family("multi_modal_projector", absolute=True),
    "mllama": Family(tokenless=_CROSS, grouped=True, along={"cross_attention_mask": None}),
    "molmo2": Family("multi_modal_projector", indexed={"image_token_pooling": "pixel_values"}),
    "muse_glimmer": Family(("vision_adapter", "vision_projection", "perception_emb_norm")),
    "muse_spark": Family(("vision_adapter", "vision_projection", "perception_emb_norm")),
    "nemotron_h_omni": Family("multi_modal_projector"),
    "ovis2": Family("visual_embeddings_table", stacked=True, indicators=True),
    "paddleocr_vl": Family("projector"),
    "paligemma": Family("multi_modal_projector", stacked=True, token_types="answered", chat_template="paligemma"),
    "perception_lm": Family("multi_modal_projector", stacked=True),
    "pp_chart2table": Family("multi_modal_projector", stacked=True),
    "qianfan_ocr": Family("multi_modal_projector", stacked=True),
    "qwen2_5_omni_thinker": Family("visual.merger", windows=True),
    "qwen2_5_vl": Family("visual.merger", windows=True),
    "qwen2_vl": Family("visual.merger"),
    "qwen3_5": Family("visual.merger"),
    "qwen3_5_moe": Family("visual.merger"),
    "qwen3_omni_moe_thinker": Family("visual.merger", deepstack=True),
    "qwen3_vl": Family("visual.merger", deepstack=True),
    "qwen3_vl_moe": Family("visual.merger", deepstack=True),
    "qwen4_exp": Family("visual.merger"),
    "smolvlm": Family("connector", nested=True),
    "step3p7": Family("multi_modal_projector"),
    "t5gemma2": Family(tokenless=_ENCODER, encoder_decoder=True, grouped=True),
    "unlimited_ocr": Family("multi_modal_projector"),
    "video_llama_3": Family("projector"),
    "video_llava": Family("multi_modal_projector", stacked=True),
    "vipllava": Family("multi_modal_projector", stacked=True),
}

# Families that transformers counts among image-text models and that can be no tower, not even a teacher of rows, and why.
REFUSED: dict[str, str] = {
    "diffusion_gemma": "it denoises blocks of tokens and does not predict the next one",
    "evolla": "it reads proteins, not pictures",
    "fuyu": "its processor drops the first token of a text, so that what is asked cannot be written down",
    "instructblipvideo": "it reads videos, not pictures",
    "mistral4": "it is a language model alone, which reads no pictures; those with a vision encoder are mistral3",
    "pi0": "it gives the movements of a robot and no text",
    "pix2struct": "its question is drawn into the picture and no part of its text",
    "pp_formulanet": "it transcribes formulas and reads no question",
    "shieldgemma2": "its processor asks for a verdict by policies of its own in place of the prompt",
    "udop": "it wants the place of every word on the page, which OCR must find first",
    "vision-encoder-decoder": "its decoder begins with the picture alone and reads no question",
}

# Inputs that say how a picture lies in patches: tokens are placed by them, beside ids and masks.
GRIDS = frozenset({"image_grid_thw", "video_grid_thw", "target_sizes"})

# Names that projectors give to the side of the square of patches that they put into one token.
SHUFFLE_NAMES = ("scale_factor", "downsample_factor", "factor", "spatial_merge_size", "spatial_conv_size")

# Names under which families keep their vision encoder and language model below the base model.
VISION_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower", "embed_vision")
LANGUAGE_NAMES = ("language_model", "text_model")


def family_of(model_type: str) -> Family:
    """What is known of a family; of one that is not in the table, the defaults and no projector."""
    return FAMILIES.get(model_type, Family())


def child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of `names` that is a direct child of `module`, or None."""
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)
