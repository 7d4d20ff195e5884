"""Cross-encoders: models that read a picture and a text together and say how likely they match.

Three kinds. `ItmEncoder` is BLIP's image-text-matching head (transformers' `BlipForImageTextRetrieval`), `FusionEncoder` a small
one of our own over any vision and text encoder; `load_matching` recognises these two by their folder. `PromptedTower` asks any
vision-language tower whether the text fits and compares its answers "yes" and "no". All give log-odds, with gradient; the score
of CPRD is their sigmoid, a probability.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.errors import TowerError
from mmkd.retrieval.dual_encoders import text_length, weights_fingerprint
from mmkd.towers.inputs import tokens_by_sample
from mmkd.towers.logits import scaled
from mmkd.towers.tower import Tower
from mmkd.towers.whole import load_beside, load_whole

QUESTION = "Does the picture show: {text}? Answer yes or no."


class CrossEncoder(ABC):
    """Scores pairs of pictures and texts."""

    model: nn.Module

    @abstractmethod
    def see(self, images: Sequence[ImageRef]) -> Sequence[Tensor]:
        """The model's states of the pictures, one entry a picture; computed once for all texts."""

    @abstractmethod
    def log_odds(self, images: Sequence[ImageRef], seen: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Log-odds that picture i (`seen[i]`, from `see`) and text i match. [P]"""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that the scores depend on besides picture and text."""

    def freeze(self) -> CrossEncoder:
        """As a teacher: evaluation mode, no gradient to its parameters."""
        self.model.requires_grad_(False)
        self.model.eval()
        return self

    def parameter_count(self) -> dict[str, int]:
        total = sum(p.numel() for p in self.model.parameters())
        return {"total": total, "active": total}

    @torch.no_grad()
    def scores(self, images: Sequence[ImageRef], texts: Sequence[str], pairs: Tensor, *, batch_size: int = 256) -> Tensor:
        """Probability of a match, for `pairs` [P, 2] of a picture's and a text's number; float32 on the CPU. [P]

        Pairs with texts of like length are scored together, since the rest of a batch is padded.
        """
        numbers = pairs[:, 0].unique().tolist()
        pictures = [images[n] for n in numbers]
        seen: dict[int, Tensor] = {}
        for start in range(0, len(numbers), batch_size):
            part = slice(start, start + batch_size)
            seen |= dict(zip(numbers[part], self.see(pictures[part]), strict=True))
        rows = pairs.tolist()
        order = sorted(range(len(rows)), key=lambda i: len(texts[rows[i][1]]))
        scores = torch.empty(len(rows))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            chunk = [rows[i] for i in chosen]
            odds = self.log_odds([images[i] for i, _ in chunk], [seen[i] for i, _ in chunk], [texts[t] for _, t in chunk])
            scores[chosen] = odds.float().sigmoid().cpu()
        return scores


class MatchingEncoder(CrossEncoder):
    """A cross-encoder with unimodal embeddings and a matching head, which can be trained (mmkd.retrieval.matching)."""

    def __init__(self, model: nn.Module, processor: Any):
        self.model, self.processor = model, processor

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a text that the model reads at most."""

    @abstractmethod
    def states(self, pixels: Tensor) -> Tensor:
        """The vision encoder's states. [n, 3, H, W] -> [n, N, Dv]"""

    @abstractmethod
    def match(self, states: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Log-odds from vision states [P, N, Dv] and the tokens of P texts. [P]"""

    @abstractmethod
    def similarities(self, states: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Cosines of the unimodal embeddings, pictures by texts. [B, B]"""

    def save(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def fingerprint(self) -> str:
        facts = [
            weights_fingerprint(self.model),
            str(sorted(self.processor.tokenizer.get_vocab().items())),
            str(self.processor.image_processor.to_dict()),
        ]
        return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def pixels(self, images: Sequence[ImageRef]) -> Tensor:
        """[n, 3, H, W]"""
        batch = self.processor.image_processor(images=[ref.load() for ref in images], return_tensors="pt")
        return batch["pixel_values"].to(self.device, self.model.dtype)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask. [n, L] each"""
        batch = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def see(self, images: Sequence[ImageRef]) -> Tensor:
        return self.states(self.pixels(images))

    def log_odds(self, images: Sequence[ImageRef], seen: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        places = torch.tensor([distinct[text] for text in texts])
        return self.match(torch.stack(list(seen)), {name: ids[places] for name, ids in self.tokens(list(distinct)).items()})


class ItmEncoder(MatchingEncoder):
    """BLIP's image-text-matching head: the text encoder reads the caption, attending to the picture's states.

    The tokenizer's first token takes the place of BLIP's [ENC], as in transformers' own forward pass.
    """

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype | str = "auto") -> ItmEncoder:
        """From a folder or hub id of a `BlipForImageTextRetrieval`. Raises TowerError."""
        from transformers import AutoProcessor, BlipForImageTextRetrieval

        try:
            model = load_whole(BlipForImageTextRetrieval, folder, "BLIP with a matching head", dtype=dtype)
        except TowerError as error:
            head = "no image-text-matching head: " if "itm_head" in str(error) else ""
            raise TowerError(f"{head}{error}; use a BLIP made for retrieval (blip-itm-...)") from error
        return cls(model, load_beside(AutoProcessor, folder, "BLIP's processor"))

    @property
    def length(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def states(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    def match(self, states: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.model.text_encoder(
            **tokens,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        ).last_hidden_state  # [P, L, D]
        no, yes = self.model.itm_head(hidden[:, 0]).unbind(-1)
        return yes - no

    def similarities(self, states: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.model.text_encoder(**tokens).last_hidden_state
        images = F.normalize(self.model.vision_proj(states[:, 0]), dim=-1)
        texts = F.normalize(self.model.text_proj(hidden[:, 0]), dim=-1)
        return images @ texts.T


class FusionEncoder(MatchingEncoder):
    """A `mmkd.retrieval.fusion.FusionModel`: cross-attention on the two encoders of a dual encoder."""

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype | str = "auto") -> FusionEncoder:
        """From a folder that `save` wrote."""
        from transformers import VisionTextDualEncoderProcessor

        from mmkd.retrieval.fusion import FusionModel

        model = load_whole(FusionModel, folder, "cross-encoder", dtype=dtype)
        return cls(model, load_beside(VisionTextDualEncoderProcessor, folder, "cross-encoder"))

    @property
    def length(self) -> int:
        return text_length(self.model.config.dual.text_config, self.processor.tokenizer)

    def states(self, pixels: Tensor) -> Tensor:
        return self.model.see(pixels)

    def match(self, states: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        return self.model(states, self.model.read(tokens), tokens["attention_mask"])

    def similarities(self, states: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        return self.model.embed_pictures(states) @ self.model.embed_texts(self.model.read(tokens)).T


def load_matching(folder: str | Path, dtype: torch.dtype | str = "auto") -> MatchingEncoder:
    """The cross-encoder with a matching head at a folder or hub id: a BLIP or a fusion model. Raises TowerError."""
    from transformers import AutoConfig

    import mmkd.retrieval.fusion  # noqa: F401  registers its configuration

    kinds: dict[str, type[ItmEncoder] | type[FusionEncoder]] = {"blip": ItmEncoder, "mmkd_fusion": FusionEncoder}
    found = load_beside(AutoConfig, folder, "cross-encoder").model_type
    if found in kinds:
        return kinds[found].load(folder, dtype)
    raise TowerError(
        f"{str(folder)!r} is a {found!r}, not a BLIP; set teacher.kind=prompted to ask a vision-language model"
    )


class PromptedTower(CrossEncoder):
    """A vision-language tower as a cross-encoder: P("yes") of a matching question.

    The question, with the text in it, and each of the two answers are prepared as a training sample would be: the tower's own
    template, the answer with its end token. With `log p(answer)` the sum over the answer's tokens, the log-odds are
    `log p(yes) - log p(no)`, so the score is the probability of yes among these two answers alone.
    """

    def __init__(self, tower: Tower, question: str = QUESTION, yes: str = "yes", no: str = "no"):
        if "{text}" not in question:
            raise TowerError(f"the matching question {question!r} has no place for the text; write {{text}} in it")
        self.tower, self.question, self.answers = tower, question, (yes, no)
        self.model = tower.model

    def fingerprint(self) -> str:
        facts = "\n".join([self.tower.fingerprint(), self.question, *self.answers])
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def see(self, images: Sequence[ImageRef]) -> list[Tensor]:
        samples = [Sample(ref.key, (ref,), (Turn("user", "", 1),)) for ref in images]
        encoded = [self.tower.encode(sample, with_answer=False) for sample in samples]
        tokens = self.tower.see(self.tower.collate(encoded).to(self.tower.device)).tokens
        counts = [self.tower.visual_count(one) for one in encoded]
        return [torch.cat(entries) for entries in tokens_by_sample(tokens, counts)]  # each [n, D]

    def log_odds(self, images: Sequence[ImageRef], seen: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        yes, no = (self._log_probability(images, seen, texts, answer) for answer in self.answers)
        return yes - no

    def _log_probability(self, images: Sequence[ImageRef], seen: Sequence[Tensor], texts: Sequence[str], answer: str) -> Tensor:
        """Log-probability of an answer with its end token. [P]"""
        samples = []
        for ref, text in zip(images, texts, strict=True):
            turns = (Turn("user", self.question.replace("{text}", text), 1), Turn("assistant", answer))
            samples.append(Sample(f"{ref.key} {text}", (ref,), turns))
        inputs = self.tower.prepare(samples).to(self.tower.device)
        hidden = self.tower.read(inputs, list(seen))  # [P, L, D]
        rows = inputs.response  # [P, L]
        log_p = self._logits(hidden[rows]).log_softmax(-1)  # [R, V]
        chosen = log_p.gather(-1, inputs.targets[rows][:, None])[:, 0]  # [R]
        owner = rows.nonzero()[:, 0]  # [R]
        return chosen.new_zeros(len(samples)).index_add(0, owner, chosen)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The tower's logits in float32, over the tokens that its tokenizer knows. [R, V]"""
        return scaled(self.tower.head(hidden)[:, : self.tower.vocabulary].float(), self.tower.logit_rule)
