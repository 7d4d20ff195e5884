"""Which of two answers a model prefers, on pairs that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmkd.data.samples import Sample
from mmkd.evaluation.intervals import interval
from mmkd.towers.tower import Tower
from mmkd.train.preference import PreferenceDataset
from mmkd.train.reference import fill_reference

CHUNK_BYTES = 64 * 2**20


def preference_accuracy(
    student: Tower, teacher: Tower, samples: Sequence[Sample], folder: Path, *, batch_size: int = 32
) -> dict[str, Any]:
    """How often the student prefers the chosen answers, over pairs as the format `preference` gives them.

    accuracy: share of pairs in which the chosen answer's reward log p_student(y) - log p_teacher(y) is the higher, which is what
    the preference losses train.  likelier: share in which the chosen answer itself is the likelier, log p_student(y)
    summed over its tokens.  margin: mean of the rewards' differences, in nats, before `beta`.  Each with its 95 %
    interval over pictures. Log-probabilities are kept in `folder`. Raises DataError.
    """
    dataset = PreferenceDataset(samples, student, None, [], max_skipped=len(samples))
    log_probs = {}
    for role, tower in (("student", student), ("teacher", teacher)):
        fill_reference(dataset, tower, folder, batch_size=batch_size, chunk_bytes=CHUNK_BYTES)
        log_probs[role] = dataset.reference.clone()  # [P, 2]
    skipped = {skip.index for skip in dataset.skips.found.values()}
    read = [i for i in range(len(samples)) if i not in skipped]
    groups = [samples[i].images or samples[i].id for i in read]
    own, reward = log_probs["student"][read], (log_probs["student"] - log_probs["teacher"])[read]
    difference = reward[:, 0] - reward[:, 1]
    values = {"accuracy": difference > 0, "likelier": own[:, 0] > own[:, 1], "margin": difference}
    found: dict[str, Any] = {"pairs": len(read), "skipped": len(samples) - len(read)}
    for name, value in values.items():
        mean, low, high = interval(value.to(torch.float64).tolist(), groups)
        found |= {name: mean, f"{name}_ci95": [low, high]}
    return found
