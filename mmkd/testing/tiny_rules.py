"""How the families of image-text models become tiny: rules on the names of keys, and small image processors. Data, not code."""

from __future__ import annotations

from typing import Any

WIDTH, ENCODER_WIDTH = 32, 16  # hidden width of language models and of vision encoders
PICTURE, PATCH = 32, 8  # sides in pixels: a picture is 4 x 4 patches

# Pattern of a key -> (its value in language models, its value in encoders). The first that matches holds.
RULES: dict[str, tuple[Any, Any]] = {
    r"out_hidden_size|text_hidden_size|projector_output_dim|adapter_out_dim": (WIDTH, WIDTH),
    r"hidden_size|d_model|embed_dim|width|dim|word_embed_proj_dim": (WIDTH, ENCODER_WIDTH),
    r"encoder_hidden_size|vision_hidden_size|adapter_in_dim": (ENCODER_WIDTH, ENCODER_WIDTH),
    r"projection_dim|projector_hidden_size|projection_hidden_size|projection_hidden_dim": (WIDTH, WIDTH),
    r".*moe.*intermediate_size|shared_expert\w*_intermediate_size": (16, 16),
    r"\w*intermediate_size\w*|mlp_dim|ffn_dim|d_ff|(en|de)coder_ffn_dim": (64, 32),
    r"num_hidden_layers|depth|num_layers|(en|de)coder_layers|n_layers|layers|num_decoder_layers": (2, 2),
    r"num_key_value_heads|swa_num_key_value_heads": (2, 2),
    r"\w*num_attention_heads|num_heads|n_heads|attention_heads|(en|de)coder_attention_heads": (4, 2),
    r"head_dim|swa_head_dim|global_head_dim": (8, 8),
    r"q_lora_rank|kv_lora_rank": (16, 16),
    r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim": (8, 8),
    r"qk_head_dim": (16, 16),
    r"n_routed_experts|num_experts|num_local_experts|moe_num_experts": (4, 4),
    r"num_experts_per_tok|moe_topk|moe_k": (2, 2),
    r"n_group|topk_group": (1, 1),
    r"first_k_dense_replace": (1, 1),
    r"max_position_embeddings": (1024, 1024),
    r"image_size": (PICTURE, PICTURE),
    r"patch_size": (PATCH, PATCH),
    r"num_position_embeddings": (64, 64),
    r"pooling_kernel_size": (2, 2),
    r"mamba_num_heads": (4, 4),
    r"mamba_head_dim|ssm_state_size": (8, 8),
    r"n_groups": (2, 2),
    r"chunk_size": (16, 16),
    r"base_channels": (32, 32),
    r"channel_multiplier": ([1, 1], [1, 1]),
    r"num_embeddings": (64, 64),
    r"insert_layer_id": (0, 0),
    r"hidden_size_per_layer_input": (8, 8),
    r"position_embedding_size": (128, 128),
    r"mm_embed_dim|output_proj_dims": (WIDTH, WIDTH),
    r"mrope_section": ([2, 1, 1], [2, 1, 1]),
    r"deepstack_visual_indexes": ([0, 1], [0, 1]),
    r"fullatt_block_indexes": ([1], [1]),
    r"window_size": (16, 16),
    r"linear_(key_|value_)?head_dim": (8, 8),
    r"linear_num_(key_|value_)?heads": (2, 2),
    r"index\w*_head_dim": (8, 8),
    r"index\w*_n_heads": (2, 2),
    r"final_logit_softcapping|attn_logit_softcapping": (30.0, 30.0),
}

# Lists with an entry a layer and the like: the configuration makes them anew from the small numbers.
DERIVED = frozenset(
    "layer_types mlp_layer_types no_rope_layers moe_layers per_layer_config id2label label2id indexer_types dtype torch_dtype "
    "architectures transformers_version layers_block_type activation_sparsity_pattern layer_rope_theta "
    "kv_source_layers max_window_layers full_attn_idxs rope_scaling_layers".split()
)

# Sub-configurations that describe language models.
TEXT_PARTS = frozenset({"text_config", "llm_config", "decoder", "language_config"})

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_SQUARE = {"size": {"height": PICTURE, "width": PICTURE}}
_CROPPED = {"size": {"shortest_edge": PICTURE}, "crop_size": {"height": PICTURE, "width": PICTURE}}
_SLICED = {"patch_size": PATCH, "scale_resolution": 64, "slice_mode": False}
_BY_AREA = {"patch_size": PATCH, "size": {"shortest_edge": 256, "longest_edge": 4096}}

# Image processor class -> arguments for small pictures.
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CROPPED,
    "LlavaImageProcessor": _CROPPED,
    "SiglipImageProcessor": _SQUARE,
    "BlipImageProcessor": _SQUARE,
    "Gemma3ImageProcessor": _SQUARE,
    "ChameleonImageProcessor": _CROPPED,
    "Emu3ImageProcessor": {"min_pixels": 1024, "max_pixels": 4096},
    "IdeficsImageProcessor": {"image_size": PICTURE},
    "Kosmos2_5ImageProcessor": {"max_patches": 64, "patch_size": {"height": PATCH, "width": PATCH}},
    "Llama4ImageProcessor": _SQUARE,
    "MllamaImageProcessor": _SQUARE,
    "GotOcr2ImageProcessor": {**_SQUARE, "crop_to_patches": False},
    "LlavaNextImageProcessor": {**_CROPPED, "image_grid_pinpoints": PINPOINTS},
    "LlavaOnevisionImageProcessor": {**_SQUARE, "image_grid_pinpoints": PINPOINTS},
    "PixtralImageProcessor": {"size": {"longest_edge": 64}, "patch_size": {"height": PATCH, "width": PATCH}},
    "Cohere2VisionImageProcessor": {**_SQUARE, "crop_to_patches": False, "patch_size": 2},
    "DeepseekVLImageProcessor": {**_SQUARE, "min_size": PATCH},
    "DeepseekVLHybridImageProcessor": {**_SQUARE, "min_size": PATCH, "high_res_size": {"height": 64, "width": 64}},
    "PPChart2TableImageProcessor": {"size": {"height": 512, "width": 512}},
    "GraniteDoclingImageProcessor": {**_SQUARE, "crop_to_patches": False},
    "Idefics2ImageProcessor": {"size": {"shortest_edge": 16, "longest_edge": PICTURE}, "do_image_splitting": False},
    "Idefics3ImageProcessor": {
        "size": {"longest_edge": PICTURE}, "max_image_size": {"longest_edge": PICTURE}, "do_image_splitting": False
    },
    "SmolVLMImageProcessor": {
        "size": {"longest_edge": PICTURE}, "max_image_size": {"longest_edge": PICTURE}, "do_image_splitting": False
    },
    "Lfm2VlImageProcessor": {
        **_SQUARE,
        "encoder_patch_size": PATCH,
        "tile_size": PICTURE,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
        "do_image_splitting": False,
    },
    "VideoLlavaImageProcessor": _CROPPED,
    "PerceptionLMImageProcessor": {"tile_size": PICTURE, "size": {"height": PICTURE, "width": PICTURE}, "max_num_tiles": 1},
    "MiniCPMOcrImageProcessor": _SLICED,
    "MiniCPMV4_6ImageProcessor": _SLICED,
    "MiniMaxM3VLImageProcessor": _BY_AREA,
    "Molmo2ImageProcessor": {**_SQUARE, "patch_size": PATCH, "max_crops": 1, "overlap_margins": [0, 0]},
    "MuseGlimmerImageProcessor": {"patch_size": PATCH, "max_image_tokens": 64},
    "Ovis2ImageProcessor": _SQUARE,
    "HunYuanVLImageProcessor": _BY_AREA,
    "Ernie4_5_VLMoeImageProcessor": _BY_AREA,
    "Gemma4ImageProcessor": {"patch_size": PATCH, "max_soft_tokens": 70, "pooling_kernel_size": 2},
    "Gemma4UnifiedImageProcessor": {"patch_size": PATCH, "max_soft_tokens": 70, "pooling_kernel_size": 2},
    "NemotronH_Omni_Reasoning_V3ImageProcessor": {"patch_size": PATCH, "min_num_patches": 16, "max_num_patches": 64},
    "Qwen2VLImageProcessor": _BY_AREA,
    "Cosmos3EdgeImageProcessor": _BY_AREA,
    "CohereCompassImageProcessor": _BY_AREA,
    "PaddleOCRVLImageProcessor": _BY_AREA,
    "VideoLlama3ImageProcessor": {"patch_size": PATCH, "size": {"shortest_edge": 256, "longest_edge": 4096}},
    "Kimi_K25ImageProcessor": {"patch_size": PATCH},
    "Inkling2ImageProcessor": {"size": {"height": 2 * PATCH, "width": 2 * PATCH}},
    "Glm4vImageProcessor": _BY_AREA,
    "Glm46VImageProcessor": _BY_AREA,
    "GlmgaImageProcessor": _BY_AREA,
    "Glm5NextImageProcessor": _BY_AREA,
}

# Argument of a processor's class -> its value where the class takes it and the family says nothing else.
PROCESSORS: dict[str, Any] = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_seq_length": 16,
    "num_image_tokens": 16,
    "spatial_merge_size": 2,
}
