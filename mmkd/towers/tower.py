"""The tower: a vision-language model seen as vision encoder -> projector -> language model.

Teacher and student are both towers, and all of distillation is built from four verbs:

    prepare(samples)      raw samples -> this tower's own inputs, targets already shifted
    see(inputs)           images -> vision features (before the projector) and visual tokens (after it)
    read(inputs, tokens)  text and visual tokens -> last hidden states (before the head)
    project(features)     anybody's vision features -> visual tokens of this tower

One class wraps every image-text model of transformers; the place of the projector is data (`families.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmkd.data.samples import Sample, Turn
from mmkd.errors import DataError, TowerError
from mmkd.towers import answering
from mmkd.towers.experts import idle_parameters
from mmkd.towers.families import (
    ABSOLUTE,
    DEEPSTACK,
    GRIDS,
    GROUPED,
    INDEXED,
    LANGUAGE_NAMES,
    NESTED,
    PROJECTORS,
    SHUFFLE_NAMES,
    STACKED,
    TOKEN_MARKS,
    TOKEN_TYPES,
    VISION_NAMES,
    WIDE,
    child,
)

IGNORE = -100  # target of a position that predicts nothing that is supervised


@dataclass
class Encoded:
    """One sample in a tower's own terms, not yet padded."""

    id: str
    input_ids: Tensor  # [L]
    targets: Tensor  # [L], the token that each position predicts, IGNORE elsewhere
    pixels: dict[str, Tensor]
    images: int
    truncated: int = 0  # answer tokens that did not fit


@dataclass
class TowerInputs:
    """A batch in a tower's own terms. Positions are padding, prompt, visual or response."""

    ids: list[str]
    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    targets: Tensor  # [B, L], shifted already: targets[b, t] is the token after position t
    visual: Tensor  # [B, L] bool, the position holds a visual token
    pixels: dict[str, Tensor]
    images: list[int]  # images of each sample, in order

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TowerInputs:
        move = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("input_ids", "attention_mask", "targets", "visual")
        }
        pixels = {k: v.to(device, non_blocking=non_blocking) for k, v in self.pixels.items()}
        return replace(self, **move, pixels=pixels)

    def pin_memory(self) -> TowerInputs:
        """The batch in page-locked memory, from which `non_blocking` copies are."""
        names = ("input_ids", "attention_mask", "targets", "visual")
        pixels = {name: tensor.pin_memory() for name, tensor in self.pixels.items()}
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names}, pixels=pixels)

    @property
    def answer(self) -> Tensor:
        """Positions that hold a supervised token: one after those of `response`. [B, L] bool"""
        return F.pad(self.response[:, :-1], (1, 0))

    @property
    def response(self) -> Tensor:
        """Rows that predict a supervised token. [B, L] bool"""
        return self.targets != IGNORE

    @property
    def prompt(self) -> Tensor:
        """Rows that predict a text token of the prompt. [B, L] bool"""
        text = self.attention_mask.bool() & ~self.visual
        return self.attention_mask.bool() & F.pad(text[:, 1:], (0, 1)) & ~self.response

    @property
    def next_ids(self) -> Tensor:
        """The token after each position; 0 at the end. [B, L]"""
        return F.pad(self.input_ids[:, 1:], (0, 1))


@dataclass
class Seen:
    """What a tower saw: one entry an image.

    Some families (Qwen3-VL) also add features of the picture to the hidden states of their first k layers. Those stand behind
    the visual token: such tokens are [n_i, (1 + k) D].
    """

    features: list[Tensor]  # each [n_i, Dv], before the projector; empty where a family does not tell whose is whose
    tokens: list[Tensor]  # each [n_i, D], after it
    output: Any = field(default=None, repr=False)  # transformers' own output object, with whatever else a family adds


@dataclass
class VisualTokens(BaseModelOutputWithPooling):
    """Visual tokens as transformers' models take them, with those that go to their first layers."""

    deepstack_features: list[tuple[Tensor, ...]] | None = None  # of each layer one [n_i, D] an image
    router_logits: Tensor | None = None
    visual_indicator_features: Tensor | None = None  # Ovis2's tokens between pictures, the same for all


class Tower:
    """A transformers image-text model with its processor, as teacher or student."""

    def __init__(self, model: nn.Module, processor: Any, *, max_length: int = 2048):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self._template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if self._template is None:
            raise TowerError(
                f"{type(processor).__name__} has no chat template; set processor.chat_template, "
                "or assemble the tower with a template of mmkd.towers.assemble.CHAT_TEMPLATES"
            )
        self._image_token_id = _image_token_id(model, processor)
        self._indicators: Tensor | None = None  # of `VisualTokens`, from the latest `see`

    # ---- making, saving ------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        quantise: str | None = None,
        trust_remote_code: bool = False,
        max_length: int = 2048,
    ) -> Tower:
        """A tower from a transformers folder or hub id. `quantise` is "8bit" or "4bit" (bitsandbytes)."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import mmkd.towers.encoders  # noqa: F401  registers the encoders that transformers does not know

        extra: dict[str, Any] = {}
        if quantise is not None:
            extra["quantization_config"] = _quantisation(quantise)
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **extra
            )
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise TowerError(f"no image-text model can be loaded from {str(folder)!r}: {error}") from error
        return cls(model, processor, max_length=max_length)

    def save(self, folder: str | Path) -> None:
        """Writes model (safetensors), processor, chat template and generation config: a plain transformers folder."""
        from mmkd.towers.export import merged

        with merged(self.model) as model:
            model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # ---- parts ---------------------------------------------------------------------------------------------------

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @property
    def projector_path(self) -> str | tuple[str, ...]:
        """Path of the projector below `base`. Raises TowerError for a family whose projector is not known."""
        kind = self.model.config.model_type
        if kind not in PROJECTORS:
            raise TowerError(f"where {kind!r} keeps its projector is not known; add it to mmkd.towers.families.PROJECTORS")
        return PROJECTORS[kind]

    @property
    def projector(self) -> nn.Module:
        path = self.projector_path
        if isinstance(path, str):
            return self.base.get_submodule(path)
        return nn.Sequential(*map(self.base.get_submodule, path))

    @property
    def vision(self) -> nn.Module:
        """The vision encoder (in some families the projector is inside it)."""
        return self._part(VISION_NAMES, "vision encoder")

    @property
    def language(self) -> nn.Module:
        return self._part(LANGUAGE_NAMES, "language model")

    def _part(self, names: tuple[str, ...], what: str) -> nn.Module:
        name = child(self.base, names)
        if name is None:
            raise TowerError(f"{type(self.base).__name__} has no {what} named one of {', '.join(names)}")
        return self.base.get_submodule(name)

    def part_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Parameters by part: "vision", "projector", "language" (with embeddings and head)."""
        projector, vision = set(map(id, self.projector.parameters())), set(map(id, self.vision.parameters()))
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {"vision": [], "projector": [], "language": []}
        for name, parameter in self.model.named_parameters():
            reduces = ".vision_tower.reducer." in f".{name}"  # see towers/reducers.py
            part = "projector" if reduces or id(parameter) in projector else "vision" if id(parameter) in vision else "language"
            parts[part].append((name, parameter))
        return parts

    def parameter_count(self) -> dict[str, int]:
        """All parameters, and those that one token meets: fewer where a language model has experts."""
        total = self.model.num_parameters()  # counts packed 4-bit weights as what they stand for
        return {"total": total, "active": total - idle_parameters(self)}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the tokenizer knows; head rows beyond it are padding."""
        return len(self.tokenizer)

    @property
    def head(self) -> nn.Module:
        own = self.model.get_output_embeddings()
        return own if own is not None else self.language.get_output_embeddings()

    @cached_property
    def logit_rule(self) -> tuple[float, float | None]:
        """(scale, soft cap) between the head and this model's logits: `cap * tanh(scale * head(h) / cap)`.

        A text configuration names them (Granite, Cohere, Gemma, Muse), but not every class around it applies them, so they
        are found by comparing with the model's own forward pass. Raises TowerError when none explains its logits.
        """
        config = self.model.config.get_text_config()
        factors = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier")]
        divisor = getattr(config, "logits_scaling", None)
        scale = 1.0 / divisor if divisor else next(filter(None, factors), 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        candidates = list(dict.fromkeys([(1.0, None), (scale, cap), (scale, None), (1.0, cap)]))
        if len(candidates) == 1:
            return candidates[0]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            ids = torch.tensor([self.tokenizer("a b c", add_special_tokens=False)["input_ids"]], device=self.device)
            with _first_input(self.head) as hidden:
                own = self.model(input_ids=ids, use_cache=False).logits.float()  # [1, L, V]
            raw = self.head(hidden[0]).float()
        self.model.train(was_training)
        # The nearest, not the first within reach: small logits are hardly capped, and every rule seems to hold for them.
        errors = {rule: float((_ruled(raw, *rule) - own).abs().max()) for rule in candidates}
        best = min(candidates, key=errors.__getitem__)
        if errors[best] <= 1e-2 * float(own.abs().max()):
            return best
        raise TowerError(f"the logits of {type(self.model).__name__} are not its head's, scaled or soft-capped; it cannot distil")

    def freeze(self) -> Tower:
        """The tower as a teacher: evaluation mode, no gradient to its parameters."""
        self.model.requires_grad_(False)
        self.model.eval()
        return self

    def fingerprint(self) -> str:
        """Hash of weights and processor: what a cached result of this tower depends on."""
        digest = hashlib.blake2b(self.processor_fingerprint().encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def processor_fingerprint(self) -> str:
        """Hash of what turns a sample into inputs: vocabulary, chat template, image processor, token count, length."""
        images = {k: v for k, v in self.processor.image_processor.to_dict().items() if "processor" not in k}
        names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_length")
        layout = {name: getattr(self.processor, name, None) for name in names}
        facts = [sorted(self.tokenizer.get_vocab().items()), self._template, images, layout, self.max_length]
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    # ---- prepare -------------------------------------------------------------------------------------------------

    def prepare(self, samples: Sequence[Sample], *, padding_side: str = "right") -> TowerInputs:
        """Raw samples -> inputs of this tower: its processor, template, token ids and image size; targets shifted.

        Raises DataError for an empty answer, for a sequence whose answer lies behind `max_length`, and ImageError
        for a picture that does not decode.
        """
        return self.collate([self.encode(sample) for sample in samples], padding_side=padding_side)

    def encode(self, sample: Sample, *, with_answer: bool = True, pictures: list | None = None) -> Encoded:
        """One sample. Prompt and answer are tokenised apart, as they are met at generation, and then joined.

        `pictures` stand in for the sample's own, which are then not loaded.
        """
        pictures = [ref.load() for ref in sample.images] if pictures is None else pictures
        ids: list[int] = []
        supervised: list[bool] = []
        pixels: list[dict[str, Tensor]] = []
        for text, is_answer, images in self._segments(sample, with_answer):
            if is_answer:
                piece = self._answer_ids(text)
            else:
                piece, new_pixels = self._prompt_ids(text, pictures[:images], first=not ids)
                pictures = pictures[images:]
                pixels.append(new_pixels)
            ids += piece
            supervised += self._supervised(piece) if is_answer else [False] * len(piece)
        return self._fit(sample, ids, supervised, self._joined(pixels), with_answer)

    def _segments(self, sample: Sample, with_answer: bool) -> list[tuple[str, bool, int]]:
        """The chat template's text cut into pieces: (text, is an answer, images in it)."""
        turns = sample.turns if with_answer else sample.prompt_turns
        if with_answer and (not sample.answer.strip()):
            raise DataError(f"sample {sample.id!r} has an empty answer; there is nothing to learn from it")
        if not with_answer:
            return [(self._render(turns, prompt=True), False, len(sample.images))]
        segments, done, images = [], "", 0
        for index, turn in enumerate(turns):
            images += turn.images
            if turn.role != "assistant":
                continue
            before = self._render(turns[:index], prompt=True)
            after = self._render(turns[: index + 1], prompt=False)
            if not before.startswith(done) or not after.startswith(before):
                raise TowerError(
                    "the chat template changes earlier turns when a later one is added, so the answer cannot be located: "
                    f"{before[-60:]!r} is not the beginning of {after[-120:]!r}"
                )
            segments += [(before[len(done) :], False, images), (after[len(before) :], True, 0)]
            done, images = after, 0
        return segments

    def _render(self, turns: Sequence[Turn], *, prompt: bool) -> str:
        messages = [
            {"role": t.role, "content": [{"type": "image"}] * t.images + [{"type": "text", "text": t.text}]} for t in turns
        ]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _prompt_ids(self, text: str, pictures: list, *, first: bool) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids of a prompt piece, image placeholders expanded by this tower's processor, and its pixels."""
        bos = self.tokenizer.bos_token
        special = first and not (bos and text.startswith(bos))
        if not pictures:
            return self.tokenizer(text, add_special_tokens=special)["input_ids"], {}
        nested = self.model.config.model_type in GROUPED
        images = [pictures] if nested else pictures
        batch = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=special)
        skip = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
        pixels = {k: torch.as_tensor(v) for k, v in batch.items() if k not in skip}
        if self.model.config.model_type in NESTED:
            pixels = {k: v.transpose(0, 1) for k, v in pixels.items()}
        return batch["input_ids"][0].tolist(), pixels

    def _answer_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        stops = self.stop_ids
        if not stops.intersection(ids):  # the template writes no end: without one a student never learns to stop
            return [*ids, self.tokenizer.eos_token_id]
        return ids

    def _supervised(self, answer: list[int]) -> list[bool]:
        """An answer is learned up to and with its first end token; what a template writes behind it is never generated."""
        end = next(i for i, token in enumerate(answer) if token in self.stop_ids)
        return [i <= end for i in range(len(answer))]

    @property
    def stop_ids(self) -> set[int]:
        """Token ids that end an answer."""
        ids = self.model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return {i for i in (*ids, self.tokenizer.eos_token_id) if i is not None}

    def _fit(
        self, sample: Sample, ids: list[int], supervised: list[bool], pixels: dict[str, Tensor], with_answer: bool
    ) -> Encoded:
        length, truncated = len(ids), 0
        if length > self.max_length:
            kept = sum(supervised[: self.max_length])
            if not with_answer or kept == 0 or self._image_token_id in ids[self.max_length :]:
                raise DataError(
                    f"sample {sample.id!r} has {length} tokens, more than max_length {self.max_length}, and would lose "
                    "its answer or part of a picture; raise max_length or shorten the prompt"
                )
            truncated = sum(supervised) - kept
            ids, supervised = ids[: self.max_length], supervised[: self.max_length]
        targets = [n if s else IGNORE for n, s in zip(ids[1:], supervised[1:], strict=True)] + [IGNORE]
        return Encoded(sample.id, torch.tensor(ids), torch.tensor(targets), pixels, len(sample.images), truncated)

    def collate(self, encoded: Sequence[Encoded], *, padding_side: str = "right") -> TowerInputs:
        """Pads encoded samples into one batch."""
        length = max(len(e.input_ids) for e in encoded)
        pad = self.pad_id

        def stack(rows: list[Tensor], value: int) -> Tensor:
            out = torch.full((len(rows), length), value, dtype=torch.long)  # [B, L]
            for b, row in enumerate(rows):
                place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
                out[b, place] = row
            return out

        input_ids = stack([e.input_ids for e in encoded], pad)
        mask = stack([torch.ones_like(e.input_ids) for e in encoded], 0)
        return TowerInputs(
            ids=[e.id for e in encoded],
            input_ids=input_ids,
            attention_mask=mask,
            targets=stack([e.targets for e in encoded], IGNORE),
            visual=(input_ids == self._image_token_id) & mask.bool(),
            pixels=self._joined([e.pixels for e in encoded]),
            images=[e.images for e in encoded],
        )

    def _joined(self, pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        kind = self.model.config.model_type
        for name, target in INDEXED.get(kind, {}).items():
            pixels = _counted_on(pixels, name, target)
        return _concatenate(pixels, wide=kind in WIDE)

    @property
    def image_token_id(self) -> int:
        """The id that marks a visual position."""
        return self._image_token_id

    def visual_count(self, encoded: Encoded) -> int:
        """Visual tokens of one prepared sample, all its images together."""
        return int((encoded.input_ids == self._image_token_id).sum())

    def text_ids(self, encoded: Encoded) -> Tensor:
        """Tokens of one prepared sample without its visual positions."""
        return encoded.input_ids[encoded.input_ids != self._image_token_id]

    def with_visual_count(self, encoded: Encoded, count: int) -> Encoded:
        """The sample with `count` visual positions in place of its own: how this tower reads another encoder's tokens."""
        is_visual = encoded.input_ids == self._image_token_id
        own = int(is_visual.sum())
        if own == count:
            return encoded
        if any(name in GRIDS for name in encoded.pixels):
            raise TowerError(
                f"{self.model.config.model_type!r} places its {own} visual tokens by the grid of its own patches, so {count} "
                "tokens of another encoder have no place in it; use an encoder with the same count, or another teacher"
            )
        if count % encoded.images or own % encoded.images:
            raise TowerError(f"{count} visual tokens cannot be spread evenly over {encoded.images} images")
        # The first placeholder of each image becomes as many as are wanted, the others none.
        order = is_visual.cumsum(0) - 1
        first = is_visual & (order % (own // encoded.images) == 0)
        repeats = torch.where(is_visual, first.long() * (count // encoded.images), 1)
        targets = encoded.targets.repeat_interleave(repeats)
        return replace(encoded, input_ids=encoded.input_ids.repeat_interleave(repeats), targets=targets)

    @property
    def pad_id(self) -> int:
        """Any id will do under the attention mask, but never the image placeholder."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    # ---- see, project, read --------------------------------------------------------------------------------------

    def see(self, inputs: TowerInputs) -> Seen:
        """Images -> vision features before the projector and visual tokens after it, one entry an image."""
        if not inputs.pixels:
            return Seen([], [])
        dtype = next(self.vision.parameters()).dtype
        pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.pixels.items()}
        with _first_input(self.projector) as captured:
            output = self.base.get_image_features(**pixels, return_dict=True)
        tokens = _split_tokens(output.pooler_output, inputs)
        if (indicators := getattr(output, "visual_indicator_features", None)) is not None:
            self._indicators = indicators.detach()
        if layers := getattr(output, "deepstack_features", None):
            tokens = [torch.cat([token, *more], dim=-1) for token, *more in zip(tokens, *layers, strict=True)]
        return Seen(_per_image(captured, tokens), tokens, output)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Vision features, one [n_i, Dv] an image, from any encoder -> visual tokens [n_i, D] of this tower."""
        width = self.feature_width
        wrong = next((f for f in features if f.shape[-1] != width), None)
        if wrong is not None:
            raise TowerError(
                f"vision features of width {wrong.shape[-1]} do not fit the projector of this tower, which reads {width}; "
                "use encoders of equal width or ask for a bridge"
            )
        if len({f.shape for f in features}) == 1:
            tokens = self.projector(torch.stack(list(features)))  # [n, N, D], or [n * N, D] of families that pack
            return list(tokens.reshape(len(features), -1, tokens.shape[-1]))
        return [self.projector(f[None]).flatten(0, -2) for f in features]

    @property
    def _merged_patches(self) -> int:
        """Neighbouring features that the projector's own pixel shuffle makes one of."""
        sides = [getattr(self.projector, name, None) for name in SHUFFLE_NAMES]
        return next((side**2 for side in sides if isinstance(side, int)), 1)

    @property
    def _first_inputs(self) -> int | None:
        """What the projector's first matrix reads."""
        return next((m.in_features for m in self.projector.modules() if isinstance(m, nn.Linear)), None)

    @cached_property
    def feature_width(self) -> int:
        """Width Dv that the projector reads: that of its first norm or matrix, before a pixel shuffle of its own."""
        for module in self.projector.modules():
            if isinstance(module, nn.Linear):
                return module.in_features // self._merged_patches
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                return len(weight) // (self._merged_patches if len(weight) == self._first_inputs else 1)
        raise TowerError(f"{type(self.projector).__name__} has neither a norm nor a matrix that tells its input width")

    def read(self, inputs: TowerInputs, visual_tokens: Sequence[Tensor] | Seen) -> Tensor:
        """Text and visual tokens -> last hidden states before the head. [B, L, D]"""
        arguments = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "mm_encoder_outputs": self.encoder_outputs(visual_tokens),
            "use_cache": False,
            "return_dict": True,
            **self.layout(inputs),
        }
        if self.model.config.model_type in ABSOLUTE:
            arguments["position_ids"] = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
        if self.base is not self.model:
            return self.base(**arguments).last_hidden_state
        with _first_input(self.head) as captured:  # a family whose head cannot be left away
            self.model(**arguments)
        return captured[0]

    def encoder_outputs(self, tokens: Sequence[Tensor] | Seen) -> dict[str, Any]:
        """Visual tokens in the form in which transformers takes them; {} when there is no image."""
        if isinstance(tokens, Seen):
            if tokens.output is not None:
                return {"image": tokens.output}
            tokens = tokens.tokens
        if not len(tokens):
            return {}
        pooled, layers = self._deepstack(tokens)
        stacked = torch.cat(pooled)[None] if self.model.config.model_type in STACKED else pooled
        return {"image": VisualTokens(
            pooler_output=stacked, deepstack_features=layers, visual_indicator_features=self._indicators
        )}

    def _deepstack(self, tokens: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, ...]] | None]:
        """Visual tokens and what goes to the first layers, one tuple a layer. Tokens of another encoder bring none of that."""
        if self.model.config.model_type not in DEEPSTACK:
            return list(tokens), None
        width = self.model.get_input_embeddings().weight.shape[1]
        pieces = [token.split(width, dim=-1) for token in tokens]
        return [piece[0] for piece in pieces], list(zip(*(piece[1:] for piece in pieces), strict=True))

    def layout(self, inputs: TowerInputs) -> dict[str, Tensor]:
        """What some families place their tokens by, beside ids and mask: token types, and the pictures' grids."""
        ids = [i for i in getattr(self.processor, "image_token_ids", None) or [] if i is not None] or [self._image_token_id]
        is_image = torch.isin(inputs.input_ids, torch.tensor(ids, device=inputs.input_ids.device))
        marks = {"mm_token_type_ids": (is_image & inputs.attention_mask.bool()).long()}
        kind = self.model.config.model_type
        if kind in TOKEN_TYPES:
            marks["token_type_ids"] = getattr(inputs, TOKEN_TYPES[kind]).long()
        for name, tokens in TOKEN_MARKS.get(kind, {}).items():
            ids = torch.tensor([getattr(self.model.config, token) for token in tokens], device=inputs.input_ids.device)
            marks[name] = torch.isin(inputs.input_ids, ids).long()
        marks |= {name: grid for name, grid in inputs.pixels.items() if name in GRIDS}
        return {name: mark for name, mark in marks.items() if name in self._arguments}

    def takes(self, argument: str) -> bool:
        """Whether the model without its head has an argument of this name."""
        return argument in self._arguments

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(signature(self.base.forward).parameters)

    # ---- answering -----------------------------------------------------------------------------------------------

    def answer(
        self, samples: Sequence[Sample], *, max_new_tokens: int, vision_cache: MutableMapping | None = None
    ) -> list[str]:
        """Greedy answers of one batch. `vision_cache` keeps what was seen by the pictures (see `VisionCache`)."""
        return answering.generate(self, samples, max_new_tokens, vision_cache)

    def choose(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]], *, vision_cache: MutableMapping | None = None
    ) -> list[int]:
        """The likeliest of each sample's options, in one forward pass. Raises TowerError (see `answering.choose`)."""
        return answering.choose(self, samples, options, vision_cache)

    def answer_tokens(self, sample: Sample, answer: str) -> list[int]:
        """Token ids with which this tower learns `answer` to the sample's prompt, up to and with the end."""
        turns = (*sample.prompt_turns, Turn("assistant", answer))
        text = self._segments(replace(sample, turns=turns), True)[-1][0]
        return self._answer_ids(text)

    def token_count(self, texts: Sequence[str]) -> int:
        """Tokens of all texts together, without special ones."""
        return sum(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    def footprint(self) -> dict[str, Any]:
        """Bytes of the weights, their commonest dtype, and the device."""
        sizes: dict[str, int] = {}
        for parameter in self.model.parameters():
            kind = str(parameter.dtype).removeprefix("torch.")
            sizes[kind] = sizes.get(kind, 0) + parameter.numel() * parameter.element_size()
        return {"weight_bytes": sum(sizes.values()), "dtype": max(sizes, key=sizes.__getitem__), "device": str(self.device)}


def _ruled(raw: Tensor, scale: float, cap: float | None) -> Tensor:
    return raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)


def _concatenate(pixels: Sequence[dict[str, Tensor]], wide: bool = False) -> dict[str, Tensor]:
    """Pixel inputs of several pieces joined along the image (or patch) axis; `wide`: the pictures side by side.

    Families whose pictures differ in size or number of crops fill up with zeros at the end of the other axes, as their
    own processors do within one call.
    """
    names = sorted({name for piece in pixels for name in piece})
    pieces = {name: [piece[name] for piece in pixels if name in piece] for name in names}
    if wide:
        return {name: torch.cat(parts, dim=-1 if parts[0].is_floating_point() else 0) for name, parts in pieces.items()}
    return {name: torch.cat(_same_shape(parts)) for name, parts in pieces.items()}


def _counted_on(pixels: Sequence[dict[str, Tensor]], name: str, target: str) -> list[dict[str, Tensor]]:
    """The pieces with their indices `name` into the rows [n, k, ...] of `target` moved on by the pieces before; -1 is none."""
    moved, before = [], 0
    for piece in pixels:
        if name in piece:
            piece = piece | {name: torch.where(piece[name] >= 0, piece[name] + before, piece[name])}
            before += piece[target].shape[0] * piece[target].shape[1]
        moved.append(piece)
    return moved


def _same_shape(tensors: list[Tensor]) -> list[Tensor]:
    if len({t.shape[1:] for t in tensors}) == 1:
        return tensors
    sizes = [max(axis) for axis in zip(*(t.shape[1:] for t in tensors), strict=True)]
    missing = [[max_size - size for max_size, size in zip(sizes, t.shape[1:], strict=True)] for t in tensors]
    return [F.pad(t, [n for gap in reversed(gaps) for n in (0, gap)]) for t, gaps in zip(tensors, missing, strict=True)]


@contextmanager
def _first_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Records the first input of each call of `module`, or of the first of several that follow each other."""
    captured: list[Tensor] = []
    first = module[0] if type(module) is nn.Sequential else module

    def record(_: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        captured.append(positional[0] if positional else next(iter(named.values())))

    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield captured
    finally:
        handle.remove()


def _split_tokens(pooled: Any, inputs: TowerInputs) -> list[Tensor]:
    """Visual tokens, one [n_i, D] an image, from the list or the tensor that a family gives."""
    if not isinstance(pooled, Tensor):
        return list(pooled)
    if pooled.dim() == 3:
        return list(pooled)
    counts = zip(inputs.visual.sum(1).tolist(), inputs.images, strict=True)  # those of one sample have equal shares
    return list(pooled.split([count // images for count, images in counts for _ in range(images)]))


def _per_image(captured: list[Tensor], tokens: list[Tensor]) -> list[Tensor]:
    """The projector's inputs, one [n_i, Dv] an image; none where a family's packing does not tell which belongs to which."""
    captured = [batch for batch in captured if batch.dim() > 1]
    features = [f for batch in captured for f in (batch if batch.dim() == 3 else [batch])]
    if len(features) == len(tokens):
        return features
    flat = torch.cat([f.flatten(0, -2) for f in features])  # [sum n, Dv], families that pack all images
    count = sum(len(t) for t in tokens)
    if not count or len(flat) % count:
        return []
    share = len(flat) // count  # encoder positions behind one visual token
    return list(flat.split([len(t) * share for t in tokens]))


def _image_token_id(model: nn.Module, processor: Any) -> int:
    for owner in (model.config, processor):
        token = getattr(owner, "image_token_id", None)
        if token is not None:
            return token
    raise TowerError(f"{type(model).__name__} names no image token; it is not an image-text model that a tower can wrap")


def _quantisation(kind: str) -> Any:
    """bitsandbytes for the language model alone: encoder and projector are small, and the row engine needs the head's weight."""
    from transformers import BitsAndBytesConfig

    outside = rf"(?!.*\b({'|'.join(LANGUAGE_NAMES)})\.).*"
    whole = {"llm_int8_skip_modules": [outside, "lm_head"]}
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **whole)
    if kind == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **whole)
    raise TowerError(f"quantise is {kind!r}; choose 8bit or 4bit")
