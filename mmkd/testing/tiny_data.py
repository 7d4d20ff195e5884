"""What single families need beyond the rules to become tiny (`tiny_rules.py`). Data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmkd.testing.tiny_rules import ENCODER_WIDTH, PATCH, PICTURE, PINPOINTS, WIDTH


@dataclass(frozen=True)
class Tiny:
    """What one family needs beyond the rules.

    begin: what its chat template begins with.  image: what it writes for a picture.
    tokens: special tokens by the names that configuration and processor know them by.  more_tokens: those without a name.
    unnamed: of `tokens`, those that the tokenizer does not know by their names.  mapped: tokens that stand for pictures, which
    the configuration's `vocabulary_map` names beside `tokens`.
    start: changes to the default configuration before it is shrunk.  config: after it.
    processor, image_processor, video_processor: arguments of these classes.  images_kwargs: of the processor's every call.
    parts: other members of a processor, name -> (class, arguments).
    """

    begin: str = ""
    image: str = "<image>"
    tokens: dict[str, str] = field(default_factory=lambda: {"image_token": "<image>"})
    more_tokens: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    start: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] = field(default_factory=dict)
    video_processor: dict[str, Any] = field(default_factory=dict)
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    processor_class: str | None = None
    image_processor_class: str | None = None
    video_processor_class: str | None = None
    parts: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_HYBRID = ["linear_attention", "full_attention"]
_OMNI = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "tokens": {
        "image_token": "<|IMAGE|>",
        "video_token": "<|VIDEO|>",
        "audio_token": "<|AUDIO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "vision_start_token": "<|vision_bos|>",
        "vision_end_token": "<|vision_eos|>",
    },
    "start": {"vision_start_token_id": 0, "text_config": {"rope_parameters": _MROPE}},
    "image_processor_class": "Qwen2VLImageProcessor",
    "video_processor_class": "Qwen2VLVideoProcessor",
    "parts": {"feature_extractor": ("WhisperFeatureExtractor", {})},
}
_VQ = {"channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "latent_channels": 16, "embed_dim": 16}  # 8 pixels a token
_QFORMER = {
    "tokens": {"image_token": "<image>"},
    "unnamed": ("image_token",),
    "config": {"num_query_tokens": 4, "qformer_config": {"encoder_hidden_size": ENCODER_WIDTH, "cross_attention_frequency": 1}},
    "processor": {"num_query_tokens": 4},
}
_VIDEO = {"image_token": "<image>", "video_token": "<video>"}
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_GLM_TOKENS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
_GEMMA_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "bos_token": "<bos>",
}
_AUDIO_TOKENS = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
_MINICPM_TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "image_start_token": "<image_start>",
    "image_end_token": "<image_end>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
_SAM = {"patch_size": 16, "downsample_channels": [16, ENCODER_WIDTH]}  # their processors count tokens by this patch
# 256 visual tokens is what their processor writes, whatever the picture: a side of 512 pixels, patches of 8, merged by 4.
_GOT = {
    "image": "<img><imgpad></img>",
    "tokens": {"image_token": "<imgpad>"},
    "more_tokens": ("<img>", "</img>"),
    "config": {"vision_config": {"image_size": 512}},
}
_MUSE = {
    "image": "<|image_start|><|patch|><|image_end|>",
    "tokens": {"image_token": "<|patch|>", "audio_token": "<|audio|>"},
    "more_tokens": (
        *("<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_start|>", "<|vid_end|>", "<|vid_frame_separator|>"),
        *("<|soft_audio_start|>", "<|soft_audio_end|>"),
    ),
}
_PIXTRAL_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "image_token": "<IMG_CONTEXT>",
}


def _qwen(**changes: Any) -> Tiny:
    return Tiny(**({"image": _QWEN, "tokens": _QWEN_TOKENS} | changes))


def _glm(**changes: Any) -> Tiny:
    return Tiny(**({"image": "<|begin_of_image|><|image|><|end_of_image|>", "tokens": _GLM_TOKENS} | changes))


def _gemma(**changes: Any) -> Tiny:
    return Tiny(**({"image": "<start_of_image>", "tokens": _GEMMA_TOKENS} | changes))


TINY: dict[str, Tiny] = {
    "blip": Tiny(image=""),
    "git": Tiny(image=""),
    "blip-2": Tiny(image="", **_QFORMER),
    "instructblip": Tiny(image="", **_QFORMER),
    "chameleon": Tiny(
        tokens={"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
        mapped=tuple("IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(number)) + "Z" for number in range(64)),
        processor={"image_seq_length": 16},
        config={"vq_config": {"resolution": PICTURE, **_VQ}},
    ),
    "emu3": Tiny(
        tokens={
            "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>", "bos_token": "<bos>",
        },
        mapped=("<|extra_200|>", *(f"<|visual token {number:06}|>" for number in range(64))),
        config={"vq_config": {"codebook_size": 64, "hidden_size": WIDTH, **_VQ}},
    ),
    "florence2": Tiny(
        image="",
        tokens={"image_token": "<image>", "bos_token": "<bos>"},
        config={
            "vision_config": {
                "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
                "embed_dim": [8, 16], "num_heads": [1, 2], "num_groups": [1, 2], "depths": [1, 1], "window_size": 2,
                "projection_dim": WIDTH,
            },
            "text_config": {"vocab_size": 400},
        },
        image_processor={"image_seq_length": 17},
    ),
    "granite4_vision": Tiny(
        config={
            "image_grid_pinpoints": PINPOINTS, "deepstack_layer_map": [[-1, 0], [0, 1]], "spatial_target_layers": [0, 0, 1, 1],
            "vision_config": {"hidden_size": 64}, "downsample_rate": "1/2",
        },
        processor={"downsample_rate": "1/2"},
    ),
    "idefics": Tiny(more_tokens=("<fake_token_around_image>", "<end_of_utterance>")),
    "kosmos-2": Tiny(
        image="", processor_class="Kosmos2Processor", processor={"num_patch_index_tokens": 4},
        config={"text_config": {"vocab_size": 400}, "latent_query_num": 64},
    ),
    "kosmos-2.5": Tiny(
        image="", processor_class="Kosmos2_5Processor", processor={"num_image_tokens": 16},
        images_kwargs={"max_patches": 64},
        config={"latent_query_num": 16, "vision_config": {"patch_embed_hidden_size": 3 * PATCH**2}},
        tokens={"image_token": "<s>", "boi_token": "<image>", "eoi_token": "</image>", "bos_token": "<bos>"},
    ),
    "llama4": Tiny(
        image="<|image|>", tokens={"image_token": "<|patch|>"}, unnamed=("image_token",),
        more_tokens=("<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        config={
            "vision_config": {
                "intermediate_size": 4 * ENCODER_WIDTH, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH,
                "vision_output_dim": WIDTH,
            }
        },
    ),
    "mllama": Tiny(
        image="<|image|>",
        tokens={"image_token": "<|image|>", "bos_token": "<bos>"},
        config={
            "vision_config": {
                "intermediate_layers_indices": [0], "vision_output_dim": 2 * ENCODER_WIDTH, "num_global_layers": 1,
                "max_num_tiles": 4,
            },
            "text_config": {"cross_attention_layers": [1]},
        },
    ),
    "t5gemma2": _gemma(processor={"image_seq_length": 4}, config={"encoder": {"mm_tokens_per_image": 4}}),
    "inkling_mm_model": Tiny(
        config={"vision_config": {"patch_size": 40}}, parts={"feature_extractor": ("InklingFeatureExtractor", {})}
    ),
    "smolvlm": Tiny(
        more_tokens=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        processor={"image_seq_len": 4},
    ),
    "qwen2_vl": _qwen(start={"text_config": {"rope_parameters": _MROPE}}, config={"vision_config": {"hidden_size": WIDTH}}),
    "qwen2_5_vl": _qwen(start={"text_config": {"rope_parameters": _MROPE}}),
    "qwen3_vl": _qwen(start={"text_config": {"rope_parameters": _MROPE}}),
    "qwen3_vl_moe": _qwen(start={"text_config": {"rope_parameters": _MROPE}}, image_processor_class="Qwen2VLImageProcessor",
        video_processor_class="Qwen3VLVideoProcessor"),
    "qwen3_5": _qwen(start={"text_config": {"rope_parameters": _MROPE}}, config={"text_config": {"layer_types": _HYBRID}}),
    "qwen3_5_moe": _qwen(start={"text_config": {"rope_parameters": _MROPE}}, config={"text_config": {"layer_types": _HYBRID}}),
    "qwen4_exp": _qwen(
        start={"text_config": {"rope_parameters": _MROPE}},
        config={
            "text_config": {
                "layer_types": _HYBRID,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 512,
                "indexer_compress_ratio": 4,
            }
        },
    ),
    "cosmos3_edge": _qwen(config={"vision_config": {"num_patches": 16}}),
    "cosmos3_omni": _qwen(
        start={"text_config": {"rope_parameters": _MROPE}},
        processor_class="Qwen3VLProcessor",
        video_processor_class="Qwen3VLVideoProcessor",
    ),
    "exaone4_5": _qwen(),
    "glm46v": _glm(start={"text_config": {"rope_parameters": _MROPE}}),
    "glm4v": _glm(start={"text_config": {"rope_parameters": _MROPE}}),
    "glm4v_moe": _glm(
        start={"text_config": {"rope_parameters": _MROPE}},
        config={"text_config": {"head_dim": 16}},
        image_processor_class="Glm4vImageProcessor", video_processor_class="Glm4vVideoProcessor"),
    "glm5_next": _glm(config={
            "text_config": {
                "num_key_value_heads": 4,
                "qk_rope_head_dim": 0,
                "layer_types": ["linear_attention", "indexed_attention"],
            }
        }
    ),
    "glm_ocr": _glm(
        start={"text_config": {"rope_parameters": _MROPE}},
        processor_class="Glm46VProcessor",
        image_processor_class="Glm46VImageProcessor",
        video_processor_class="Glm46VVideoProcessor",
    ),
    "glmga": _glm(start={"text_config": {"rope_parameters": _MROPE}}, processor_class="Glm46VProcessor"),
    "hyperclovax_vision_v2": _qwen(),
    "lfm3_vl": _qwen(config={"text_config": {"layer_types": ["conv", "full_attention"]}}),
    "paddleocr_vl": Tiny(
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        more_tokens=("<|IMAGE_START|>", "<|IMAGE_END|>"),
        start={"text_config": {"rope_parameters": _MROPE}},
    ),
    "video_llama_3": Tiny(image="<|image_pad|>", tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "kimi_k25": Tiny(
        image="<|media_pad|>",
        tokens={"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        config={"projection_hidden_size": ENCODER_WIDTH, "text_config": {"num_key_value_heads": 4}},
    ),
    "cohere_compass": Tiny(
        image="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        tokens={
            "image_token": "<|IMAGE_PAD|>",
            "video_token": "<|VIDEO_PAD|>",
            "vision_start_token": "<|VISION_START|>",
            "vision_end_token": "<|VISION_END|>",
        },
        config={"text_config": {"rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}}},
    ),
    "inkling2": Tiny(image="<|unused_200054|>", tokens={"image_token": "<|unused_200054|>"}),
    "gemma3": _gemma(processor={"image_seq_length": 4}, config={"mm_tokens_per_image": 4}),
    "gemma3n": _gemma(
        image="<image_soft_token>",
        processor={"image_seq_length": 256},
        config={
            "text_config": {"num_kv_shared_layers": 0},
            "vision_config": {"architecture": "test_convnext", "hidden_size": 64, "model_args": {}},
        },
        image_processor={"size": {"height": 512, "width": 512}},
        tokens={**_GEMMA_TOKENS, **_AUDIO_TOKENS},
        parts={"feature_extractor": ("Gemma3nAudioFeatureExtractor", {})},
    ),
    "gemma4": _gemma(
        start={"vision_config": {"model_type": "gemma4_vision"}},
        image="<image_soft_token>",
        tokens={**_GEMMA_TOKENS, **_AUDIO_TOKENS},
        parts={"feature_extractor": ("Gemma4AudioFeatureExtractor", {})},
    ),
    "gemma4_unified": _gemma(
        start={"vision_config": {"model_type": "gemma4_unified_vision"}},
        image="<image_soft_token>",
        tokens={**_GEMMA_TOKENS, **_AUDIO_TOKENS},
        parts={"feature_extractor": ("Gemma4UnifiedAudioFeatureExtractor", {})},
    ),
    "aria": Tiny(
        config={"projector_patch_to_query_dict": {100: 4}, "vision_config": {"patch_size": 98, "image_size": 980}},
        processor={"size_conversion": {980: 4}},
    ),
    "aya_vision": Tiny(
        tokens={"image_token": "<|IMG_PATCH|>"},
        more_tokens=("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
        processor={"img_size": PICTURE, "patch_size": PATCH, "downsample_factor": 2},
    ),
    "cohere2_vision": Tiny(
        image="<|IMG_PATCH|>",
        tokens={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    "deepseek_vl_hybrid": Tiny(
        config={"high_res_vision_config": {"image_size": 64, "output_channels": 16, "global_attn_indexes": [1]}}
    ),
    "ernie4_5_vl_moe": Tiny(
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        tokens={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        video_processor={"draw_on_frames": False},
        start={"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}}},
        config={"text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": {"mrope_section": [1, 1, 2]}}},
    ),
    "got_ocr2": Tiny(**_GOT, image_processor={"size": {"height": 512, "width": 512}}),
    "pp_chart2table": Tiny(**{**_GOT, "image": "<img>" + 256 * "<imgpad>" + "</img>"}),
    "hunyuan_vl": Tiny(
        start={"text_config": {"head_dim": 8, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}}},
        config={"text_config": {"rope_parameters": {"mrope_section": [1, 1, 1, 1]}}},
        image="<img_start><image><img_end>",
        tokens={"image_token": "<image>", "image_start_token": "<img_start>", "image_end_token": "<img_end>"},
    ),
    "idefics2": Tiny(
        tokens={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
        more_tokens=("<end_of_utterance>",),
        config={"perceiver_config": {"resampler_n_latents": 4}},
        processor={"image_seq_len": 4},
    ),
    "idefics3": Tiny(
        more_tokens=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        processor={"image_seq_len": 4},
    ),
    "granite_docling": Tiny(
        more_tokens=("<fake_token_around_image>", "<global-img>"),
        processor={"image_seq_len": 1},
    ),
    "lfm2_vl": Tiny(more_tokens=("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")),
    "llava_next": Tiny(config={"image_grid_pinpoints": PINPOINTS}),
    "llava_next_video": Tiny(tokens=_VIDEO, config={"image_grid_pinpoints": PINPOINTS}),
    "llava_onevision": Tiny(
        tokens=_VIDEO,
        config={"image_grid_pinpoints": PINPOINTS},
        processor={"vision_feature_select_strategy": "full"},
    ),
    "vipllava": Tiny(config={"vision_feature_layers": [-2, 0]}),
    "video_llava": Tiny(tokens=_VIDEO),
    "perception_lm": Tiny(
        tokens=_VIDEO,
        config={
            "projector_pooling_ratio": 2,
            "vision_config": {
                "architecture": "vit_pe_core_large_patch14_336",
                "do_pooling": False,
                "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [32, 32], "patch_size": 8},
            },
        },
    ),
    "minicpm_ocr": Tiny(tokens=_MINICPM_TOKENS, config={"text_config": {"layer_types": _HYBRID}}),
    "minicpmv4_6": Tiny(tokens=_MINICPM_TOKENS, config={"text_config": {"layer_types": _HYBRID}}),
    "minicpmv4_7": Tiny(tokens=_MINICPM_TOKENS, config={"text_config": {"layer_types": _HYBRID}}),
    "minimax_m3_vl": Tiny(
        image="]<]image[>[",
        tokens={"image_token": "]<]image[>[", "video_token": "]<]video[>["},
        more_tokens=("]<]start of image[>[", "]<]end of image[>["),
    ),
    "molmo2": Tiny(
        image="<|image|>",
        begin="<bos>",
        tokens={"image_token": "<|image|>", "image_patch": "<im_patch>", "bos_token": "<bos>"},
        more_tokens=("<im_col>", "<im_start>", "<im_end>", "<low_res_im_start>", "<im_low>", "<|video|>"),
        config={
            "vision_config": {"image_size": [PICTURE, PICTURE], "num_position_embeddings": 16},
            "adapter_config": {"vision_feature_layer": [1, 0]},
        },
    ),
    "muse_glimmer": Tiny(**_MUSE, config={"out_hidden_size": 64}),
    "muse_spark": Tiny(
        **_MUSE,
        config={
            "out_hidden_size": 64,
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
        },
        parts={"feature_extractor": ("MuseSparkFeatureExtractor", {})},
    ),
    "nemotron_h_omni": Tiny(
        tokens=_VIDEO, parts={"feature_extractor": ("ParakeetFeatureExtractor", {})}, more_tokens=("<img>", "</img>")
    ),
    "ovis2": Tiny(
        tokens={"image_token": "<IMG_ATOM>"},
        more_tokens=("<image>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    ),
    "paligemma": Tiny(tokens={"image_token": "<image>", "bos_token": "<bos>"}, image_processor={"image_seq_length": 16}),
    "step3p7": Tiny(
        image="<im_patch>",
        tokens={"image_token": "<im_patch>"},
        more_tokens=("<im_start>", "<im_end>", "<patch_newline>"),
        config={"vision_config": {"image_size": 728, "patch_size": 14}, "text_config": {"sliding_window": 512}},
    ),
    "fast_vlm": Tiny(
        config={"vision_config": {"architecture": "fastvit_t8", "hidden_size": 768}},
        processor_class="LlavaProcessor",
        image_processor_class="CLIPImageProcessor",
        image_processor={"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        processor={"patch_size": 32, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
    ),
    "deepseek_ocr2": Tiny(
        config={
            "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
            "vision_config": {"sam_config": _SAM},
        },
        processor={"patch_size": 16},
    ),
    "unlimited_ocr": Tiny(config={"vision_config": {"sam_config": _SAM}}, processor={"patch_size": 16}),
    "janus": Tiny(
        image="<image>",
        tokens={"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        image_processor={"size": {"height": PICTURE, "width": PICTURE}, "min_size": PATCH},
    ),
    "dots3_note": Tiny(
        image="<|img|><|imgpad|><|endofimg|>",
        tokens={"image_token": "<|imgpad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_comp_pad|>"},
        more_tokens=("<|img|>", "<|endofimg|>"),
        config={
            "text_config": {"num_key_value_heads": 4},
            "vision_config": {"per_layer_config": {}},
            "audio_config": {"adapter_input_size": 16},
        },
        image_processor={"temporal_patch_size": 1},
        parts={"feature_extractor": ("Dots3NoteFeatureExtractor", {})},
        video_processor_class="Qwen3VLVideoProcessor",
    ),
    "qwen2_5_omni_thinker": Tiny(**_OMNI, processor_class="Qwen2_5OmniProcessor"),
    "qwen3_omni_moe_thinker": Tiny(**_OMNI, processor_class="Qwen3OmniMoeProcessor"),
    "mistral3": Tiny(image="[IMG]", tokens=_PIXTRAL_TOKENS),
    "mistral_large4": Tiny(image="[IMG]", tokens=_PIXTRAL_TOKENS, config={"text_config": {"num_key_value_heads": 4}}),
    "lighton_ocr": Tiny(image="[IMG]", tokens=_PIXTRAL_TOKENS),
    "internvl": Tiny(image="<IMG_CONTEXT>", tokens=_INTERNVL_TOKENS, processor={"image_seq_length": 4}),
    "qianfan_ocr": Tiny(image="<image>", tokens=_INTERNVL_TOKENS, processor={"image_seq_length": 4}),
}
