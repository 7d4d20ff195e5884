"""Answers of a tower: by greedy generation, or by the likelihood of given choices. Each picture is seen once.

Visual tokens are kept in a cache (`VisionCache`), and with them what the processor made of the picture but its pixels: with
both, the next question on a picture costs neither its decoding nor its resizing nor the vision encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from mmkd.errors import SampleError, TowerError
from mmkd.towers.families import GRIDS
from mmkd.towers.greedy import Prompt, check_logits, generated
from mmkd.towers.inputs import IGNORE, Encoded, tokens_by_sample, with_answer_ids
from mmkd.towers.likelihood import FirstTokens, Likelihood, Recorder, logits_of, of_words
from mmkd.towers.modes import evaluating
from mmkd.towers.one_sample import preparing
from mmkd.towers.protocol import TowerLike
from mmkd.towers.samples import Sample
from mmkd.towers.thinking import decode_answers
from mmkd.towers.tokenless import generate as own_generation
from mmkd.towers.vision_cache import Key

_SMALL = 4096  # elements; whatever is larger and of floating point is pixels


@dataclass(frozen=True)
class SeenOnce:
    """What is kept of one sample's pictures: visual tokens, each [n_i, D], and the processor's output without pixels.

    `processed` is None where the processor cannot do without the picture itself.
    """

    tokens: list[Tensor]
    processed: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        return sum(token.numel() * token.element_size() for token in self.tokens)


@torch.no_grad()  # not inference mode: what a module keeps from here must do for training, too
def generate(
    tower: TowerLike, samples: Sequence[Sample], max_new_tokens: int, cache: MutableMapping[Key, SeenOnce] | None
) -> list[str]:
    """Greedy answers of one batch."""
    with evaluating(tower.model), tower.given_tokens():
        if not tower.has_visual_tokens:
            return _by_own_generation(tower, samples, max_new_tokens)
        return _words(tower, _generated(tower, samples, max_new_tokens, cache, None))


def _generated(
    tower: TowerLike, samples: Sequence[Sample], max_new_tokens: int, cache: MutableMapping[Key, SeenOnce] | None,
    watch: Recorder | None,
) -> list[list[int]]:  # fmt: skip
    encoded, tokens = _encode(tower, samples, cache)
    by_sample = tokens_by_sample(tokens, [tower.visual_count(one) for one in encoded])
    keys = [tuple(ref.key for ref in sample.images) for sample in samples]
    prompts = [Prompt(*row) for row in zip(encoded, by_sample, keys, strict=True)]
    return generated(tower, prompts, max_new_tokens, [watch] if watch else []).tolist()


def _words(tower: TowerLike, rows: Sequence[Sequence[int]]) -> list[str]:
    return [answer.strip() for answer in decode_answers(tower.tokenizer, rows)]  # templates may leave a space before the answer


@torch.no_grad()
def generate_with_likelihood(
    tower: TowerLike,
    samples: Sequence[Sample],
    options: Sequence[Sequence[str] | None],
    references: Sequence[str | None],
    max_new_tokens: int,
    cache: MutableMapping[Key, SeenOnce] | None,
) -> tuple[list[str], list[Likelihood]]:
    """Greedy answers, and how likely the model finds them, the choices (`options`) and the references, where one is given.

    A reference costs a forward pass over its sample only where it is not what was answered, and so do choices that all begin with
    a token (a space, with some tokenizers) with which the answer does not begin.
    """
    if not tower.has_visual_tokens:
        return generate(tower, samples, max_new_tokens, cache), [Likelihood()] * len(samples)
    cache = {} if cache is None else cache
    firsts = [None if o is None else _told_apart(tower, s, o) for s, o in zip(samples, options, strict=True)]
    recorder = Recorder(tower.stop_ids, firsts)
    with evaluating(tower.model), tower.given_tokens():
        rows = _generated(tower, samples, max_new_tokens, cache, recorder)
    own = recorder.own.tolist()
    asked = [None if r is None else _answer_tokens(tower, s, r) for s, r in zip(samples, references, strict=True)]
    found = [values if ids and row[: len(ids)] == ids else None for ids, row, values in zip(asked, rows, own, strict=True)]
    todo = [n for n, ids in enumerate(asked) if ids and len(ids) <= max_new_tokens and found[n] is None]
    for n, values in zip(todo, _likelihood_of(tower, [samples[n] for n in todo], [asked[n] for n in todo], cache), strict=True):
        found[n] = values
    choices = list(recorder.choices)
    unseen = [n for n, first in enumerate(firsts) if first is not None and choices[n] is None]
    if unseen:
        _, by_pass = choose_with_likelihood(tower, [samples[n] for n in unseen], [options[n] for n in unseen], cache)
        for n, likelihood in zip(unseen, by_pass, strict=True):
            choices[n] = likelihood.choices
    return _words(tower, rows), [Likelihood(*each) for each in zip(choices, own, found, strict=True)]


def _answer_tokens(tower: TowerLike, sample: Sample, answer: str) -> list[int] | None:
    """Of a reference; None for one that the model's template cannot hold as an answer."""
    try:
        return tower.answer_tokens(sample, answer)
    except (SampleError, TowerError):
        return None


def _told_apart(tower: TowerLike, sample: Sample, options: Sequence[str]) -> FirstTokens | None:
    """The tokens by which options differ; None where the first ones do not tell them apart."""
    try:
        return _first_tokens(tower, sample, options)
    except (SampleError, TowerError):
        return None


def _likelihood_of(
    tower: TowerLike, samples: Sequence[Sample], words: Sequence[Sequence[int]], cache: MutableMapping[Key, SeenOnce]
) -> list[list[float] | None]:
    """Of the words as an answer; None where the model's logits are not known (see `logits_of`)."""
    if not samples:
        return []
    with evaluating(tower.model):
        encoded, tokens = _encode(tower, samples, cache)
        inputs = tower.collate([with_answer_ids(one, ids) for one, ids in zip(encoded, words, strict=True)]).to(tower.device)
        try:
            return list(of_words(tower, inputs, tokens, words))
        except TowerError:
            return [None] * len(samples)


def _by_own_generation(tower: TowerLike, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """Greedy answers of a model without visual tokens, one sample at a time by transformers' own generation."""
    inputs = tower.collate([tower.encode(sample, with_answer=False) for sample in samples]).to(tower.device)
    options = {"pad_token_id": tower.pad_id, "eos_token_id": sorted(tower.stop_ids), "do_sample": False, "num_beams": 1}
    rows = own_generation(tower.model, tower.preparer.family, inputs, max_new_tokens=max_new_tokens, **options)
    return [answer.strip() for answer in decode_answers(tower.tokenizer, rows)]


@torch.no_grad()
def choose(
    tower: TowerLike,
    samples: Sequence[Sample],
    options: Sequence[Sequence[str]],
    cache: MutableMapping[Key, SeenOnce] | None,
) -> list[int]:
    """The likeliest of each sample's options, by one forward pass over the batch (see `choose_with_likelihood`)."""
    return choose_with_likelihood(tower, samples, options, cache)[0]


@torch.no_grad()
def choose_with_likelihood(
    tower: TowerLike,
    samples: Sequence[Sample],
    options: Sequence[Sequence[str]],
    cache: MutableMapping[Key, SeenOnce] | None,
) -> tuple[list[int], list[Likelihood]]:
    """The likeliest of each sample's options, by one forward pass over the batch, and the logits of all of them.

    An option stands for the tokens with which the tower would begin that answer. What all of them begin with (a space, with
    some tokenizers) is read as part of the prompt; the logits of the token after it are compared.
    Raises TowerError where two options have the same token there.
    """
    with evaluating(tower.model):
        encoded, tokens = _encode(tower, samples, cache)
        shared, ids = zip(*(_first_tokens(tower, s, o) for s, o in zip(samples, options, strict=True)), strict=True)
        inputs = tower.collate([_extended(e, s) for e, s in zip(encoded, shared, strict=True)]).to(tower.device)
        hidden = tower.read(inputs, tokens)  # [B, L, D]
        last = inputs.attention_mask.sum(1) - 1
        rows = hidden[torch.arange(len(samples), device=last.device), last]  # [B, D]
        logits = tower.head(rows)  # [B, V]
        check_logits(logits.amax(-1))
        # A head's scale is positive and a soft cap monotone: neither changes which is largest.
        best = [int(row[torch.tensor(allowed, device=row.device)].argmax()) for row, allowed in zip(logits, ids, strict=True)]
        try:
            own = logits_of(tower, rows)  # [B, V]
        except TowerError:
            return best, [Likelihood()] * len(samples)
    return best, [Likelihood(row[allowed].tolist()) for row, allowed in zip(own.cpu(), ids, strict=True)]


def _first_tokens(tower: TowerLike, sample: Sample, options: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens that all options begin with, and the next one of each."""
    pieces = [tower.answer_tokens(sample, option) for option in options]
    shared = 0
    while all(len(piece) > shared + 1 for piece in pieces) and len({piece[shared] for piece in pieces}) == 1:
        shared += 1
    after = [piece[shared] for piece in pieces]
    if len(set(after)) < len(after):
        raise TowerError(
            f"the options {list(options)} begin with the tokens {after}, not all different, so one pass cannot tell them "
            "apart; answer by generation"
        )
    return pieces[0][:shared], after


def _extended(encoded: Encoded, ids: Sequence[int]) -> Encoded:
    if not ids:
        return encoded
    more = torch.tensor(ids)
    return replace(
        encoded,
        input_ids=torch.cat([encoded.input_ids, more]),
        targets=torch.cat([encoded.targets, torch.full_like(more, IGNORE)]),
    )


# ---- pictures ----------------------------------------------------------------------------------------------------------


def _encode(
    tower: TowerLike, samples: Sequence[Sample], cache: MutableMapping[Key, SeenOnce] | None
) -> tuple[list[Encoded], list[Tensor]]:
    """Prompts without pixels, and the visual tokens of all pictures in order; the encoder runs for new pictures only."""
    keys = [tuple(ref.key for ref in sample.images) for sample in samples]
    if not tower.has_visual_tokens:
        return [tower.encode(sample, with_answer=False) for sample in samples], []
    cache = {} if cache is None else cache
    known = {key: cache[key] for key in keys if key and key in cache}
    prepared: dict[Key, dict[str, Any] | None] = {}
    first: dict[Key, Encoded] = {}
    encoded = []
    for key, sample in zip(keys, samples, strict=True):
        processed = known[key].processed if key in known else prepared.get(key)
        with preparing(sample):
            one, seen_now = _kept_one(tower, sample, processed)
        encoded.append(one)
        if key and key not in known and key not in first:
            first[key], prepared[key] = one, seen_now
    for key, tokens in zip(first, _see(tower, list(first.values())), strict=True):
        cache[key] = known[key] = SeenOnce(tokens, prepared[key])
    return [_without_pixels(one) for one in encoded], [token for key in keys if key for token in known[key].tokens]


def _see(tower: TowerLike, encoded: list[Encoded]) -> list[list[Tensor]]:
    """Visual tokens of each sample's pictures."""
    if not encoded:
        return []
    tokens = tower.see(tower.collate(encoded).to(tower.device)).tokens
    return tokens_by_sample(tokens, [tower.visual_count(one) for one in encoded])


def see_prompts(tower: TowerLike, prompts: Sequence[tuple[Encoded, Any]]) -> list[Prompt]:
    """Prepared prompts, each with what names its pictures, as generation takes them; pictures of one name are seen once."""
    first: dict[Any, Encoded] = {}
    for encoded, key in prompts:
        if encoded.images:
            first.setdefault(key, encoded)
    tokens = dict(zip(first, _see(tower, list(first.values())), strict=True))
    return [Prompt(_without_pixels(encoded), tokens.get(key, []) if encoded.images else [], key) for encoded, key in prompts]


def _without_pixels(encoded: Encoded) -> Encoded:
    """Only what tokens are placed by stays: the grids."""
    return replace(encoded, pixels={name: value for name, value in encoded.pixels.items() if name in GRIDS})


def _kept_one(tower: TowerLike, sample: Sample, processed: dict[str, Any] | None) -> tuple[Encoded, dict[str, Any] | None]:
    """What `_encode_one` gives, kept where this process keeps prepared samples; without pixels where `processed` is known."""
    preparer = tower.preparer
    if preparer.kept is None:
        return _encode_one(tower, sample, processed)
    if processed is None:
        return preparer.kept.once(preparer.known_by, sample, "asked and recorded", lambda: _encode_one(tower, sample, None))
    asked = lambda: _without_pixels(_encode_one(tower, sample, processed)[0])  # noqa: E731
    return preparer.kept.once(preparer.known_by, sample, "asked, its pictures known", asked), processed


def _encode_one(tower: TowerLike, sample: Sample, processed: dict[str, Any] | None) -> tuple[Encoded, dict[str, Any] | None]:
    """One prompt, and the processor's output for its pictures if it will do in their place.

    That is tried at once: a processor that counts its tokens by the picture itself gives other ids without it.
    """
    if not sample.images:
        return tower.encode(sample, with_answer=False), None
    if processed is not None:
        return _replayed(tower, sample, processed), processed
    recorder = _StandIn(tower.preparer.processor.image_processor)
    encoded = tower.preparer.with_image_processor(recorder).encode(sample, with_answer=False)
    if len(recorder.outputs) != 1:
        return encoded, None
    processed = {name: _hollow(value) for name, value in recorder.outputs[0].items()}
    again = _replayed(tower, sample, processed)
    return encoded, processed if torch.equal(again.input_ids, encoded.input_ids) else None


def _hollow(value: Any) -> Any:
    """A tensor of the same shape that takes no memory, in place of pixels; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > _SMALL:
        return value.new_zeros(1).expand(value.shape)
    if isinstance(value, list):
        return [_hollow(entry) for entry in value]
    return value


class _StandIn:
    """In an image processor's place: keeps what the real one gives, or, with `processed`, gives that and runs none.

    What else is asked of it comes from the real one.
    """

    def __init__(self, real: Any, processed: Mapping[str, Any] | None = None) -> None:
        self._real, self._processed = real, processed
        self.outputs: list[BatchFeature] = []

    def __call__(self, *arguments: Any, **options: Any) -> BatchFeature:
        if self._processed is not None:
            return BatchFeature(dict(self._processed))
        output = self._real(*arguments, **options)
        self.outputs.append(BatchFeature(dict(output)))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _replayed(tower: TowerLike, sample: Sample, processed: dict[str, Any]) -> Encoded:
    replayer = _StandIn(tower.preparer.processor.image_processor, processed)
    blank = [Image.new("RGB", (1, 1))] * len(sample.images)
    return tower.preparer.with_image_processor(replayer).encode(sample, with_answer=False, pictures=blank)
