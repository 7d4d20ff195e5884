"""Tiny models of a size that vLLM's build for CPUs can run: heads of 32 numbers."""

from pathlib import Path

import numpy as np
import torch
from tiny import WORDS, tiny_picture
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mmkd.data.samples import Sample, Turn
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer
from mmkd.towers.tower import Tower

TOKENS = 320
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def assembled(
    kind: str, encoder: str = "siglip_vision_model", seed: int = 1, image_size: int = 32, template: str = "simple", **changes
) -> Tower:
    """An encoder and a language model with random weights; 16 visual tokens at 32 x 32. changes: of the language model."""
    vision = {"model_type": encoder, **VISION, "image_size": image_size, "patch_size": 8}
    vision |= {"vision_use_head": False} if encoder.startswith("siglip") else {}
    language = {"model_type": kind, **TEXT, "head_dim": 32, "max_position_embeddings": 1024} | changes
    tower = assemble(
        VisionSpec(config=vision, image_size=(image_size, image_size)), LanguageSpec(config=language, chat_template=template),
        tokenizer=train_tokenizer(WORDS, TOKENS), seed=0,
    )  # fmt: skip
    return drawn(tower, seed)


def llava(seed: int = 1, image_size: int = 32, template: str = "simple") -> Tower:
    return assembled("qwen2", "clip_vision_model", seed, image_size, template)


def qwen2_5_vl(seed: int = 1, max_pixels: int = 4096) -> Tower:
    """Qwen2.5-VL with random weights; as many visual tokens as its pictures have 16 x 16 squares."""
    tokenizer = train_tokenizer(WORDS, TOKENS)
    pictures = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", *pictures]})
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    token = tokenizer.convert_tokens_to_ids
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = {**TEXT, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 1024, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8}
    config = Qwen2_5_VLConfig(
        text_config=text | {"tie_word_embeddings": True}, tie_word_embeddings=True,
        vision_config=vision | {"spatial_merge_size": 2, "window_size": 32, "fullatt_block_indexes": [1]},
        **{f"{name}_token_id": token(f"<|{text}|>") for name, text in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))},
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=1024, max_pixels=max_pixels),
        tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(patch_size=8, merge_size=2), chat_template=TEMPLATE,
    )  # fmt: skip
    return drawn(Tower(model, processor), seed)


@torch.no_grad()
def drawn(tower: Tower, seed: int) -> Tower:
    """Weights that are the same wherever NumPy's generator is."""
    rng = np.random.default_rng(seed)
    for _, parameter in sorted(tower.model.named_parameters()):
        if parameter.dim() > 1:
            values = rng.standard_normal(parameter.shape) * parameter[0].numel() ** -0.5
            parameter.copy_(torch.from_numpy(values))
    return tower


def saved(tower: Tower, folder: Path) -> Path:
    """The folder of a model."""
    tower.save(folder)
    return folder


MODELS = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}


def mixed_samples(folder: Path, n: int = 12) -> list[Sample]:
    """In turn samples with one picture, none, two, and one behind the words; answers of one to five words."""
    rng, found = np.random.default_rng(7), []
    for number in range(n):
        count = (1, 0, 2, 1)[number % 4]
        sizes = ((40, 24), (32, 32), (24, 56))
        pictures = tuple(tiny_picture(folder, f"{number}_{i}.png", 100 + 10 * number + i, sizes[(number + i) % 3])
                         for i in range(count))  # fmt: skip
        question, answer = (" ".join(rng.choice(WORDS, size=size)) for size in (2 + number % 4, 1 + number % 5))
        turn = Turn("user", question, count)
        found.append(Sample(f"s{number}", pictures, (turn, Turn("assistant", answer))))
    return found
