"""Small recipes in the shape of large ones: the methods' terms and what they train, towers and pictures with realistic shares."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmkd.testing.tiny_families import tiny_family
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer
from mmkd.towers.tower import Tower

_DBILD = {"kind": "dbild", "temperature": 3.0, "window": 64, "min_k": 4}
TERMS = {
    "llava_kd": {"cross_entropy": 1, "said": {"kind": "forward_kl"}, "seen": {"kind": "forward_kl", "positions": "visual"},
                 "rdist": {"kind": "relation", "weight": 0.5}},
    "switch_kd": {"cross_entropy": 1, "align": _DBILD, "vsd": {**_DBILD, "path": "switch", "bridge": True}},
    "qwen2_5_vl": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}},
}  # fmt: skip
TRAINED = {"switch_kd": ["vision", "projector", "language"]}  # the others: projector and language model
VOCABULARY = 3000


def shaped(folder: Path, name: str, count: int = 40, batch: int = 8) -> tuple[str, list[str]]:
    """Writes data, towers and recipe; gives the recipe's path and no overrides. Pictures of Qwen2.5-VL have different sizes."""
    words = _words()
    sizes = [(112, 112)] if name != "qwen2_5_vl" else [(224, 224), (224, 160), (320, 128), (128, 128)]
    data = folder / "data"
    data.mkdir(parents=True)
    draw, rows = random.Random(0), []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
        question, answer = (" ".join(draw.choices(words, k=draw.randint(least, most))) for least, most in ((4, 20), (2, 30)))
        rows.append({"id": str(number), "question": question, "answer": answer, "image": f"{number}.png"})
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for role, (width, layers) in {"teacher": (256, 6), "student": (128, 3)}.items():
        (_qwen if name == "qwen2_5_vl" else _llava)(width, layers, words).save(folder / role)
    stage: dict[str, Any] = {
        "data": [{"format": "jsonl", "root": str(data), "prompt": "plain"}], "steps": 1, "terms": TERMS[name],
        "train": TRAINED.get(name, ["projector", "language"]), "group_by_length": True,
        "optimiser": {"batch_size": batch, "learning_rate": 1e-4},
    }  # fmt: skip
    content = {
        "title": name, "output": "OUTPUT", "max_length": 1024, "teacher": {"model": str(folder / "teacher")}, "control": False,
        "student": {"model": str(folder / "student")}, "stages": {"answer": stage}, "evaluation": {"benchmarks": []},
        "guards": {"teacher_is_better": False, "pixels_matter": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return str(folder / "recipe.yaml"), []


def _words() -> list[str]:
    """Words without meaning, enough for a vocabulary of thousands."""
    draw = random.Random(1)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(4000)]


def _language(width: int, layers: int) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32, "max_position_embeddings": 2048}  # fmt: skip


def _llava(width: int, layers: int, words: list[str]) -> Tower:
    vision = {"model_type": "clip_vision_model", "hidden_size": width // 2, "intermediate_size": 2 * width, "image_size": 112,
              "num_hidden_layers": layers, "num_attention_heads": width // 64, "patch_size": 8}  # fmt: skip
    language = {"model_type": "llama", **_language(width, layers)}
    eyes = VisionSpec(config=vision, image_size=(112, 112))
    return assemble(eyes, LanguageSpec(config=language), tokenizer=train_tokenizer(words, VOCABULARY), seed=layers)


def _qwen(width: int, layers: int, words: list[str]) -> Tower:
    """Qwen2.5-VL with windows of 4 x 4 merged patches; a vocabulary of its tokenizer's few hundred, padded to thousands."""
    import torch
    from transformers import AutoModelForImageTextToText

    tower = tiny_family("qwen2_5_vl")
    config = tower.model.config
    text, vision = config.text_config, config.vision_config
    for key, value in _language(width, layers).items():
        setattr(text, key, value)
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 4, 4]}
    text.layer_types, text.vocab_size, text.head_dim = ["full_attention"] * layers, VOCABULARY, 32
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = layers, width // 2, width, width // 64
    vision.out_hidden_size, vision.window_size, vision.fullatt_block_indexes = width, 64, [layers - 1]
    torch.manual_seed(layers)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for key, value in tower.model.generation_config.to_dict().items():
        if key.endswith("token_id"):
            setattr(model.generation_config, key, value)
    pictures = tower.processor.image_processor
    pictures.size = {"shortest_edge": 64 * 64, "longest_edge": 320 * 320}
    return Tower(model, tower.processor, max_length=1024)
