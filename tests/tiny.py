"""Random towers, tokenizers and samples that are made in well under a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.registry import registry
from mmkd.terms.term import Place, Schedule, Term
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer
from mmkd.towers.tower import Tower

WORDS = ("red", "green", "blue", "round", "square", "left of", "right of", "A", "B", "C")
_DEPTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES = {**_DEPTH, "intermediate_size": 32}
_SQUARE = {"image_size": 16, "patch_size": 8}

# What `vision=` of `tiny_tower` may name, as the `config` of a VisionSpec for pictures of 16 x 16 pixels.
VISIONS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", **_SIZES, **_SQUARE},
    "siglip": {"model_type": "siglip_vision_model", **_SIZES, **_SQUARE, "vision_use_head": False},
    "vit": {"model_type": "vit", **_SIZES, **_SQUARE},
    "dinov2": {"model_type": "dinov2", **_DEPTH, **_SQUARE, "mlp_ratio": 2},
}


def tiny_tokenizer(vocab_size: int = 300) -> Any:
    """A byte-level tokenizer with the turn markers of the "simple" chat template."""
    return train_tokenizer(WORDS, vocab_size)


def language_config(kind: str = "llama", width: int = 16, layers: int = 2, **changes: Any) -> dict[str, Any]:
    """A language model's configuration with two heads."""
    config = {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": width // 2,
        "max_position_embeddings": 512,
        # Far from zero: at the usual 0.02 every logit of so narrow a model is nearly the same.
        "initializer_range": 0.5,
    }
    return config | changes


def tiny_tower(
    seed: int = 0,
    width: int = 16,
    layers: int = 2,
    vision: str | dict[str, Any] = "vit",
    tokenizer: Any = None,
    language: str | dict[str, Any] = "llama",
    **options: Any,
) -> Tower:
    """A LLaVA with random weights for pictures of 16 x 16 pixels (four visual tokens).

    vision: a name of VISIONS or the `config` of a VisionSpec.  language: a model_type or a whole configuration.
    options: further arguments of `assemble`, and `image_size`, `feature_layer` and `chat_template` of the specs.
    """
    config = VISIONS[vision] if isinstance(vision, str) else vision
    spec = {name: options.pop(name) for name in ("image_size", "feature_layer") if name in options}
    text = {"chat_template": options.pop("chat_template")} if "chat_template" in options else {}
    return assemble(
        VisionSpec(config=config, **({"image_size": (16, 16)} | spec)),
        LanguageSpec(config=language_config(language, width, layers) if isinstance(language, str) else language, **text),
        tokenizer=tiny_tokenizer() if tokenizer is None else tokenizer,
        seed=seed,
        **options,
    )


def tiny_picture(folder: Path, name: str, seed: int, size: tuple[int, int] = (20, 16)) -> ImageRef:
    """A PNG of random colours, `size` = (width, height) pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / name)
    return ImageRef.inside(folder, name)


def tiny_samples(
    folder: Path,
    n: int = 4,
    seed: int = 0,
    *,
    text_only: int = 0,
    two_images: int = 0,
    sizes: Sequence[tuple[int, int]] = ((20, 16), (16, 24)),
) -> list[Sample]:
    """`n` samples with one picture each, then `two_images` with two and `text_only` with none.

    Pictures take the `sizes` (width, height) in turn; questions and answers differ in length.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for number, pictures in enumerate([1] * n + [2] * two_images + [0] * text_only):
        refs = tuple(
            tiny_picture(folder, f"{seed}_{number}_{i}.png", 1000 * seed + 10 * number + i, sizes[(number + i) % len(sizes)])
            for i in range(pictures)
        )
        question = " ".join(rng.choice(WORDS, size=2 + number % 4))
        answer = " ".join(rng.choice(WORDS, size=1 + number % 3))
        samples.append(Sample(f"s{number}", refs, (Turn("user", question, pictures), Turn("assistant", answer))))
    return samples


def make_term(
    name: str, kind: str, weight: Schedule, positions: str = "response", path: str = "student", bridge: bool = False,
    options: Sequence[tuple[str, Any]] = (), reduction: str = "mean", teacher: str | None = None,
) -> Term:  # fmt: skip
    """A term as a recipe makes it."""
    place = Place(name, kind, weight, positions, path, bridge, reduction, teacher)
    return registry("terms").get(kind)(**dict(options), place=place)


def the_teacher(recipe: Any) -> Any:
    """The only teacher of a recipe, opened as a run opens it."""
    from mmkd.runs.towers import load_teachers

    (teacher,) = load_teachers(recipe).values()
    return teacher


def tiny_trainer(folder: Path, towers: tuple[Tower, Tower], *, steps: int = 4, **optimiser: Any) -> Any:
    """The trainer of a stage on 8 samples: cross-entropy and forward KL, two micro-batches of 2, a checkpoint every 2 steps."""
    from transformers import TrainingArguments

    from mmkd.train.collate import PairDataset
    from mmkd.train.distiller import Distiller
    from mmkd.train.finite import Where
    from mmkd.train.spec import StageSpec
    from mmkd.train.trainer import DistillTrainer

    student, teacher = towers
    kinds = ("cross_entropy", "forward_kl")
    terms = [make_term(kind, kind, Schedule(1.0, 1.0)) for kind in kinds]
    dataset = PairDataset(tiny_samples(folder / "pictures", 8), student, teacher, terms)
    stage = StageSpec(
        data=[{"format": "jsonl"}], terms=dict.fromkeys(kinds, 1), steps=steps, save_every=2, log_every=4,
        optimiser={"batch_size": 4, **optimiser},
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "stages"), run_name="sft", per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=steps, save_steps=2, logging_steps=4, remove_unused_columns=False, report_to=[], use_cpu=True,
        logging_nan_inf_filter=False, learning_rate=stage.optimiser.learning_rate, disable_tqdm=True,
    )  # fmt: skip
    distiller = Distiller(student, teacher, terms)
    return DistillTrainer(distiller, dataset, stage, arguments, folder / "log.jsonl", where=Where(folder, "student", "sft"))


# ---- families of transformers, built without a network ---------------------------------------------------------------

_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = {**_SIZES, "num_key_value_heads": 2, "initializer_range": 0.5}
_VISION = {**_SIZES, "image_size": 16}


def _family_tokenizer(*tokens: str) -> Any:
    tokenizer = tiny_tokenizer()
    turns = ["<|system|>", "<|user|>", "<|assistant|>", "<image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*turns, *tokens]})
    return tokenizer


def _text_config(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**_TEXT, **ids, "vocab_size": len(tokenizer), **changes}


def _qwen2_5_vl() -> Tower:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _family_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=rope, tie_word_embeddings=True),
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
            "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=256, max_pixels=1024),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace("END", "<|end|>"),
    )
    return Tower(Qwen2_5_VLForConditionalGeneration(config), processor)


def _idefics3() -> Tower:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor

    tokenizer = _family_tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    config = Idefics3Config(
        text_config=_text_config(tokenizer, model_type="llama"),
        vision_config={**_VISION, "patch_size": 4},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    edge = {"longest_edge": 16}
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>").replace("END", "<end_of_utterance>"),
    )
    return Tower(Idefics3ForConditionalGeneration(config), processor)


def _paligemma() -> Tower:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = _family_tokenizer("<bos>")
    tokenizer.bos_token = "<bos>"
    images = SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=_TEMPLATE.replace("IMAGE", "<image>").replace("END", "")
    )
    config = PaliGemmaConfig(
        text_config=_text_config(tokenizer, model_type="gemma", head_dim=8, vocab_size=len(tokenizer)),
        vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=16,
        hidden_size=16,
    )
    return Tower(PaliGemmaForConditionalGeneration(config), processor)


FAMILIES = {"qwen2_5_vl": _qwen2_5_vl, "idefics3": _idefics3, "paligemma": _paligemma}


def tiny_family(name: str, seed: int = 0) -> Tower:
    """A tower of a family that transformers knows (a name of FAMILIES), with random weights and its own processor."""
    torch.manual_seed(seed)
    return FAMILIES[name]()


def tiny_stage(
    student: Tower, teacher: Any, samples: Sequence[Sample], terms: dict[str, Any], answers: dict[str, Any] | None = None, *,
    steps: int = 4, **keys: Any,
) -> Any:  # fmt: skip
    """A stage as a run puts it together. keys: further keys of the stage."""
    from mmkd.train.build_stage import build_stage
    from mmkd.train.spec import StageSpec, TrainSpec

    chosen = {} if answers is None else {"answers": answers}
    optimiser = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2} | keys.pop("optimiser", {})
    keys = {"save_every": 2, "log_every": 2} | keys | chosen
    spec = StageSpec(data=[{"format": "jsonl"}], terms=terms, steps=steps, optimiser=optimiser, **keys)
    return build_stage("only", spec, TrainSpec(), student, teacher, samples)


def tiny_stage_trainer(folder: Path, stage: Any, seed: int = 0) -> Any:
    """The trainer of `tiny_stage`, as a run makes it."""
    from transformers import set_seed

    from mmkd.train.trainer import DistillTrainer, training_arguments

    arguments = training_arguments(stage.spec, "only", folder / "stages", seed, 1)
    arguments.disable_tqdm = True
    set_seed(seed)
    return DistillTrainer(
        stage.distiller, stage.dataset, stage.spec, arguments, folder / "log.jsonl", stage.collator, answers=stage.answers
    )


def weights_of(tower: Tower) -> dict[str, torch.Tensor]:
    """Copies of a tower's weights."""
    return {name: tensor.detach().clone() for name, tensor in tower.model.state_dict().items()}
