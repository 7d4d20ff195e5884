"""Terms on pictures of equal and of different sizes: what is computed together is what each picture gives alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmkd import losses
from mmkd.data.samples import Question, Sample, Turn
from mmkd.errors import SampleError
from mmkd.terms import vision
from mmkd.terms.aspects import Aspects
from mmkd.terms.bridge import Bridge, resample
from mmkd.terms.vision import Contrastive, FeatureMatch, Relation, Tags, Temperature, alike

COUNTS = (4, 9, 4, 6, 9, 4)  # visual tokens by picture
DOUBLE = torch.float64


class Given(dict):
    """Signals of a micro-batch: tensors by name, the extra module, the inputs."""

    def __init__(self, extra=None, inputs=None, student=None, **tensors):
        super().__init__({name.replace("__", "."): value for name, value in tensors.items()})
        self.extra, self.inputs, self.student = extra, inputs, student
        self.zero, self.device = torch.zeros((), dtype=DOUBLE), torch.device("cpu")


def drawn(width, counts=COUNTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=DOUBLE, requires_grad=True) for n in counts]


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


def equal(found, wanted, leaves):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize("distance", ["cosine", "mse", "smooth_l1"])
def test_features_are_matched_picture_by_picture(distance, together, monkeypatch):
    monkeypatch.setattr(vision, "TOGETHER", together)
    torch.manual_seed(0)
    own, other, bridge = drawn(5), drawn(7, counts=(4, 4, 9, 6, 16, 4), seed=1), Bridge(5, 7).double()
    found = FeatureMatch(distance=distance).loss(Given(bridge, student__features=own, teacher__features=other))
    wanted = sum(losses.feature_match(bridge(a, len(b)), b, distance).mean() for a, b in zip(own, other, strict=True))
    equal(found, wanted, own)


@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_relations_are_those_within_each_picture(source):
    own, other = drawn(5), drawn(7, seed=1)
    heads = [torch.randn(11, width, dtype=DOUBLE) for width in (5, 7)]
    grams = [losses.head_gram(head) for head in heads]
    given = Given(student__visual_rows=own, teacher__visual_rows=other, student__gram=grams[0], teacher__gram=grams[1])
    found = Relation(source=source).loss(given)
    if source == "logits":
        pairs = [(a @ heads[0].T, b @ heads[1].T) for a, b in zip(own, other, strict=True)]
    else:
        pairs = list(zip(own, other, strict=True))
    equal(found, sum(losses.relation(a, b) for a, b in pairs), own)


def test_a_relation_of_unequal_counts_is_refused_by_picture():
    given = Given(student__visual_rows=drawn(5), teacher__visual_rows=drawn(5, counts=(4, 9, 4, 5, 9, 4)))
    with pytest.raises(ValueError, match="6 visual tokens of the student and 5 of the teacher"):
        Relation(source="hidden").loss(given)


def batch():
    """Five samples; the second has no picture, the last two pictures: its first one stands for it. Answers of 1 to 3 tokens."""
    targets = torch.tensor([[3, 4, -1, -1], [7, -1, -1, -1], [5, -1, -1, -1], [3, 4, -1, -1], [-1, 6, 2, 1]])
    return SimpleNamespace(images=[1, 0, 1, 2, 2], targets=targets, input_ids=targets.clamp(min=0))


PICTURES, FIRST = (4, 9, 6, 4, 9, 4), (0, 1, 2, 4)


def test_tags_look_over_each_pictures_own_places():
    torch.manual_seed(0)
    head, features = nn.Linear(5, 10).double(), drawn(5, counts=PICTURES)
    found = Tags().loss(Given(head, batch(), student__features=features))
    wanted = torch.zeros((), dtype=DOUBLE)
    for picture, words in zip(FIRST, ({3, 4}, {5}, {3, 4}, {6, 2, 1}), strict=True):
        logits = head(features[picture]).max(0).values
        present = torch.tensor([float(word in words) for word in range(10)], dtype=DOUBLE)
        wanted = wanted - (present * logits.sigmoid().log() + (1 - present) * (1 - logits.sigmoid()).log()).sum()
    equal(found, wanted, [features[i] for i in FIRST])


def test_contrast_is_between_pictures_of_different_sizes():
    torch.manual_seed(0)
    words, tokens = nn.Embedding(10, 5), drawn(5, counts=PICTURES)
    student = SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: words))
    found = Contrastive().loss(Given(Temperature(), batch(), student, student__tokens=tokens))
    texts = ([3, 4], [5], [3, 4], [6, 2, 1])
    table = nn.functional.normalize(words.weight, dim=-1)
    unit = [nn.functional.normalize(tokens[i].float(), dim=-1) for i in FIRST]
    similar = torch.stack([torch.stack([(table[t] @ image.T).max(-1).values.mean() for t in texts]) for image in unit]) / 0.07
    same = torch.tensor([[a == b for b in texts] for a in texts])
    wanted = torch.zeros(())
    for rows in (similar, similar.T):
        for row, positive in zip(rows, same, strict=True):
            wanted = wanted - (row[positive].mean(-1) - row.logsumexp(-1))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()) / 2, rel=1e-4)


def test_resampling_several_pictures_is_resampling_each():
    for count in (4, 7, 25):
        several = torch.randn(3, 9, 5, dtype=DOUBLE)
        torch.testing.assert_close(resample(several, count), torch.stack([resample(one, count) for one in several]))
        assert resample(several[0], count).shape == (count, 5)


def test_no_more_than_so_many_pictures_are_taken_at_once():
    own = drawn(3, counts=[4] * 40)
    assert [len(a) for a, _ in alike(own, own)] == [16, 16, 8]


def told(question, **facts):
    return Sample("s", (), (Turn("user", question),), {"question": Question("s", question, told=facts)})


def test_aspects_are_soft_targets_of_a_head():
    torch.manual_seed(0)
    term = Aspects(aspects=("Is it red?", "Is it round?"))
    samples = [told("Is it round?", odds="1.5"), told("Is it red?", odds="0"), told("Is it red?"), told("Is it big?", odds="3"),
               told("Is it red?", odds="-2")]  # fmt: skip
    facts = [term.sample_fact(sample) for sample in samples]
    assert facts == [(1, pytest.approx(1 / (1 + 2.718281828459045**-1.5))), (0, 0.5), None, None, (0, pytest.approx(0.11920292))]
    head, features = nn.Linear(5, 2).double(), drawn(5, counts=PICTURES)
    given = Given(head, batch(), student__features=features)
    given.facts = facts  # the second sample has no picture, so it counts nothing
    wanted = torch.zeros((), dtype=DOUBLE)
    for picture, (number, yes) in ((0, facts[0]), (4, facts[4])):
        logit = (head.weight @ features[picture].mean(0) + head.bias)[number]
        wanted = wanted - yes * logit.sigmoid().log() - (1 - yes) * (1 - logit.sigmoid()).log()
    equal(term.loss(given), wanted, [features[0], features[4]])
    with torch.no_grad():  # least where the head says the teacher's odds
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 1.5]))
    given.facts = [facts[0], None, None, None, None]
    assert gradients(term.loss(given), [head.bias])[0].abs().max() < 1e-7
    assert Aspects(aspects=("a",), temperature=2.0).sample_fact(told("a", odds="3"))[1] == pytest.approx(0.81757448)
    with pytest.raises(SampleError, match="told.odds is 'maybe', no log-odds"):
        term.sample_fact(told("Is it red?", odds="maybe"))
    assert "name the questions" in Aspects().errors()[0] and Aspects(aspects=("a", "a")).errors()
