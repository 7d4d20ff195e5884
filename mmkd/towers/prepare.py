"""From samples to a model's inputs: chat template, tokenizer, image processor, targets, padding.

Targets are shifted here and nowhere else.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.errors import DataError, TowerError
from mmkd.towers.families import GRIDS, family_of
from mmkd.towers.inputs import IGNORE, Encoded, TowerInputs
from mmkd.towers.samples import Sample, Turn
from mmkd.towers.time_limit import limited

# What a processor gives beside pixels.
_NO_PIXELS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"})
# What of a processor decides how many tokens a picture becomes.
_TOKEN_COUNTS = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_length")


class Preparer:
    """Prepares samples for one model by its own processor. Of the model it reads configurations, no weights."""

    def __init__(self, model: nn.Module, processor: Any, *, max_length: int):
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self._model = model
        self._kind = model.config.model_type
        self._family = family_of(self._kind)
        self._template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if self._template is None:
            raise TowerError(
                f"{type(processor).__name__} has no chat template; set processor.chat_template, "
                "or assemble the tower with a template of mmkd.towers.assemble.CHAT_TEMPLATES"
            )
        self.image_token_id = _image_token_id(model, processor)

    def with_image_processor(self, image_processor: Any) -> Preparer:
        """The same with another image processor; this one stays as it is."""
        other = copy.copy(self)
        other.processor = copy.copy(self.processor)
        other.processor.image_processor = image_processor
        return other

    @property
    def stop_ids(self) -> set[int]:
        """Token ids that end an answer."""
        ids = self._model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return {i for i in (*ids, self.tokenizer.eos_token_id) if i is not None}

    @property
    def pad_id(self) -> int:
        """Any id will do under the attention mask, but never the image placeholder."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    def fingerprint(self) -> str:
        """Hash of what turns a sample into inputs: vocabulary, chat template, image processor, token count, length."""
        images = {k: v for k, v in self.processor.image_processor.to_dict().items() if "processor" not in k}
        layout = {name: getattr(self.processor, name, None) for name in _TOKEN_COUNTS}
        facts = [sorted(self.tokenizer.get_vocab().items()), self._template, images, layout, self.max_length]
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    # ---- one sample ------------------------------------------------------------------------------------------------------

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

    def prompt_text(self, sample: Sample) -> str:
        """The prompt as the chat template writes it, pictures as placeholders; none is loaded."""
        return self._render(sample.prompt_turns, prompt=True)

    def answer_tokens(self, sample: Sample, answer: str) -> list[int]:
        """Token ids with which `answer` to the sample's prompt is learned, up to and with the end."""
        turns = (*sample.prompt_turns, Turn("assistant", answer))
        text = self._segments(replace(sample, turns=turns), True)[-1][0]
        return self._answer_ids(text)

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
        with limited():
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _prompt_ids(self, text: str, pictures: list, *, first: bool) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids of a prompt piece, image placeholders expanded by the processor, and its pixels."""
        bos = self.tokenizer.bos_token
        special = first and not (bos and text.startswith(bos))
        if not pictures:
            return self.tokenizer(text, add_special_tokens=special)["input_ids"], {}
        images = [pictures] if self._family.grouped else pictures
        batch = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=special)
        pixels = {k: torch.as_tensor(v) for k, v in batch.items() if k not in _NO_PIXELS}
        if self._family.nested:
            pixels = {k: v.transpose(0, 1) for k, v in pixels.items()}
        return batch["input_ids"][0].tolist(), pixels

    def _answer_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self.stop_ids.intersection(ids):  # the template writes no end: without one a student never learns to stop
            return [*ids, self.tokenizer.eos_token_id]
        return ids

    def _supervised(self, answer: list[int]) -> list[bool]:
        """An answer is learned up to and with its first end token; what a template writes behind it is never generated."""
        stops = self.stop_ids
        end = next(i for i, token in enumerate(answer) if token in stops)
        return [i <= end for i in range(len(answer))]

    def _fit(
        self, sample: Sample, ids: list[int], supervised: list[bool], pixels: dict[str, Tensor], with_answer: bool
    ) -> Encoded:
        """The sample within `max_length`, with its targets."""
        length, truncated = len(ids), 0
        if length > self.max_length:
            kept = sum(supervised[: self.max_length])
            if not with_answer or kept == 0 or self.image_token_id in ids[self.max_length :]:
                raise DataError(
                    f"sample {sample.id!r} has {length} tokens, more than max_length {self.max_length}, and would lose "
                    "its answer or part of a picture; raise max_length or shorten the prompt"
                )
            truncated = sum(supervised) - kept
            ids, supervised = ids[: self.max_length], supervised[: self.max_length]
        targets = [n if s else IGNORE for n, s in zip(ids[1:], supervised[1:], strict=True)] + [IGNORE]
        return Encoded(sample.id, torch.tensor(ids), torch.tensor(targets), pixels, len(sample.images), truncated)

    # ---- visual positions ------------------------------------------------------------------------------------------------

    def visual_count(self, encoded: Encoded) -> int:
        """Visual tokens of one prepared sample, all its images together."""
        return int((encoded.input_ids == self.image_token_id).sum())

    def with_visual_count(self, encoded: Encoded, count: int) -> Encoded:
        """The sample with `count` visual positions in place of its own: how the model reads another encoder's tokens."""
        is_visual = encoded.input_ids == self.image_token_id
        own = int(is_visual.sum())
        if own == count:
            return encoded
        if any(name in GRIDS for name in encoded.pixels):
            raise TowerError(
                f"{self._kind!r} places its {own} visual tokens by the grid of its own patches, so {count} "
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

    # ---- a batch ---------------------------------------------------------------------------------------------------------

    def collate(self, encoded: Sequence[Encoded], *, padding_side: str = "right") -> TowerInputs:
        """Pads encoded samples into one batch."""
        length = max(len(e.input_ids) for e in encoded)

        def stack(rows: list[Tensor], value: int) -> Tensor:
            out = torch.full((len(rows), length), value, dtype=torch.long)  # [B, L]
            for b, row in enumerate(rows):
                place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
                out[b, place] = row
            return out

        input_ids = stack([e.input_ids for e in encoded], self.pad_id)
        mask = stack([torch.ones_like(e.input_ids) for e in encoded], 0)
        return TowerInputs(
            ids=[e.id for e in encoded],
            input_ids=input_ids,
            attention_mask=mask,
            targets=stack([e.targets for e in encoded], IGNORE),
            visual=(input_ids == self.image_token_id) & mask.bool(),
            pixels=self._joined([e.pixels for e in encoded]),
            images=[e.images for e in encoded],
        )

    def _joined(self, pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        for name, target in self._family.indexed.items():
            pixels = _counted_on(pixels, name, target)
        return _concatenate(pixels, wide=self._family.wide)


def _concatenate(pixels: Sequence[dict[str, Tensor]], wide: bool) -> dict[str, Tensor]:
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


def _image_token_id(model: nn.Module, processor: Any) -> int:
    for owner in (model.config, processor):
        token = getattr(owner, "image_token_id", None)
        if token is not None:
            return token
    raise TowerError(f"{type(model).__name__} names no image token; it is not an image-text model that a tower can wrap")
