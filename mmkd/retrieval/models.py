"""Models as recipes describe them: the dual encoder that is taught, and the cross-encoder that teaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmkd.errors import TowerError
from mmkd.retrieval.assemble import TextSpec, assemble_dual, text_defaults
from mmkd.retrieval.cross_encoders import CrossEncoder, FusionEncoder, ItmEncoder, MatchingEncoder, PromptedTower, load_matching
from mmkd.retrieval.dual_encoders import DualEncoder, TransformersDual, load_dual
from mmkd.retrieval.recipe import CrossSpec, CrossTeacherSpec, DualSpec, DualStudentSpec, FusionSpec, MatchingSpec
from mmkd.retrieval.text_tokenizer import train_text_tokenizer
from mmkd.towers.assemble import VisionSpec
from mmkd.towers.loading import device_of_process, dtype_of
from mmkd.towers.tower import Tower


def build_dual(spec: DualStudentSpec, texts: Sequence[str], seed: int) -> DualEncoder:
    """The student before training, on this process's device. `texts`: the captions. Raises TowerError."""
    if spec.model is not None:
        model = load_dual(spec.model, dtype="float32", seed=seed, trust_remote_code=spec.trust_remote_code)
    else:
        model = assemble_from(spec.assemble, texts, seed)
    return model.to(device_of_process())


def assemble_from(spec: DualSpec, texts: Sequence[str], seed: int) -> TransformersDual:
    """A recipe's `assemble`, its tokenizer trained on `texts` where its text encoder starts from random weights."""
    size, text = spec.vision.image_size, spec.text
    vision = {k: v for k, v in spec.vision.model_dump(exclude={"image_size"}).items() if v is not None}
    tokenizer = None if text.vocab_size is None else train_text_tokenizer(texts, text.vocab_size, words=text.tokenizer == "words")
    return assemble_dual(
        VisionSpec(**vision, image_size=(size, size) if isinstance(size, int) else size),
        TextSpec(text.source, text.config, text.pooling, text.frozen),
        embedding=spec.embedding,
        tokenizer=tokenizer,
        seed=seed,
    )


def load_cross_teacher(spec: CrossTeacherSpec) -> CrossEncoder:
    """The frozen teacher of a recipe, on this process's device. Raises TowerError."""
    if spec.kind == "itm":
        teacher: CrossEncoder = load_matching(spec.model, dtype_of(spec.dtype))
    else:
        options = {"trust_remote_code": spec.trust_remote_code, "device": device_of_process()}
        tower = Tower.load(spec.model, dtype=dtype_of(spec.dtype), **options)
        teacher = PromptedTower(tower, **spec.prompt())
    teacher.model.to(device_of_process())
    return teacher.freeze()


def build_matching(spec: MatchingSpec, texts: Sequence[str], seed: int) -> MatchingEncoder:
    """The cross-encoder that a matching recipe trains, on this process's device. `texts`: the captions. Raises TowerError."""
    if spec.model is not None:
        encoder = load_matching(spec.model, torch.float32)
    elif spec.config is not None:
        encoder = build_cross_encoder(spec.config, texts, seed)
    else:
        encoder = build_fusion(spec.fuse, texts, seed)
    encoder.model.to(device_of_process())
    return encoder


def build_cross_encoder(spec: CrossSpec, texts: Sequence[str], seed: int) -> ItmEncoder:
    """A BLIP with random weights drawn from `seed`, its tokenizer trained on `texts`. Raises TowerError."""
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

    tokenizer = train_text_tokenizer(texts, spec.vocab_size)
    # BLIP's own range for vision weights, 1e-10, is meant for weights that are loaded over it.
    vision = {"initializer_range": 0.02} | spec.vision
    try:
        config = BlipConfig(
            vision_config=vision,
            text_config=text_defaults(tokenizer) | {"sep_token_id": tokenizer.eos_token_id} | spec.text,
            image_text_hidden_size=spec.embedding,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BlipForImageTextRetrieval(config)
    except (TypeError, ValueError) as error:
        raise TowerError(f"model.config makes no BLIP: {error}") from error
    side = config.vision_config.image_size
    pictures = BlipImageProcessor(size={"height": side, "width": side})
    return ItmEncoder(model, BlipProcessor(pictures, tokenizer))


def build_fusion(spec: FusionSpec, texts: Sequence[str], seed: int) -> FusionEncoder:
    """Cross-attention over the parts of a dual encoder, random weights drawn from `seed`. Raises TowerError."""
    from mmkd.retrieval.fusion import FusionConfig, FusionModel  # registers its configuration with transformers

    dual = assemble_from(spec, texts, seed)
    if spec.embedding % spec.heads:
        raise TowerError(f"embedding {spec.embedding} does not divide over {spec.heads} heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FusionModel(FusionConfig(dual.model.config, heads=spec.heads, dropout=spec.dropout), dual.model)
    return FusionEncoder(model, dual.processor)
