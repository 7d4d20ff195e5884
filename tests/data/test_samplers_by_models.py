"""Samplers that ask models: each against a reference of its own, and its limits."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from mmkd.data.samplers.difficulty import Difficulty
from mmkd.data.samplers.joint_confidence import JointConfidence, surest
from mmkd.data.samplers.mixture import DDK, first_shares, moved
from mmkd.data.samplers.scored import Difference, PCoreSet, RobustActive, centres, largest, robust_chances
from mmkd.data.samples import Sample, Turn
from mmkd.errors import DataError

SAMPLES = [Sample(str(n), (), (Turn("user", "?"), Turn("assistant", "a"))) for n in range(40)]


def scored(folder, **columns):
    rows = [{"id": str(n), **{name: values[n] for name, values in columns.items()}} for n in range(len(SAMPLES))]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "scores.jsonl")


# ---- MiniPLM --------------------------------------------------------------------------------------------------------------


def test_difference_keeps_where_the_teacher_is_furthest_ahead(tmp_path):
    draw = np.random.default_rng(0)
    teacher, student = draw.random(40).tolist(), draw.random(40).tolist()
    order = Difference(scored(tmp_path, teacher=teacher, student=student), share=0.25).build(SAMPLES, [40], 4, 0)
    wanted = sorted(range(40), key=lambda n: teacher[n] - student[n])[:10]
    assert sorted(order) == sorted(wanted)
    first = list(order)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first and sorted(order) == sorted(first)


def test_difference_of_equal_models_and_of_all_samples(tmp_path):
    same = scored(tmp_path, teacher=[0.5] * 40, student=[0.5] * 40)
    assert sorted(Difference(same, share=0.5).build(SAMPLES, [40], 4, 0)) == list(range(20))  # all zero: the order of the data
    assert sorted(Difference(same, share=1.0).build(SAMPLES, [40], 4, 0)) == list(range(40))
    with pytest.raises(DataError, match=r"0.05 of 40 samples are 2, fewer than batch_size 4"):
        Difference(same, share=0.05).build(SAMPLES, [40], 4, 0)


def test_the_third_term_is_what_the_picture_is_worth(tmp_path):
    blind = [1.0 if n % 2 else 0.5 for n in range(40)]
    path = scored(tmp_path, teacher=[0.5] * 40, student=[0.5] * 40, teacher_blind=blind)
    assert sorted(Difference(path, share=0.5, grounding=1.0).build(SAMPLES, [40], 4, 0)) == list(range(1, 40, 2))
    assert "teacher_blind" not in Difference(path).needs and Difference(path, reference="m").needs == ("teacher", "reference")


def test_samples_without_scores_are_refused(tmp_path):
    with pytest.raises(DataError, match="lacks teacher, student of some sample"):
        Difference(scored(tmp_path, teacher=[1.0] * 40)).build(SAMPLES, [40], 4, 0)
    with pytest.raises(DataError, match="have no scores yet"):
        Difference().build(SAMPLES, [40], 4, 0)
    assert largest(np.array([1.0, 3.0, 3.0, 2.0]), 2) == [1, 2]


# ---- RAD ------------------------------------------------------------------------------------------------------------------


def worst(chances, gains, errors):
    """The least value that an adversary leaves who takes `errors` of the gains away."""
    return min(
        sum(p * g for n, (p, g) in enumerate(zip(chances, gains, strict=True)) if n not in taken)
        for taken in itertools.combinations(range(len(gains)), errors)
    )


@pytest.mark.parametrize("errors", [0, 1, 2, 3])
def test_robust_chances_are_the_best_against_the_worst_case(errors):
    draw = np.random.default_rng(errors)
    gains = draw.random(5) + 0.05
    chances = robust_chances(gains, errors)
    assert chances.sum() == pytest.approx(1) and (chances >= 0).all()
    value = worst(chances, gains, errors)
    others = draw.dirichlet(np.ones(5), 4000)
    others = np.concatenate([others, draw.dirichlet(chances * 200 + 1e-3, 2000)])
    assert max(worst(other, gains, errors) for other in others) <= value + 1e-9


def test_a_perfect_teacher_gives_margin_sampling_and_a_random_one_equal_chances(tmp_path):
    gains = np.array([0.2, 0.9, 0.5])
    assert robust_chances(gains, 0).tolist() == [0, 1, 0]
    assert robust_chances(gains, 3).tolist() == [pytest.approx(1 / 3)] * 3
    path = scored(tmp_path, margin=[n / 40 for n in range(40)])
    assert set(RobustActive(path, wrong=0.0).build(SAMPLES, [40], 4, 0)) == {0}
    order = RobustActive(path, wrong=0.2).build(SAMPLES, [40], 4, 0)
    first = list(order)
    assert len(first) == 40 and list(order) == first and len(set(first)) > 5 and max(first) < 39


# ---- PCoreSet -------------------------------------------------------------------------------------------------------------


def greedy(points, chosen, count):
    """K-centres, from scratch in each step."""
    found = list(chosen)
    for _ in range(count):
        rest = [n for n in range(len(points)) if n not in found]
        apart = lambda n: min((math.dist(points[n], points[c]) for c in found), default=math.inf)  # noqa: E731
        found.append(max(rest, key=lambda n: (apart(n), -n)))
    return found


def test_centres_are_those_of_the_slow_way():
    points = np.random.default_rng(3).dirichlet(np.ones(4), 30)
    assert centres(points, [0, 5], 12) == greedy(points, [0, 5], 12)
    assert centres(points, [], 3)[0] == 0 == greedy(points, [], 3)[0]


def test_centres_cover_unseen_classes_first_and_duplicates_last(tmp_path):
    one_hot = np.eye(5)[[0, 0, 1, 1, 2, 3, 4, 0]]
    assert set(centres(one_hot, [0], 4)) == {0, 2, 4, 5, 6}
    assert centres(one_hot, [0], 7)[-3:] == [1, 3, 7]
    assert max(math.dist(a, b) for a in one_hot for b in one_hot) <= math.sqrt(2)
    path = scored(tmp_path, probabilities=[np.eye(8)[n % 8].tolist() for n in range(40)])
    order = PCoreSet(path, labelled=1, share=7 / 36).build(SAMPLES, [4, 36], 4, 0)
    assert sorted(order) == list(range(11)) and len(order) == 11  # the four labelled, the unseen four, three again


# ---- ThinkLite-VL ---------------------------------------------------------------------------------------------------------


def test_difficulty_keeps_what_needs_many_tries_and_what_stays_unsolved(tmp_path):
    tries = [n % 10 + 1 for n in range(40)]  # 1 to 10, where 9 and 10 mean unsolved of 8
    path = scored(tmp_path, tries=[min(n, 9) for n in tries])
    made = lambda **options: Difficulty(path, cap=8, **options).build(SAMPLES, [40], 4, 0)  # noqa: E731
    assert sorted(made(least=4)) == [n for n in range(40) if tries[n] >= 4]
    assert sorted(made(least=4, unsolved=False)) == [n for n in range(40) if 4 <= tries[n] <= 8]
    assert sorted(made(least=9)) == [n for n in range(40) if tries[n] > 8]
    assert sorted(made(least=1)) == list(range(40))
    order = made(least=4)
    first = list(order)
    order.set_epoch(1)
    assert list(made(least=4)) == first != list(order)


def test_a_solver_that_answers_at_once_keeps_nothing(tmp_path):
    with pytest.raises(DataError, match=r"0 stay unsolved and 40 are solved within 4 answers; 0 are left"):
        Difficulty(scored(tmp_path, tries=[1] * 40)).build(SAMPLES, [40], 4, 0)
    with pytest.raises(DataError, match="no more than 2 answers are drawn"):
        Difficulty(scored(tmp_path, tries=[1] * 40), cap=2, least=4).build(SAMPLES, [40], 4, 0)
    assert Difficulty(by="teacher").needs == ("teacher_tries",) and Difficulty(by="teacher").of_teacher
    assert not Difficulty().of_teacher and Difficulty(cap=3).how["cap"] == 3


# ---- KD3 ------------------------------------------------------------------------------------------------------------------


def test_joint_confidence_keeps_the_surest_share_of_each_answer(tmp_path):
    draw = np.random.default_rng(4)
    student, teacher = (draw.dirichlet(np.ones(3), 40) for _ in range(2))
    path = scored(tmp_path, probabilities=student.tolist(), teacher_probabilities=teacher.tolist())
    wanted, both = [], [[(a + b) / 2 for a, b in zip(q, p, strict=True)] for q, p in zip(student, teacher, strict=True)]
    for word in range(3):
        own = [n for n in range(40) if both[n].index(max(both[n])) == word]
        wanted += sorted(own, key=lambda n: -max(both[n]))[: math.ceil(0.4 * len(own))]
    assert sorted(JointConfidence(path, share=0.4).build(SAMPLES, [40], 4, 0)) == sorted(wanted)
    assert sorted(JointConfidence(path, share=1.0).build(SAMPLES, [40], 4, 0)) == list(range(40))
    with pytest.raises(DataError, match="3 samples are kept, fewer than batch_size 4"):
        JointConfidence(path, share=0.01).build(SAMPLES, [40], 4, 0)


def test_with_equal_models_it_is_the_teachers_confidence_alone():
    p = np.random.default_rng(5).dirichlet(np.ones(4), 30)
    assert surest((p + p) / 2, 0.3) == surest(p, 0.3)
    assert surest(np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]), 0.5) == [0, 2, 3]  # of equal ones the first


# ---- DDK ------------------------------------------------------------------------------------------------------------------


def test_shares_follow_the_ratios_of_perplexities():
    student, teacher, a = [4.0, 9.0, 2.0], [2.0, 3.0, 2.0], 0.5
    weights = [math.exp(r) for r in (2.0, 3.0, 1.0)]
    start = [w / sum(weights) for w in weights]
    assert first_shares(student, teacher) == pytest.approx(start)
    products = [r * math.exp(s / t) for r, s, t in zip(start, student, teacher, strict=True)]
    wanted = [a * p / sum(products) + (1 - a) / 3 for p in products]
    assert moved(start, student, teacher, a) == pytest.approx(wanted)
    assert sum(wanted) == pytest.approx(1) and min(wanted) >= (1 - a) / 3
    assert moved([1 / 3] * 3, [2.0] * 3, [1.0] * 3, 0.5) == pytest.approx([1 / 3] * 3)  # equal ratios: a fixed point
    assert moved(start, student, teacher, 0.0) == pytest.approx([1 / 3] * 3)
    assert sum(first_shares([1e5, 1.0], [1.0, 1.0])) == pytest.approx(1)  # exp of the ratio alone would overflow


def mixture(**options):
    return DDK(**{"every": 2, "held_out": 3, **options}).build(SAMPLES, [20, 20], 4, 7)


def test_a_measurement_counts_one_round_later_and_what_was_held_out_is_never_drawn():
    order = mixture()
    order.measured([10.0, 1.0], [1.0, 1.0])
    assert order.shares_of(0) == order.shares_of(15) == order.rounds[0]
    with pytest.raises(DataError, match="prepared further ahead than `every` steps"):
        order.shares_of(16)
    order.measured([1.0, 10.0], [1.0, 1.0])
    assert order.shares_of(16) == order.rounds[1] != order.rounds[0]
    held = {place for places in order.measured_on for place in places}
    assert [len(places) for places in order.measured_on] == [2, 2]  # a tenth at most
    for _ in range(4):
        order.measured([1.0, 1.0], [1.0, 1.0])
    drawn = list(order)
    assert not held & set(drawn) and Counter(place < 20 for place in drawn[:16])[True] > 12


def test_the_order_is_the_same_from_saved_shares(tmp_path):
    order = mixture()
    for number in range(6):
        order.measured([1.0 + number, 3.0], [1.0, 1.0])
    order.save(tmp_path)
    other = mixture()
    other.load(tmp_path)
    assert list(other) == list(order)
    with pytest.raises(DataError, match="holds no shares"):
        other.load(tmp_path / "none")


def test_domains_are_needed():
    with pytest.raises(DataError, match="give several"):
        DDK().build(SAMPLES, [40], 4, 0)
    with pytest.raises(DataError, match="ten at least"):
        DDK().build(SAMPLES, [36, 4], 4, 0)
