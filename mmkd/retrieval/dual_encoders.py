"""Dual encoders: a picture and a text become two unit vectors, whose product says how well they match.

Two sources behind one class: transformers' CLIP-like models (CLIP, SigLIP, and a vision and a text encoder put together as
`VisionTextDualEncoderModel`, see `mmkd.retrieval.assemble`), and open_clip's. Each is saved in its own library's format and
loads there without mmkd (an encoder that transformers does not know needs `import mmkd.towers.encoders`).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.errors import TowerError
from mmkd.towers.whole import load_beside, load_whole

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
    """The longest text that an encoder reads, in tokens."""
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

    A folder of either library is recognised by its configuration file. Raises TowerError.
    """
    if str(source).startswith(OPEN_CLIP):
        return _open_clip_by_name(str(source).removeprefix(OPEN_CLIP), seed)
    if (Path(source) / OPEN_CLIP_CONFIG).is_file() and not (Path(source) / "config.json").is_file():
        return _open_clip_folder(Path(source))
    from transformers import AutoModel, AutoProcessor

    model = load_whole(AutoModel, source, "dual encoder", dtype=dtype, trust_remote_code=trust_remote_code)
    processor = load_beside(AutoProcessor, source, "dual encoder", trust_remote_code=trust_remote_code)
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
    """The content of open_clip's configuration file: the architecture and how pictures are prepared."""
    known = getattr(model.visual, "preprocess_cfg", None) or {}
    names = ("mean", "std", "interpolation", "resize_mode")
    return {"model_cfg": config, "preprocess_cfg": {name: known[name] for name in names if known.get(name) is not None}}
