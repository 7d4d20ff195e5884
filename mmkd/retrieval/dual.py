"""Dual encoders: a picture and a text become two unit vectors, whose product says how well they match.

Three sources behind one class: transformers' CLIP-like models (CLIP, SigLIP, and a vision and a text encoder put together
here as `VisionTextDualEncoderModel`), and open_clip's. Each is saved in its own library's format and loads there without
mmkd (an encoder that transformers does not know needs `import mmkd.towers.encoders`).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.errors import TowerError
from mmkd.towers.assemble import VisionSpec, build_encoder, image_size, model_from_config, pixel_statistics

Inputs = dict[str, Tensor]

TEMPERATURE_RANGE = (0.001, 0.5)  # ALBEF's bounds of the learned temperature
OPEN_CLIP = "open_clip:"
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_FIXED_LENGTH = ("siglip", "siglip2")  # trained on texts padded to full length, which carry no mask


class DualEncoder(nn.Module, ABC):
    """An image-text dual encoder with a learned temperature.

    `prepare_images` and `prepare_texts` are pure preprocessing, one entry a picture or text along the first axis of every
    tensor; `embed_images` and `embed_texts` carry gradient.
    """

    model: nn.Module

    @abstractmethod
    def prepare_images(self, pictures: Sequence[Image.Image]) -> Inputs:
        """RGB pictures -> this model's pixels."""

    @abstractmethod
    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """Texts -> this model's token ids (and mask), padded to the longest, cut at what the model reads."""

    @abstractmethod
    def _image_features(self, inputs: Inputs) -> Tensor: ...

    @abstractmethod
    def _text_features(self, inputs: Inputs) -> Tensor: ...

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_dual` and the model's own library load."""

    def embed_images(self, inputs: Inputs) -> Tensor:
        """Pixels as from `prepare_images` -> unit vectors. [n, D]"""
        return F.normalize(self._image_features(inputs), dim=-1)

    def embed_texts(self, inputs: Inputs) -> Tensor:
        """Token ids as from `prepare_texts` -> unit vectors. [n, D]"""
        return F.normalize(self._text_features(inputs), dim=-1)

    @property
    def temperature(self) -> Tensor:
        """What similarities are divided by before a softmax; learned, as `1 / exp(logit_scale)`. Scalar."""
        return torch.exp(-self.model.logit_scale.float()).squeeze()

    @torch.no_grad()
    def set_temperature(self, value: float) -> None:
        self.model.logit_scale.fill_(-math.log(value))

    @torch.no_grad()
    def clamp_temperature(self, low: float = TEMPERATURE_RANGE[0], high: float = TEMPERATURE_RANGE[1]) -> None:
        self.model.logit_scale.clamp_(-math.log(high), -math.log(low))

    def parameter_count(self) -> dict[str, int]:
        total = sum(p.numel() for p in self.model.parameters())
        return {"total": total, "active": total}

    def fingerprint(self) -> str:
        """Hash of the weights."""
        return weights_fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights, names and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class TransformersDual(DualEncoder):
    """CLIP, SigLIP, VisionTextDualEncoderModel, or any transformers model that embeds pictures and texts alike."""

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__()
        self.model, self.processor = model, processor
        text = model.config.text_config
        self._length = text_length(text, processor.tokenizer)
        self._fixed_length = text.model_type.removesuffix("_text_model") in _FIXED_LENGTH

    def prepare_images(self, pictures: Sequence[Image.Image]) -> Inputs:
        return dict(self.processor.image_processor(images=list(pictures), return_tensors="pt"))

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        padding = "max_length" if self._fixed_length else True
        batch = self.processor.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self._length, return_tensors="pt"
        )
        names = ("input_ids",) if self._fixed_length else ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name] for name in names if name in batch}

    def _image_features(self, inputs: Inputs) -> Tensor:
        return self.model.get_image_features(**inputs).pooler_output

    def _text_features(self, inputs: Inputs) -> Tensor:
        return self.model.get_text_features(**inputs).pooler_output

    def save(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def text_length(config: Any, tokenizer: Any) -> int:
    """Tokens of a text that an encoder reads at most."""
    return int(min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf)))


class OpenClipDual(DualEncoder):
    """A model of open_clip with its own preprocessing and tokenizer."""

    def __init__(self, model: nn.Module, preprocess: Any, tokenizer: Any, config: dict[str, Any]):
        super().__init__()
        self.model, self._preprocess, self._tokenizer, self._config = model, preprocess, tokenizer, config

    def prepare_images(self, pictures: Sequence[Image.Image]) -> Inputs:
        return {"pixels": torch.stack([self._preprocess(picture) for picture in pictures])}

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        return {"ids": self._tokenizer(list(texts))}

    def _image_features(self, inputs: Inputs) -> Tensor:
        return self.model.encode_image(inputs["pixels"])

    def _text_features(self, inputs: Inputs) -> Tensor:
        return self.model.encode_text(inputs["ids"])

    def save(self, folder: str | Path) -> None:
        from open_clip.tokenizer import HFTokenizer
        from safetensors.torch import save_model

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / OPEN_CLIP_WEIGHTS))
        if isinstance(self._tokenizer, HFTokenizer):
            self._tokenizer.save_pretrained(folder)
        (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(self._config, indent=1) + "\n", encoding="utf-8")


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_dual(
    source: str | Path, *, dtype: torch.dtype | str = "auto", seed: int = 0, trust_remote_code: bool = False
) -> DualEncoder:
    """A dual encoder by folder, hub id, or "open_clip:NAME[/TAG]" (without a tag: random weights, drawn from `seed`).

    A folder of either library is told by its configuration file. Raises TowerError.
    """
    if str(source).startswith(OPEN_CLIP):
        return _open_clip_by_name(str(source).removeprefix(OPEN_CLIP), seed)
    if (Path(source) / OPEN_CLIP_CONFIG).is_file() and not (Path(source) / "config.json").is_file():
        return _open_clip_folder(Path(source))
    from transformers import AutoModel, AutoProcessor


    try:
        model = AutoModel.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TowerError(f"no dual encoder can be loaded from {str(source)!r}: {error}") from error
    parts = ("get_image_features", "get_text_features", "logit_scale")
    missing = [name for name in parts if getattr(model, name, None) is None]
    if missing:
        raise TowerError(
            f"{type(model).__name__} in {str(source)!r} is no dual encoder (it has no {', '.join(missing)}); give a CLIP, "
            f"a SigLIP, a VisionTextDualEncoderModel or {OPEN_CLIP}NAME/TAG"
        )
    return TransformersDual(model, processor)


def _open_clip_by_name(name: str, seed: int) -> OpenClipDual:
    import difflib

    import open_clip

    architecture, _, tag = name.partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=3)
        raise TowerError(f"open_clip has no model {architecture!r}; close: {', '.join(close) or 'none'}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise TowerError(f"open_clip has no weights {tag!r} of {architecture!r}; there are {', '.join(tags) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=tag or None)
    return OpenClipDual(model, preprocess, open_clip.get_tokenizer(architecture), _open_clip_config(model, config))


def _open_clip_folder(folder: Path) -> OpenClipDual:
    import open_clip

    if not (folder / OPEN_CLIP_WEIGHTS).is_file():
        raise TowerError(f"{folder} holds {OPEN_CLIP_CONFIG} but no {OPEN_CLIP_WEIGHTS}; only safetensors are loaded")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    config = json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    return OpenClipDual(model, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"), config)


def _open_clip_config(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """What open_clip's folders say of a model: its architecture and how its pictures are prepared."""
    known = getattr(model.visual, "preprocess_cfg", None) or {}
    names = ("mean", "std", "interpolation", "resize_mode")
    return {"model_cfg": config, "preprocess_cfg": {name: known[name] for name in names if known.get(name) is not None}}


# ---- putting together ------------------------------------------------------------------------------------------------


@dataclass
class TextSpec:
    """Where a text encoder comes from: `source` (a folder or hub id) or `config` (random weights) with its `model_type`.

    pooling: the encoder's own pooled output, or the "mean" of its last states, as sentence encoders are pooled.
    frozen: its weights are not trained; goes with the mean.
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    pooling: Literal["own", "mean"] = "own"
    frozen: bool = False


def assemble_dual(
    vision: VisionSpec,
    text: TextSpec,
    *,
    embedding: int = 256,
    tokenizer: Any = None,
    temperature: float = 0.07,
    seed: int = 0,
) -> TransformersDual:
    """A dual encoder from any vision encoder and a text encoder, each behind a linear projection of its pooled output.

    A plain `VisionTextDualEncoderModel`; parts without pretrained weights and the projections are drawn from `seed`.
    `tokenizer` is needed for a text encoder made from a configuration (`train_text_tokenizer`). Raises TowerError when a part
    cannot be found or gives no pooled output.
    """
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
    )

    if text.source is not None:
        tokenizer = AutoTokenizer.from_pretrained(text.source)
    if tokenizer is None:
        raise TowerError("a text encoder from a configuration needs a tokenizer; train one on the captions")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(vision)
        height, width = image_size(vision, encoder)
        encoder.config.hidden_size = _pooled_width(encoder, pixel_values=torch.zeros(1, 3, height, width))
        text_encoder = build_text_encoder(text, tokenizer)
        _pooled_width(text_encoder, **tokenizer(["a"], return_tensors="pt"))
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            encoder.config, text_encoder.config, projection_dim=embedding, logit_scale_init_value=-math.log(temperature)
        )
        model = VisionTextDualEncoderModel(config=config)  # built whole, as `from_pretrained` builds it
    model.vision_model.load_state_dict(encoder.state_dict())
    model.text_model.load_state_dict(text_encoder.state_dict())
    mean, std = pixel_statistics(vision, encoder)
    pictures = CLIPImageProcessor(size={"height": height, "width": width}, do_center_crop=False, image_mean=mean, image_std=std)
    return TransformersDual(model, VisionTextDualEncoderProcessor(pictures, tokenizer))


def build_text_encoder(spec: TextSpec, tokenizer: Any) -> nn.Module:
    """The text encoder of a spec; the vocabulary and special tokens of one from a configuration are its tokenizer's."""
    from mmkd.retrieval.text_encoders import SentenceConfig, SentenceEncoder

    if spec.frozen and spec.pooling == "own":
        raise TowerError("a frozen text encoder is pooled by the mean of its states; set its pooling to mean")
    if spec.pooling == "mean":
        encoder = _text_encoder(spec, tokenizer)
        return SentenceEncoder(SentenceConfig(encoder.config, frozen=spec.frozen), encoder)
    return _text_encoder(spec, tokenizer)


def _text_encoder(spec: TextSpec, tokenizer: Any) -> nn.Module:
    from transformers import AutoModel

    if (spec.source is None) == (spec.config is None):
        raise TowerError("a text encoder needs either `source` (pretrained) or `config` (random weights)")
    if spec.source is not None:
        try:
            model = AutoModel.from_pretrained(spec.source, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise TowerError(f"no text encoder can be loaded from {spec.source!r}: {error}") from error
        return getattr(model, "text_model", model)
    config = dict(spec.config or {})
    kind = config.pop("model_type", None)
    if kind is None:
        raise TowerError("the text `config` lacks `model_type` (for example bert, clip_text_model)")
    return model_from_config(AutoModel, kind, text_defaults(tokenizer) | config, "text")


def text_defaults(tokenizer: Any) -> dict[str, Any]:
    """Keys of a text configuration that its tokenizer decides."""
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}


def _pooled_width(encoder: nn.Module, **inputs: Tensor) -> int:
    """Width of an encoder's pooled output. Raises TowerError when it has none or does not take the input."""
    try:
        with torch.no_grad():
            pooled = getattr(encoder.eval()(**inputs, return_dict=True), "pooler_output", None)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise TowerError(f"{type(encoder).__name__} does not take its own kind of input: {error}") from error
    if pooled is None or pooled.dim() != 2:
        raise TowerError(
            f"{type(encoder).__name__} gives no pooled output, which a dual encoder projects; use an encoder with one "
            "(vit, clip_vision_model, dinov2, focalnet, mmkd_encoder; bert, clip_text_model, mmkd_bag_of_words)"
        )
    return pooled.shape[-1]


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, words: bool = False) -> Any:
    """A lower-casing tokenizer that writes `<|cls|> text <|end|>`: encoders pool at either end.

    Byte-level BPE, whose `vocab_size` counts the three special tokens and the 256 bytes (TowerError when it is smaller); or, with
    `words`, the most frequent words, numbers and signs as they stand, every other one becoming `<|pad|>`.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    specials = {"pad_token": "<|pad|>", "cls_token": "<|cls|>", "eos_token": "<|end|>"}
    train = _word_tokenizer if words else _bpe_tokenizer
    raw = train(texts, vocab_size, list(specials.values()))
    ends = [(token, raw.token_to_id(token)) for token in (specials["cls_token"], specials["eos_token"])]
    raw.post_processor = processors.TemplateProcessing(single="<|cls|> $A <|end|>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="right", unk_token="<|pad|>", **specials)


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    least = len(specials) + 256
    if vocab_size < least:
        raise TowerError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone are {least}")
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return raw


def _word_tokenizer(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.WordLevel(unk_token=specials[0]))
    raw.normalizer = normalizers.Lowercase()
    # Underscores and white space part words; every other sign is a word of its own.
    gaps, signs = Regex(r"[\s_]+"), Regex(r"[^\p{L}\p{M}\p{N}]")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(gaps, "removed"), pre_tokenizers.Split(signs, "isolated")]
    )
    raw.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    )
    return raw
