"""Checks before step 1: what is cheaper to find out now than after a night of training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmkd.data.lazy import is_lazy
from mmkd.data.samples import Sample
from mmkd.engine.rows import RowTerm, row_losses
from mmkd.errors import DataError, GuardError, NotFiniteError
from mmkd.losses import CrossEntropy
from mmkd.teachers.teacher import head_of
from mmkd.towers.modes import evaluating
from mmkd.towers.tower import Encoded, Tower, TowerInputs
from mmkd.towers.whole import blamed
from mmkd.train.batch import Pair
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.exchange import Exchange, exchanged

logger = logging.getLogger(__name__)

# A teacher's loss must rise by this share of it, and by so much, when it is shown other pictures.
HARDLY, LEAST = 0.02, 0.01

LOOKED_THROUGH = 4096  # samples of a large set in which those with pictures are looked for


def run_guards(distiller: Distiller, dataset: PairDataset, samples: int, pixels_matter: bool, teacher_is_better: bool) -> dict:
    """Runs the guards on some training samples; returns what was measured, raises GuardError when one fails."""
    tried, pairs = _some(dataset, samples)
    batch = dataset.collator(pairs)["batch"].to(distiller.tower.device)
    towers = {"student": (distiller.tower, batch.student)}
    encoded = {"student": [pair.student for pair in pairs]}
    facts: dict[str, float] = {}
    for name, part in batch.teachers.items():
        teacher = distiller.teachers[name]
        if not teacher.stored and not teacher.remote:
            towers[name] = (teacher.running(), part.inputs)
            encoded[name] = [pair.teachers[name].inputs for pair in pairs]
        elif (loss := teacher.answer_loss(part.inputs)) is not None:  # its pictures were checked when it was written
            facts[f"{name}_loss"] = loss
            _check_finite(name, facts)
    of_student = None
    for role, (tower, inputs) in towers.items():
        if not bool(inputs.response.any()):
            raise GuardError(f"no sample of {len(inputs.ids)} has an answer token that the {role} is to predict")
        with blamed(f"the first pass through the {role}"):
            hidden = answer_rows(tower, inputs)
            facts[f"{role}_loss"] = answer_loss(tower, inputs, hidden)
        _check_finite(role, facts)
        if pixels_matter:
            alike = of_student is not None and dataset.alike[role]
            shown = tried if role == "student" else [distiller.teachers[role].view(sample) for sample in tried]
            exchange = of_student if alike else exchanged(tower, shown, encoded[role])
            of_student = exchange if role == "student" else of_student
            facts |= _picture_losses(role, tower, inputs, hidden, exchange)
    if any(t.compares_features for t in distiller.terms):
        for role, (tower, inputs) in towers.items():
            _check_projection(role, tower, inputs)
    if teacher_is_better:
        for name in (n for n in batch.teachers if not distiller.teachers[n].of_student):
            _check_teacher(name, facts)
    _log(distiller, facts, len(pairs))
    return facts


def _check_finite(role: str, facts: dict[str, float]) -> None:
    """No comparison holds with NaN, so that it would pass the guards that compare."""
    wrong = [name for name, value in facts.items() if not math.isfinite(value)]
    if wrong:
        raise NotFiniteError(
            f"what the {role} computes from the training samples is not finite ({', '.join(wrong)}): its weights are damaged, or "
            "its numbers leave the range of its dtype; load it anew, or take another dtype (bfloat16 instead of float16)"
        )


def freeze_unreached(distiller: Distiller, dataset: PairDataset) -> list[str]:
    """Takes parameters that no term reaches out of training, and names them.

    A pooler that nobody reads, or encoder layers behind the feature layer, would otherwise only suffer weight decay, and
    data-parallel training would wait for their gradients without end.
    """
    pairs = _some(dataset, 2)[1]
    if dataset.generates:  # rows of both kinds: answers of the data, and the same as the student's own
        pairs += [dataset.answered(pair, pair.student.targets[pair.student.targets >= 0].tolist()) for pair in pairs]
    batch = dataset.collator(pairs)["batch"].to(distiller.tower.device)
    distiller.train()
    loss, _ = distiller(batch)
    if not loss.requires_grad:
        raise GuardError(
            f"the terms reach no trained parameter: {', '.join(t.name for t in distiller.terms)}; "
            "train the part that they act on"
        )
    unreached = freeze_unreached_by(distiller, loss)
    if unreached:
        logger.info("not trained, since no term reaches them: %s", _brief(unreached))
    return unreached


def freeze_unreached_by(model: nn.Module, loss: Tensor) -> list[str]:
    """Takes the parameters that `loss` does not reach out of training and leaves no gradient; returns their names."""
    loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if name in unreached:
            parameter.requires_grad_(False)
    return unreached


def _brief(names: list[str]) -> str:
    shown = ", ".join(name.removeprefix("student.") for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def spread_places(samples: Sequence[Sample], count: int) -> list[int]:
    """Places of at most `count` samples from all over a set, those with pictures first choice."""
    places = range(0, len(samples), max(1, len(samples) // LOOKED_THROUGH) if is_lazy(samples) else 1)
    pictured = [i for i in places if samples[i].images] or list(places)
    return pictured[:: max(1, len(pictured) // count)][:count]


def _some(dataset: PairDataset, samples: int) -> tuple[list[Sample], list[Pair]]:
    """Samples spread over the data set, those with pictures first choice, and the same prepared; skipped ones left out."""
    found = [(i, dataset[i]) for i in spread_places(dataset.samples, samples)]
    kept = {i: pair for i, pair in found if isinstance(pair, Pair)}
    if not kept:
        usable = next((i for i in range(len(dataset)) if isinstance(dataset[i], Pair)), 0)
        kept = {usable: dataset.next_usable(usable - 1)}  # which says so where there is none
    return [dataset.samples[i] for i in kept], list(kept.values())


@torch.no_grad()
def answer_rows(tower: Tower, inputs: TowerInputs) -> Tensor:
    """Hidden rows that predict the answers. [R, D]"""
    with evaluating(tower.model):
        return tower.read(inputs, tower.see(inputs))[inputs.response]


# ---- pictures --------------------------------------------------------------------------------------------------------


def check_pixels(role: str, tower: Tower, samples: Sequence[Sample], encoded: Sequence[Encoded]) -> bool:
    """Checks whether a batch's pictures matter to a tower, as `run_guards` does; False if it cannot tell, from one picture.

    encoded: the samples as the tower prepares them. Raises GuardError when other pictures change nothing.
    """
    exchange = exchanged(tower, samples, encoded)
    if not exchange.other:
        return False
    own = tower.collate([encoded[place] for place in exchange.places]).to(tower.device)
    places = list(range(len(exchange.places)))
    _picture_losses(role, tower, own, answer_rows(tower, own), replace(exchange, places=places))
    return True


def check_pixels_of_set(role: str, tower: Tower, samples: Sequence[Sample], count: int) -> None:
    """As `check_pixels`, on `count` samples from all over a set: a batch of like lengths may be of one kind of question."""
    check_pixels(role, tower, *_prepared(tower, [samples[place] for place in spread_places(samples, count)]))


def _prepared(tower: Tower, samples: Sequence[Sample]) -> tuple[list[Sample], list[Encoded]]:
    """Those of the samples that can be prepared, and how the tower does; the others are told of elsewhere."""
    found = []
    for sample in samples:
        with suppress(DataError):
            found.append((sample, tower.encode(sample)))
    return [sample for sample, _ in found], [encoded for _, encoded in found]


def blind_error(role: str, tower: Tower, samples: Sequence[Sample]) -> str | None:
    """What `run_guards` would stop for where pictures never reach a tower, from a few samples; None where nothing is found."""
    exchange = exchanged(tower, *_prepared(tower, samples), probes=1)
    try:
        if exchange.probe:
            _check_probe(role, tower, exchange)
    except GuardError as error:
        return str(error)
    return None


def _picture_losses(role: str, tower: Tower, inputs: TowerInputs, hidden: Tensor, exchange: Exchange) -> dict[str, float]:
    """The loss with other samples' pictures; raises GuardError where these change nothing. hidden [R, D]: `answer_rows`."""
    if not exchange.other:
        if any(inputs.images):
            logger.info("guards: the %d samples hold no two pictures, so whether pictures matter to the %s is not known",
                        len(inputs.ids), role)  # fmt: skip
        return {}
    if exchange.probe:
        _check_probe(role, tower, exchange)
    other = tower.collate(exchange.other).to(tower.device)
    permuted = answer_loss(tower, other, answer_rows(tower, other))
    chosen = torch.isin(inputs.response.nonzero()[:, 0].cpu(), torch.tensor(exchange.places))
    loss = _mean_loss(tower, hidden[chosen], inputs.targets[inputs.response][chosen])
    if role != "student" and permuted - loss < max(HARDLY * loss, LEAST):
        logger.warning(
            "the %s's loss on %d answers is %.4f with their own pictures and %.4f with those of other samples: it hardly looks "
            "at them, so a student learns from it to answer without looking. Do these questions need their picture, and has the "
            "teacher learned this task?", role, len(exchange.places), loss, permuted,
        )  # fmt: skip
    return {f"{role}_loss_permuted": permuted}


def _check_probe(role: str, tower: Tower, exchange: Exchange) -> None:
    """Other pixels under the same tokens must change hidden states.

    Not only losses: an untrained tower may see so faintly that its loss is the same to the last digit. And not other numbers of
    tokens, which would change the hidden states of a blind tower, too.
    """
    own, other = (tower.collate(list(side)).to(tower.device) for side in zip(*exchange.probe, strict=True))
    if torch.equal(answer_rows(tower, own), answer_rows(tower, other)):
        raise GuardError(
            f"permuting the pictures changes nothing that the {role} computes: its pixels never reach the language model. "
            "Check its processor and image token; to train all the same set guards.pixels_matter=false"
        )


@torch.no_grad()
def answer_loss(tower: Tower, inputs: TowerInputs, hidden: Tensor) -> float:
    """Mean cross-entropy of a tower on its own targets; hidden [R, D] as from `answer_rows`."""
    return _mean_loss(tower, hidden, inputs.targets[inputs.response])


@torch.no_grad()
def _mean_loss(tower: Tower, hidden: Tensor, targets: Tensor) -> float:
    term = RowTerm("cross_entropy", 1.0, CrossEntropy(), needs_teacher=False, rows=None)
    total, _ = row_losses(hidden, head_of(tower), targets, [term])
    return float(total) / len(hidden)


@torch.no_grad()
def _check_projection(role: str, tower: Tower, inputs: TowerInputs) -> None:
    """Features that go through the projector must give the tower's own visual tokens, in their order."""
    seen = tower.see(inputs)
    projected = tower.project(seen.features)
    if len(projected) != len(seen.tokens):
        raise GuardError(
            f"the {role}'s family {tower.model.config.model_type!r} does not tell which vision features belong to which picture; "
            "take the visual switch and feature_match out, or use another pair"
        )
    for image, (whole, again) in enumerate(zip(seen.tokens, projected, strict=True)):
        own = whole[:, : again.shape[-1]]  # without what goes to the language model's first layers
        if own.shape != again.shape or not torch.allclose(own, again, rtol=1e-2, atol=1e-3 * float(own.abs().max())):
            raise GuardError(
                f"the {role}'s projector does not turn its vision features into its visual tokens (image {image}: "
                f"{list(own.shape)} against {list(again.shape)}): {tower.model.config.model_type!r} reorders or adds tokens "
                "around it, so the visual switch and feature_match would compare other places; take these terms out or use "
                "another pair"
            )


def _check_teacher(name: str, facts: dict[str, float]) -> None:
    loss = facts.get(f"{name}_loss")
    if loss is not None and loss >= facts["student_loss"]:
        raise GuardError(
            f"the {name}'s loss on the training answers ({loss:.3f}) is not below the untrained student's "
            f"({facts['student_loss']:.3f}): it was not loaded, does not know this task, or is asked in another template. "
            "Fine-tune it first; to train all the same set guards.teacher_is_better=false"
        )


def _log(distiller: Distiller, facts: dict[str, float], samples: int) -> None:
    for said in in_words(facts, samples):
        logger.info("%s", said)
    parts = []
    for part, parameters in distiller.tower.part_parameters().items():
        trained, of = sum(p.numel() for _, p in parameters if p.requires_grad), sum(p.numel() for _, p in parameters)
        parts.append(f"{part} {trained:,}" + (f" of {of:,}" if trained < of else ""))
    logger.info("trained parameters: %s", ", ".join(parts))


def in_words(facts: dict[str, float], samples: int) -> list[str]:
    """What the guards measured, a sentence a model."""
    names = [key.removesuffix("_loss") for key in facts if key.endswith("_loss")]
    said = []
    for name in names:
        text = f"guards: the {name}'s loss on the answers of {samples} samples is {facts[f'{name}_loss']:.3f}"
        if (other := facts.get(f"{name}_loss_permuted")) is not None:
            text += f", with other samples' pictures {other:.3f}"
        said.append(text)
    return said
