"""What a tower and an encoder must do.

    check_tower(Tower.load(folder))              everything that distillation relies on, on real samples or on random ones
    check_rows(Tower.load(folder))               what a teacher of rows needs: KL, JSD, DBiLD and the like at the answers' rows
    check_encoder(MyEncoder(), (224, 224))       what an encoder of your own must do, before it is put into a student

Each check returns what it measured, or raises TowerError with the values and the way out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.errors import SampleError, TowerError
from mmkd.teachers.teacher import head_of
from mmkd.towers.encoders import WrappedEncoder, tokens_of
from mmkd.towers.logits import scaled
from mmkd.towers.modes import evaluating
from mmkd.towers.tower import Tower, TowerInputs

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.05}  # of the largest value
NO_SWITCH = "not with this family: "  # begins the fact "visual switch" where features cannot be projected
NEW_TOKENS = 8  # of each answer that is compared


# ---- towers ----------------------------------------------------------------------------------------------------------


def check_tower(tower: Tower, samples: Sequence[Sample] | None = None) -> dict[str, Any]:
    """Checks that a model works as teacher and student; returns what was measured. Takes some dozen forward passes.

    samples: with an answer; pictures that differ, at best also a sample without and one with two pictures. Random ones
    when None. The model is saved and loaded once (in a temporary folder) and left as it was.
    """
    if not tower.has_visual_tokens:
        raise TowerError(f"{tower.lacks()}; it can only be a teacher of rows (`check_rows`)")
    with TemporaryDirectory() as folder, _kept_as_it_is(tower):
        samples = list(samples) if samples is not None else example_samples(Path(folder) / "pictures")
        inputs = tower.prepare(samples).to(tower.device)
        facts: dict[str, Any] = {
            "samples": len(samples),
            "samples without a picture": sum(not s.images for s in samples),
            "samples with several pictures": sum(len(s.images) > 1 for s in samples),
        }
        facts |= _check_targets(tower, samples)
        facts |= _check_talk(tower, samples)
        facts |= _check_visual_positions(tower, inputs)
        facts |= _check_swapped(tower, samples)
        facts |= _check_prompts(tower, samples)
        facts |= _check_injection(tower, inputs)
        facts |= _check_padding(tower, samples, inputs)
        facts |= _check_projection(tower, inputs)
        facts |= _check_gradient(tower, inputs)
        answers = tower.answer(samples, max_new_tokens=NEW_TOKENS)
        facts |= _check_batches(tower, samples, answers)
        facts |= _check_saving(tower, samples, inputs, answers, Path(folder) / "model")
    return facts


def check_rows(tower: Tower, samples: Sequence[Sample] | None = None) -> dict[str, Any]:
    """Checks that a model works as a teacher of rows: its logits at the answers' rows; returns what was measured.

    samples: as for `check_tower`, of which those that its family does not read (several pictures, or none) are left out.
    """
    with TemporaryDirectory() as folder, _kept_as_it_is(tower):
        samples = list(samples) if samples is not None else example_samples(Path(folder) / "pictures")
        samples, left_out = _readable(tower, samples)
        facts: dict[str, Any] = {"samples": len(samples), "samples that it does not read": left_out}
        facts |= _check_targets(tower, samples)
        facts |= _check_swapped(tower, samples)
        facts |= _check_rows(tower, samples)
        answers = tower.answer(samples, max_new_tokens=NEW_TOKENS)
        facts |= _check_batches(tower, samples, answers)
    return facts


def _readable(tower: Tower, samples: Sequence[Sample]) -> tuple[list[Sample], int]:
    """Those that the tower prepares; raises TowerError where that is none with a picture."""
    kept, why = [], ""
    for sample in samples:
        try:
            tower.encode(sample)
            kept.append(sample)
        except SampleError as error:
            why = why or str(error)
    if not any(sample.images for sample in kept):
        raise TowerError(f"no sample with a picture can be prepared: {why}")
    return kept, len(samples) - len(kept)


@torch.no_grad()
def _check_rows(tower: Tower, samples: Sequence[Sample]) -> dict[str, Any]:
    """Logits of the answers' rows, in a batch, are those of the model's own forward pass.

    Of a family that reads samples apart, over each sample alone; else over the same batch, since some encoders (HunYuan-VL) let
    the pictures of a batch change each other a little.
    """
    inputs = tower.prepare(samples).to(tower.device)
    ours = _logits(tower, tower.read(inputs, tower.see(inputs))[inputs.response])
    own = []
    groups = [list(samples)] if tower.has_visual_tokens else [[sample] for sample in samples]
    for group in groups:
        alone = tower.prepare(group).to(tower.device)
        logits = tower.model(**tower.arguments(alone)).logits[:, -alone.input_ids.shape[1] :]
        own.append(logits[alone.response])
    wanted = torch.cat(own).float()
    real = wanted > torch.finfo(own[0].dtype).min / 8  # not those of tokens that the model forbids
    difference = _same("rows", tower, torch.where(real, ours.float(), 0), torch.where(real, wanted, 0), "the model's own logits")
    if not bool((ours[~real] < wanted[real].min()).all()):
        raise TowerError("rows: tokens that the model forbids have logits like others")
    return {"largest difference from the model's logits": difference}


def example_samples(folder: Path) -> list[Sample]:
    """Five samples on random pictures of several sizes: three with one, one with two, one without."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    refs = []
    for number, size in enumerate([(64, 48), (48, 64), (80, 80), (64, 64), (40, 56)]):
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(folder / f"{number}.png")
        refs.append(ImageRef.inside(folder, f"{number}.png"))
    ask = ["What colour is it?", "How many are there in all?", "Read the word.", "Do both show the same?", "What is two and two?"]
    say = ["red", "seven of them", "stop", "no", "four"]
    pictures = [refs[:1], refs[1:2], refs[2:3], refs[3:5], []]
    return [
        Sample(f"example {i}", tuple(p), (Turn("user", q, len(p)), Turn("assistant", a)))
        for i, (q, a, p) in enumerate(zip(ask, say, pictures, strict=True))
    ]


@contextmanager
def _kept_as_it_is(tower: Tower) -> Iterator[None]:
    """Evaluation mode meanwhile; mode, gradients and what is trained are put back."""
    parameters = [(p, p.requires_grad, p.grad) for p in tower.model.parameters()]
    try:
        with evaluating(tower.model):
            yield
    finally:
        for parameter, trained, gradient in parameters:
            parameter.requires_grad_(trained).grad = gradient


def _check_targets(tower: Tower, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the response rows predict, decoded, is the answers and an end."""
    if stray := tower.preparer.no_end:
        raise TowerError(
            f"targets: the chat template ends an answer with {stray!r}, which is no end token; ends are "
            f"{sorted(tower.stop_ids)}. Use another chat template"
        )
    for sample in samples:
        encoded = tower.encode(sample)
        if wrong := tower.preparer.misread(sample, encoded):
            raise TowerError(f"targets: {wrong}; the tokenizer changes answers. Use another one, or another chat template")
        ids = encoded.targets[encoded.targets >= 0].tolist()
        if not tower.stop_ids.intersection(ids):
            raise TowerError(
                f"targets: sample {sample.id!r} has no end among its targets {ids}; ends are {sorted(tower.stop_ids)}. Set "
                "eos_token_id in the model's generation config to the token that ends a turn"
            )
    return {"targets": "the answers and their end"}


def _check_talk(tower: Tower, samples: Sequence[Sample]) -> dict[str, Any]:
    """In a talk of two samples each answer is learned behind what is asked for it, in one sequence or one by one."""
    two = [s for s in samples if [turn.role for turn in s.turns] == ["user", "assistant"]][:2]
    if len(two) < 2:
        return {}
    images, turns = (tuple(x for s in two for x in getattr(s, name)) for name in ("images", "turns"))
    talk = Sample("a talk of " + " and ".join(s.id for s in two), images, turns)
    apart = tower.preparer.answers_apart(talk)
    for sample in talk.by_answer() if apart else [talk]:
        encoded = tower.encode(sample)
        asked = tower.encode(sample, with_answer=False).input_ids
        if encoded.input_ids[: len(asked)].tolist() != asked.tolist() or int(encoded.targets[len(asked) - 1]) < 0:
            raise TowerError(f"talks: {sample.id!r} is trained behind another prompt than it is asked with")
        if wrong := tower.preparer.misread(sample, encoded):
            raise TowerError(f"talks: {wrong}")
    return {"answers of a talk": "one by one" if apart else "in one sequence"}


def _check_visual_positions(tower: Tower, inputs: TowerInputs) -> dict[str, Any]:
    """As many placeholders in the text as the encoder gives visual tokens."""
    with torch.no_grad():
        given = sum(len(t) for t in tower.see(inputs).tokens)
    if given != int(inputs.visual.sum()):
        raise TowerError(
            f"visual positions: the encoder gives {given} visual tokens, the processor wrote {int(inputs.visual.sum())} "
            "placeholders; its patch_size, image size and num_additional_image_tokens must fit the encoder"
        )
    return {"visual tokens": given}


@torch.no_grad()
def _check_swapped(tower: Tower, samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples that are shown each other's pictures compute something else."""
    pictured = [s for s in samples if len(s.images) == 1]
    if len(pictured) < 2:
        return {"loss": _loss(tower, tower.prepare(samples).to(tower.device))[0]}
    swapped = [replace(s, images=pictured[i - 1].images) for i, s in enumerate(pictured)]
    (plain, rows), (permuted, other_rows) = (_loss(tower, tower.prepare(s).to(tower.device)) for s in (pictured, swapped))
    if math.isnan(plain) or torch.equal(rows, other_rows):  # rows, not losses: random weights may see but faintly
        raise TowerError(
            f"pixels: the loss is {plain:.6f} with the right pictures and {permuted:.6f} with each other's, so pixels do not "
            "reach the language model; check the image token, the processor and the encoder's weights"
        )
    return {"loss": plain, "loss with permuted pictures": permuted}


def _loss(tower: Tower, inputs: TowerInputs) -> tuple[float, Tensor]:
    """Mean cross-entropy on the targets, and the logits of its rows."""
    logits = _logits(tower, tower.read(inputs, tower.see(inputs))[inputs.response]).float()  # [R, V]
    return float(F.cross_entropy(logits, inputs.targets[inputs.response])), logits


@torch.no_grad()
def _check_prompts(tower: Tower, samples: Sequence[Sample]) -> dict[str, Any]:
    """The logits after a prompt are those that plain transformers computes from its own `apply_chat_template`."""
    largest = 0.0
    asked = {"return_mm_token_type_ids": True} if tower.takes("mm_token_type_ids") else {}
    try:
        tower.processor(text=["a"])
    except (ValueError, TypeError):
        samples = [s for s in samples if s.images]  # PaliGemma's processor takes no text alone
    for sample in samples:
        images = iter([ref.load() for ref in sample.images])
        messages = [
            {
                "role": turn.role,
                "content": [{"type": "image", "image": next(images)} for _ in range(turn.images)]
                + [{"type": "text", "text": turn.text}],
            }
            for turn in sample.prompt_turns
        ]
        batch = _own_inputs(tower, messages, asked).to(tower.device)
        own = tower.encode(sample, with_answer=False)
        if own.input_ids.tolist() != batch["input_ids"][0].tolist():
            raise TowerError(
                f"prompts: sample {sample.id!r} becomes {tower.tokenizer.decode(own.input_ids)!r}, transformers makes it "
                f"{tower.tokenizer.decode(batch['input_ids'][0])!r}; a model that is served would be asked otherwise than taught"
            )
        batch = {k: _as_model(tower, v) for k, v in batch.items() if k != "labels"}
        inputs = tower.collate([own]).to(tower.device)
        ours = _logits(tower, tower.read(inputs, tower.see(inputs)))
        largest = max(largest, _same("prompts", tower, ours, tower.model(**batch).logits, "transformers' own logits"))
    return {"largest difference from transformers' logits": largest}


def _as_model(tower: Tower, value: Any) -> Any:
    """Pixels in the model's dtype; anything else as the processor gave it."""
    return value.to(_dtype(tower)) if isinstance(value, Tensor) and value.is_floating_point() else value


def _own_inputs(tower: Tower, messages: list[dict[str, Any]], asked: dict[str, Any]) -> Any:
    """What transformers makes of a prompt: in one step, or in two where a processor refuses the one (GOT-OCR)."""
    template = tower.processor.apply_chat_template
    try:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": asked}
        return template(messages, add_generation_prompt=True, **options)
    except ValueError:
        text = template(messages, add_generation_prompt=True, tokenize=False)
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        return tower.processor(text=[text], images=images or None, return_tensors="pt", **asked)


@torch.no_grad()
def _check_injection(tower: Tower, inputs: TowerInputs) -> dict[str, Any]:
    """Visual tokens handed over one by one do what they do in the model's own output object."""
    seen = tower.see(inputs)
    whole, listed = tower.read(inputs, seen), tower.read(inputs, list(seen.tokens))
    where = inputs.attention_mask.bool()
    return {"largest difference of injected tokens": _same("injection", tower, listed[where], whole[where], "the model's own")}


@torch.no_grad()
def _check_padding(tower: Tower, samples: Sequence[Sample], inputs: TowerInputs) -> dict[str, Any]:
    """Rows do not depend on the side of the padding."""
    left = tower.prepare(samples, padding_side="left").to(tower.device)
    rows = [tower.read(x, tower.see(x))[x.response] for x in (inputs, left)]
    return {"largest difference of padding sides": _same("padding", tower, rows[1], rows[0], "right padding's")}


@torch.no_grad()
def _check_projection(tower: Tower, inputs: TowerInputs) -> dict[str, Any]:
    """`project(see.features) == see.tokens`, which the visual switch lives by; some families do more to their tokens."""
    seen = tower.see(inputs)
    if not seen.tokens:
        return {}
    if not seen.features:
        return {"visual switch": f"{NO_SWITCH}it does not tell which features belong to which picture"}
    try:
        projected = tower.project(seen.features)
        width = projected[0].shape[-1]  # a projector gives no tokens for the language model's first layers (deepstack)
        tokens = [token[:, :width] for token in seen.tokens]
        difference = _same("projection", tower, torch.cat(projected), torch.cat(tokens), "the visual tokens")
    except (ValueError, RuntimeError, TypeError) as error:
        if tower.model.config.model_type == "llava":
            raise
        return {"visual switch": f"{NO_SWITCH}{error}"}
    return {"visual switch": "yes", "largest difference of projected features": difference}


def _check_gradient(tower: Tower, inputs: TowerInputs) -> dict[str, Any]:
    """The loss reaches vision encoder, projector and language model."""
    for parameter in tower.model.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    logits = _logits(tower, tower.read(inputs, tower.see(inputs))[inputs.response])
    F.cross_entropy(logits.float(), inputs.targets[inputs.response]).backward()
    norms = {part: _norm(parameters) for part, parameters in tower.part_parameters().items()}
    for part, norm in norms.items():
        if part != "language" and not inputs.pixels:
            continue
        if not norm > 0:
            raise TowerError(f"gradient: {norm} reaches the {part}; is it detached, under no_grad, or all zero?")
    unused = {
        part: sum(p.numel() for _, p in parameters if p.requires_grad and p.grad is None)
        for part, parameters in tower.part_parameters().items()
    }
    return {f"gradient norm, {part}": norm for part, norm in norms.items()} | {
        f"parameters without gradient, {part}": count for part, count in unused.items() if count
    }


def _check_batches(tower: Tower, samples: Sequence[Sample], answers: list[str]) -> dict[str, Any]:
    """A sample is answered in company as it is alone."""
    alone = [tower.answer([sample], max_new_tokens=NEW_TOKENS)[0] for sample in samples]
    return {"answers alone as in a batch": _same_answers("batches", tower, samples, alone, answers, "alone", "in a batch")}


def _check_saving(
    tower: Tower, samples: Sequence[Sample], inputs: TowerInputs, answers: list[str], folder: Path
) -> dict[str, Any]:
    """What comes back from disk computes and answers the same."""
    tower.save(folder)
    loaded = Tower.load(folder, dtype=_dtype(tower), max_length=tower.max_length)
    loaded.model.to(tower.device).eval()
    if loaded.processor_fingerprint() != tower.processor_fingerprint():
        raise TowerError("saving: the processor that comes back differs; is part of it set by hand after it was made?")
    with torch.no_grad():
        own, other = (_logits(t, t.read(inputs, t.see(inputs))[inputs.response]) for t in (tower, loaded))
    difference = _same("saving", tower, other, own, "those before saving")
    again = loaded.answer(samples, max_new_tokens=NEW_TOKENS)
    same = _same_answers("saving", tower, samples, again, answers, "loaded", "before saving")
    return {"largest difference after loading": difference, "answers after loading": same}


def _logits(tower: Tower, hidden: Tensor) -> Tensor:
    """Hidden rows through the head as distillation applies it."""
    head = head_of(tower)
    return scaled(F.linear(hidden, head.weight, head.bias), (head.scale, head.softcap))


def _same(check: str, tower: Tower, got: Tensor, wanted: Tensor, what: str) -> float:
    """The largest difference. Raises TowerError when it is over the tolerance of the model's dtype."""
    if got.shape != wanted.shape:
        raise TowerError(f"{check}: the shape is {list(got.shape)}, that of {what} {list(wanted.shape)}")
    difference, scale = float((got - wanted).abs().max()), float(wanted.abs().max())
    allowed = TOLERANCE.get(_dtype(tower), 0.1) * max(scale, 1e-6)
    if not difference <= allowed:
        raise TowerError(f"{check}: values differ from {what} by up to {difference:.3g} (largest value {scale:.3g})")
    return difference


def _same_answers(
    check: str, tower: Tower, samples: Sequence[Sample], got: list[str], wanted: list[str], how: str, other: str
) -> str:
    differing = [(s.id, a, b) for s, a, b in zip(samples, got, wanted, strict=True) if a != b]
    if differing and _dtype(tower) in (torch.float32, torch.float64):  # shorter types round ties of random logits either way
        name, a, b = differing[0]
        share = f"{len(differing)} of {len(samples)}"
        raise TowerError(f"{check}: {share} answers differ; {name!r} gets {a!r} {how} and {b!r} {other}")
    return f"{len(samples) - len(differing)} of {len(samples)}"


def _dtype(tower: Tower) -> torch.dtype:
    return tower.head.weight.dtype


def _norm(parameters: list[tuple[str, nn.Parameter]]) -> float:
    return float(sum(float(p.grad.detach().float().norm()) ** 2 for _, p in parameters if p.grad is not None) ** 0.5)


# ---- encoders --------------------------------------------------------------------------------------------------------


def check_encoder(encoder: nn.Module, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """Checks what an encoder of your own must do; returns what was measured.

    encoder: maps pixels [n, 3, H, W] to features [n, N, Dv] or to a map [n, Dv, h, w].  image_size: (height, width).
    Checked: the shape; that it depends on the pixels; that one picture's features do not depend on the others in the batch
    and are the same twice (in evaluation mode); that a gradient reaches its parameters; that its weights can be saved.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    with evaluating(encoder):
        features = _features(encoder, pixels)
        if len(features) != len(pixels):
            raise TowerError(f"shape: {len(pixels)} pictures give features of {len(features)}: {list(features.shape)}")
        if not bool(features.isfinite().all()):
            raise TowerError("values: some features are not finite; check the encoder's initialisation")
        _check_encoder_values(encoder, pixels, features)
        parameters = sum(p.numel() for p in encoder.parameters())
        reached = _reached(encoder, features)
        if parameters and not reached:
            raise TowerError("gradient: none of the encoder's parameters gets one; is it under no_grad or frozen?")
    return {
        "features of one picture": features.shape[1],
        "width": features.shape[2],
        "parameters": parameters,
        "parameters with gradient": reached,
    }


def _check_encoder_values(encoder: nn.Module, pixels: Tensor, features: Tensor) -> None:
    with torch.no_grad():
        again, alone = _features(encoder, pixels), _features(encoder, pixels[:1])
        changed = _features(encoder, pixels.flip(0))
    features = features.detach()
    scale = float(features.abs().max())
    if (difference := float((again - features).abs().max())) > 1e-4 * scale:
        raise TowerError(
            f"determinism: the same pictures give features that differ by {difference:.3g} in evaluation mode; noise and "
            "dropout must stop at `self.training == False`"
        )
    if (difference := float((alone - features[:1]).abs().max())) > 1e-3 * scale:
        raise TowerError(
            f"batches: a picture's features change by {difference:.3g} with the pictures beside "
            "it; normalise over each picture, or by running statistics in evaluation mode"
        )
    if torch.equal(changed[0], features[0]):
        raise TowerError("pixels: two different pictures give the same features")


def _features(encoder: nn.Module, pixels: Tensor) -> Tensor:
    if isinstance(encoder, WrappedEncoder):
        return encoder(pixels).last_hidden_state
    return tokens_of(encoder(pixels))


def _reached(encoder: nn.Module, features: Tensor) -> int:
    """Parameters that a loss on the features reaches."""
    if not features.requires_grad:
        return 0
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((features * weight).sum(), parameters, allow_unused=True)
    return sum(p.numel() for p, g in zip(parameters, gradients, strict=True) if g is not None)
