"""One step of ranking distillation, against published numbers."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_picture
from torch import nn

from mmkd.retrieval.batches import PairBatch
from mmkd.retrieval.pairs import pair_set
from mmkd.retrieval.ranking import RankingModel
from mmkd.retrieval.recipe import RankingSpec


class Points(nn.Module):
    """A student whose pictures' embeddings are the similarities themselves, and its texts' the unit vectors."""

    def __init__(self, similarities: list[list[float]], temperature: float = 0.1):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(similarities))
        self.temperature = torch.tensor(temperature)

    def clamp_temperature(self) -> None:
        """The temperature is fixed."""

    def embed_images(self, inputs):
        return self.rows

    def embed_texts(self, inputs):
        return torch.eye(len(self.rows))


class Known:
    """Teacher scores that are given."""

    def __init__(self, scores: list[list[float]]):
        self.table = torch.tensor(scores)

    def scores(self, images, texts):
        return self.table[images, texts]


S = [[0.60, 0.45, 0.20], [0.35, 0.70, 0.40], [0.10, 0.30, 0.55]]
P = [[0.98, 0.40, 0.05], [0.30, 0.99, 0.55], [0.01, 0.70, 0.96]]


@pytest.fixture
def three(tmp_path):
    return pair_set([(tiny_picture(tmp_path, f"{n}.png", n), f"text {n}") for n in range(3)])


def step(pairs, **options):
    spec = RankingSpec(**{"candidates": 2, **options})
    model = RankingModel(Points(S), pairs, spec, Known(P))
    own = torch.arange(3)
    loss, log = model(PairBatch(own, own, {}, {}))
    return loss, {name: (total / count).item() for name, (total, count) in log.items()}, model


def test_C5_batch_in_both_directions(three):
    loss, means, _ = step(three)
    assert loss.item() == pytest.approx(0.5626710620, abs=1e-6)
    assert means["contrastive"] == pytest.approx(0.1314834365, abs=1e-6)
    assert means["cprd"] == pytest.approx(0.4311876255, abs=1e-6)
    assert means["valid_negatives"] == pytest.approx((1 + 2 + 1 + 1 + 2 + 1) / 6)


def test_weight_and_reductions(three):
    assert step(three, weight=3)[0].item() == pytest.approx(0.1314834365 + 3 * 0.4311876255, abs=1e-6)
    nothing, means, _ = step(three, threshold=0.8)
    assert nothing.item() == pytest.approx(0.1314834365, abs=1e-6) and means["valid_negatives"] == 0
    # threshold 0.6: only text 1 has a valid negative (picture 2, 0.70) and picture 2 (text 1, 0.70)
    sums, shared = step(three, threshold=0.6)[1]["cprd"], step(three, threshold=0.6, query_reduction="with_valid")[1]["cprd"]
    assert sums > 0 and shared == pytest.approx(3 * sums, rel=1e-6)
    assert step(three, include_easy=True, candidates=2)[1]["cprd"] == pytest.approx(step(three)[1]["cprd"])


def test_the_control_is_contrastive_alone(three):
    model, own = RankingModel(Points(S), three, RankingSpec()), torch.arange(3)
    loss, log = model(PairBatch(own, own, {}, {}))
    assert loss.item() == pytest.approx(0.1314834365, abs=1e-6) and list(log) == ["contrastive"]


def test_what_also_matches_is_no_negative(tmp_path):
    """Picture 0 and picture 1 share a caption: neither stands among the other's negatives."""
    refs = [tiny_picture(tmp_path, f"{n}.png", n) for n in range(3)]
    pairs = pair_set([(refs[0], "a"), (refs[1], "b"), (refs[2], "c"), (refs[0], "b")])
    own, asked = torch.arange(3), []

    class Watched(Known):
        def scores(self, images, texts):
            asked.append((images, texts))
            return super().scores(images, texts)

    RankingModel(Points(S), pairs, RankingSpec(candidates=2), Watched(P))(PairBatch(own, own, {}, {}))
    images, texts = asked[0]
    # picture 0 has one negative, the text "c"; the second place is empty and filled with whatever stands first
    assert (images[0, 0], texts[0, 0]) == (0, 2)
    assert {(int(i), int(t)) for i, t in zip(images[1], texts[1], strict=True)} == {(1, 0), (1, 2)}
