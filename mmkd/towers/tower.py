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
import logging
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, reduce
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.errors import TowerError
from mmkd.towers import answering
from mmkd.towers.experts import idle_parameters
from mmkd.towers.export import merged, with_hub_names
from mmkd.towers.families import GRIDS, LANGUAGE_NAMES, REFUSED, VISION_NAMES, family_of
from mmkd.towers.inputs import IGNORE, Encoded, Seen, TowerInputs, VisualTokens, split_features, split_tokens
from mmkd.towers.likelihood import Likelihood
from mmkd.towers.loading import load_model_and_processor
from mmkd.towers.logits import LogitRule, measured_rule
from mmkd.towers.one_sample import preparing
from mmkd.towers.options import configured, not_saved, tell_model
from mmkd.towers.parts import feature_width, first_input, parameters_by_part, part_named
from mmkd.towers.prepare import Preparer
from mmkd.towers.reading import AS_SAVED, Reading
from mmkd.towers.samples import Sample
from mmkd.towers.thinking import ends_within
from mmkd.towers.tokenless import arguments_of, as_dtype, hidden_states, identity, joined, nothing_of
from mmkd.towers.whole import blamed

logger = logging.getLogger(__name__)

__all__ = ["IGNORE", "Encoded", "Seen", "Tower", "TowerInputs", "VisualTokens"]


class Tower:
    """A transformers image-text model with its processor, as teacher or student."""

    def __init__(self, model: nn.Module, processor: Any, *, max_length: int = 2048, reading: Reading = AS_SAVED):
        if (kind := model.config.model_type) in REFUSED:
            raise TowerError(f"{kind!r} can be no tower: {REFUSED[kind]}; take another model")
        self.model = model
        self.processor = configured(processor, model.config.model_type, reading)
        tell_model(model.config, reading)
        self.tokenizer = processor.tokenizer
        self.preparer = Preparer(model, self.processor, max_length=max_length, thinking=reading.thinking, day=reading.date)
        self._family = family_of(model.config.model_type)

    # ---- making, saving ------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        quantise: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        device: torch.device | None = None,
        max_length: int = 2048,
        reading: Reading = AS_SAVED,
    ) -> Tower:
        """A tower from a transformers folder or hub id. `quantise` is "8bit" or "4bit" (bitsandbytes).

        attn_implementation: as transformers names it.  device: where the weights go, straight from their files; None for the CPU.
        reading: options of the processor, the chat template and its arguments, and thinking, where not as the folder says.
        Raises TowerError where no image-text model can be loaded.
        """
        options = {"dtype": dtype, "quantise": quantise, "trust_remote_code": trust_remote_code}
        options |= {"attn_implementation": attn_implementation, "device": device}
        parts = load_model_and_processor(folder, **options)
        with blamed(f"the model {str(folder)!r}"):
            tower = cls(*parts, max_length=max_length, reading=reading)
            tower.pad_id, tower.stop_ids  # noqa: B018  what every batch needs
        return tower

    def save(self, folder: str | Path) -> None:
        """Writes model (safetensors), processor, chat template and generation config: a plain transformers folder, its tensors
        named as those of published models are."""
        with merged(self.model) as model:
            with_hub_names(model).save_pretrained(folder)
        self.processor.save_pretrained(folder)
        if unsaved := not_saved(self.processor):
            logger.warning(
                "%s sets %s itself in every call, and %s cannot keep another value: give it again to whoever loads the model",
                type(self.processor).__name__, ", ".join(unsaved), folder,
            )  # fmt: skip

    # ---- parts ---------------------------------------------------------------------------------------------------

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @property
    def vision(self) -> nn.Module:
        """The vision encoder (in some families the projector is inside it)."""
        return part_named(self.base, VISION_NAMES, "vision encoder")

    @property
    def has_visual_tokens(self) -> bool:
        """Whether pictures are tokens of its text, which another encoder's can stand in for; else it only gives rows."""
        return not self._family.tokenless

    def lacks(self) -> str:
        """Why it has no visual tokens, for messages; "" where it has."""
        why = self._family.tokenless
        return f"{self.model.config.model_type!r} has no visual tokens: {why}" if why else ""

    @property
    def projector_path(self) -> str | tuple[str, ...]:
        """Path of the projector below `base`. Raises TowerError for a family whose projector is not known."""
        if not self.has_visual_tokens:
            raise TowerError(f"{self.lacks()}; it can only be a teacher of rows")
        if self._family.projector is None:
            kind = self.model.config.model_type
            raise TowerError(
                f"where models of type {kind!r} keep their projector is not known, so nothing before it can be compared or "
                "exchanged: leave out the visual switch and terms on vision features, or add the family to "
                "mmkd.towers.families.FAMILIES"
            )
        return self._family.projector

    @property
    def projector(self) -> nn.Module:
        path = self.projector_path
        if isinstance(path, str):
            return self.base.get_submodule(path)
        return nn.Sequential(*map(self.base.get_submodule, path))

    @property
    def language(self) -> nn.Module:
        return part_named(self.base, LANGUAGE_NAMES, "language model")

    @property
    def head(self) -> nn.Module:
        if self._family.head:
            return self.model.get_submodule(self._family.head)
        own = self.model.get_output_embeddings()
        return own if own is not None else self.language.get_output_embeddings()

    @cached_property
    def head_bias(self) -> Tensor | None:
        """What is added to the head's products: its bias, and less than any logit for tokens that the model forbids. [V]"""
        if not self._family.forbidden:
            return self.head.bias
        weight = self.head.weight
        bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        ids = reduce(getattr, self._family.forbidden.split("."), self.model)
        bias[torch.as_tensor(ids, device=bias.device)] = max(-1e30, torch.finfo(bias.dtype).min / 4)
        return bias if self.head.bias is None else bias + self.head.bias.detach()

    @cached_property
    def logit_rule(self) -> LogitRule:
        """(scale, soft cap) between the head and this model's logits: `cap * tanh(scale * head(h) / cap)`.

        Found by comparing with the model's own forward pass. Raises TowerError when no rule explains its logits.
        """
        return measured_rule(self.model, self.head, self.tokenizer)

    @cached_property
    def feature_width(self) -> int:
        """Width Dv that the projector reads, before a pixel shuffle of its own. Raises TowerError where nothing tells it."""
        return feature_width(self.projector)

    def part_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Parameters by part: "vision", "projector", "language" (with embeddings and head)."""
        if not self.has_visual_tokens:  # a teacher of rows is not taken apart
            return {"vision": [], "projector": [], "language": list(self.model.named_parameters())}
        return parameters_by_part(self.model, self.vision, self.projector)

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

    def footprint(self) -> dict[str, Any]:
        """Bytes of the weights, their commonest dtype, and the device."""
        sizes: dict[str, int] = {}
        for parameter in self.model.parameters():
            kind = str(parameter.dtype).removeprefix("torch.")
            sizes[kind] = sizes.get(kind, 0) + parameter.numel() * parameter.element_size()
        return {"weight_bytes": sum(sizes.values()), "dtype": max(sizes, key=sizes.__getitem__), "device": str(self.device)}

    # ---- prepare -------------------------------------------------------------------------------------------------

    def prepare(self, samples: Sequence[Sample], *, padding_side: str = "right") -> TowerInputs:
        """Raw samples -> inputs of this tower: its processor, template, token ids and image size; targets shifted.

        Raises DataError for an empty answer, for a sequence whose answer lies behind `max_length`, and ImageError
        for a picture that does not decode.
        """
        return self.collate([self.encode(sample) for sample in samples], padding_side=padding_side)

    def encode(self, sample: Sample, *, with_answer: bool = True, pictures: list | None = None, keep: bool = False) -> Encoded:
        """One sample, not yet padded; `pictures` stand in for its own, which are then not loaded.

        keep: whether it may come from, and go to, what this process keeps of prepared samples (`Preparer.kept`).

        Raises SampleError, which names the sample, for whatever its processor or template refuses; ImageError, DataError.
        """
        preparer = self.preparer
        with preparing(sample):
            if preparer.kept is None or pictures is not None or not keep:
                return preparer.encode(sample, with_answer=with_answer, pictures=pictures)
            what = "with its answer" if with_answer else "asked"
            return preparer.kept.once(preparer.known_by, sample, what, lambda: preparer.encode(sample, with_answer=with_answer))

    def collate(self, encoded: Sequence[Encoded], *, padding_side: str = "right") -> TowerInputs:
        """Pads encoded samples into one batch."""
        return self.preparer.collate(encoded, padding_side=padding_side)

    @property
    def max_length(self) -> int:
        """Tokens of one sample, at most."""
        return self.preparer.max_length

    @max_length.setter
    def max_length(self, length: int) -> None:
        self.preparer.max_length = length

    @property
    def stop_ids(self) -> set[int]:
        """Token ids that end an answer."""
        return self.preparer.stop_ids

    @property
    def pad_id(self) -> int:
        """Any id will do under the attention mask, but never the image placeholder."""
        return self.preparer.pad_id

    @property
    def image_token_id(self) -> int:
        """The id that marks a visual position."""
        return self.preparer.image_token_id

    def visual_count(self, encoded: Encoded) -> int:
        """Visual tokens of one prepared sample, all its images together."""
        return self.preparer.visual_count(encoded)

    def with_visual_count(self, encoded: Encoded, count: int) -> Encoded:
        """The sample with `count` visual positions in place of its own: how this tower reads another encoder's tokens."""
        return self.preparer.with_visual_count(encoded, count)

    def text_ids(self, encoded: Encoded) -> Tensor:
        """Tokens of one prepared sample without its visual positions."""
        return encoded.input_ids[encoded.input_ids != self.image_token_id]

    def answer_tokens(self, sample: Sample, answer: str) -> list[int]:
        """Token ids with which this tower learns `answer` to the sample's prompt, up to and with the end."""
        return self.preparer.answer_tokens(sample, answer)

    def opens_thinking(self, sample: Sample) -> bool:
        """Whether the sample's prompt ends within a thinking block, as some chat templates write it."""
        return ends_within(self.preparer.prompt_text(sample))

    def token_count(self, texts: Sequence[str]) -> int:
        """Tokens of all texts together, without special ones."""
        return sum(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    def processor_fingerprint(self) -> str:
        """Hash of what turns a sample into inputs: vocabulary, chat template, image processor, token count, length."""
        return self.preparer.fingerprint()

    # ---- see, project --------------------------------------------------------------------------------------------

    def see(self, inputs: TowerInputs) -> Seen:
        """Images -> vision features before the projector and visual tokens after it, one entry an image."""
        if not inputs.pixels:  # also where a picture is no tokens: such a model sees within `read`
            return Seen([], [])
        dtype = next(self.vision.parameters()).dtype
        pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.pixels.items()}
        with first_input(self.projector) as captured:
            output = self.base.get_image_features(**pixels, return_dict=True)
            if self._family.inner_projector:
                output.pooler_output = self.projector(output.last_hidden_state).flatten(0, -2)
        tokens = split_tokens(output.pooler_output, inputs)
        if layers := getattr(output, "deepstack_features", None):
            tokens = [torch.cat([token, *more], dim=-1) for token, *more in zip(tokens, *layers, strict=True)]
        return Seen(split_features(captured, tokens), tokens, output)

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

    # ---- read ----------------------------------------------------------------------------------------------------

    def read(self, inputs: TowerInputs, visual_tokens: Sequence[Tensor] | Seen) -> Tensor:
        """Text and visual tokens -> last hidden states before the head. [B, L, D]

        Of a family without visual tokens: text and the inputs' own pictures, by its ordinary forward pass.
        """
        if not self.has_visual_tokens:
            return hidden_states(self.model, self.head, self._family, inputs)
        arguments = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "mm_encoder_outputs": self.encoder_outputs(visual_tokens),
            "use_cache": False,
            "return_dict": True,
            **self.layout(inputs),
        }
        if self._family.absolute:
            arguments["position_ids"] = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
        if self.base is not self.model:
            return self.base(**arguments).last_hidden_state
        with first_input(self.head) as captured, nothing_of(self.head), self.given_tokens():  # its head cannot be left away
            self.model(**arguments)
        return captured[0]

    def arguments(self, inputs: TowerInputs) -> dict[str, Any]:
        """The arguments of the model's own forward pass over a batch with its own pictures; samples of a family without visual
        tokens must be alike."""
        text = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        if not self.has_visual_tokens:
            beside = joined(inputs.each, self._family, inputs.input_ids.shape[1])
            return arguments_of(self.model, self._family, text, beside)
        return {**text, "use_cache": False, **as_dtype(inputs.pixels, self.model), **self.layout(inputs)}

    def given_tokens(self) -> AbstractContextManager[None]:
        """While the model is given visual tokens: one that projects within its forward pass leaves them as they are."""
        return identity(self.projector) if self._family.inner_projector else nullcontext()

    def encoder_outputs(self, tokens: Sequence[Tensor] | Seen) -> dict[str, Any]:
        """Visual tokens in the form in which transformers takes them; {} when there is no image."""
        if isinstance(tokens, Seen):
            if tokens.output is not None and not self._family.inner_projector:
                return {"image": tokens.output}
            tokens = tokens.tokens
        if not len(tokens):
            return {}
        if self._family.inner_projector:
            return {"image": VisualTokens(last_hidden_state=torch.cat(list(tokens))[None])}
        pooled, layers = self._deepstack(tokens)
        stacked = torch.cat(pooled)[None] if self._family.stacked else pooled
        indicators = self._indicators() if self._family.indicators else None
        return {"image": VisualTokens(pooler_output=stacked, deepstack_features=layers, visual_indicator_features=indicators)}

    def _deepstack(self, tokens: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, ...]] | None]:
        """Visual tokens and what goes to the first layers, one tuple a layer. Tokens of another encoder bring none of that."""
        if not self._family.deepstack:
            return list(tokens), None
        width = self.model.get_input_embeddings().weight.shape[1]
        pieces = [token.split(width, dim=-1) for token in tokens]
        return [piece[0] for piece in pieces], list(zip(*(piece[1:] for piece in pieces), strict=True))

    @torch.no_grad()
    def _indicators(self) -> Tensor:
        """The tokens around and between pictures: embeddings of the last entries of the visual vocabulary. [k, D]"""
        vision = self.model.config.vision_config
        ids = torch.arange(vision.vocab_size - vision.num_visual_indicator_tokens, vision.vocab_size, device=self.device)
        return self.projector(ids)

    def layout(self, inputs: TowerInputs) -> dict[str, Tensor]:
        """What some families place their tokens by, beside ids and mask: token types, and the pictures' grids."""
        ids = [i for i in getattr(self.processor, "image_token_ids", None) or [] if i is not None] or [self.image_token_id]
        is_image = torch.isin(inputs.input_ids, torch.tensor(ids, device=inputs.input_ids.device))
        marks = {"mm_token_type_ids": (is_image & inputs.attention_mask.bool()).long()}
        if self._family.token_types is not None:
            marks["token_type_ids"] = getattr(inputs, self._family.token_types).long()
        for name, tokens in self._family.token_marks.items():
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

    def answer(self, samples: Sequence[Sample], *, max_new_tokens: int, vision_cache: MutableMapping | None = None) -> list[str]:
        """Greedy answers of one batch. `vision_cache` keeps what was seen by the pictures (see `VisionCache`)."""
        with blamed(f"answering with {type(self.model).__name__}"):
            return answering.generate(self, samples, max_new_tokens, vision_cache)

    def choose(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]], *, vision_cache: MutableMapping | None = None
    ) -> list[int]:
        """The likeliest of each sample's options, in one forward pass. Raises TowerError (see `answering.choose`)."""
        with blamed(f"answering with {type(self.model).__name__}"):
            return answering.choose(self, samples, options, vision_cache)

    def answer_with_likelihood(
        self,
        samples: Sequence[Sample],
        options: Sequence[Sequence[str] | None],
        references: Sequence[str | None],
        *,
        max_new_tokens: int,
        vision_cache: MutableMapping | None = None,
    ) -> tuple[list[str], list[Likelihood]]:
        """`answer`, and how likely each answer, the sample's choices and its reference are (see `Likelihood`)."""
        with blamed(f"answering with {type(self.model).__name__}"):
            return answering.generate_with_likelihood(self, samples, options, references, max_new_tokens, vision_cache)

    def choose_with_likelihood(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]], *, vision_cache: MutableMapping | None = None
    ) -> tuple[list[int], list[Likelihood]]:
        """`choose`, and the logits of all options."""
        with blamed(f"answering with {type(self.model).__name__}"):
            return answering.choose_with_likelihood(self, samples, options, vision_cache)
