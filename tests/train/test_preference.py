"""Preference stages: loss and gradient against plain float64, what must not change them, the reference cache, whole runs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny import VISIONS, language_config, make_term, the_teacher, tiny_picture, tiny_samples, tiny_tokenizer, tiny_tower
from torch.nn import functional as F

from mmkd.data.preference import REJECTED, rejected_of
from mmkd.data.samples import Sample, Turn
from mmkd.engine.rows import Head, row_log_probs
from mmkd.errors import DataError, GuardError
from mmkd.losses import load_balance
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.run import distill
from mmkd.runs.stages import train
from mmkd.terms.term import Schedule
from mmkd.towers.assemble import train_tokenizer
from mmkd.towers.experts import recorded_routing
from mmkd.towers.tower import Tower
from mmkd.towers.upcycle import upcycle
from mmkd.train import reference
from mmkd.train.distiller import Distiller
from mmkd.train.preference import PreferenceDataset, last_answer
from mmkd.train.reference import LogProbCache, fill_reference

TOKENIZER = tiny_tokenizer()
OTHER_ANSWERS = ("C", "round square", "left of right of A")


def term(kind, weight=1.0, **options):
    return make_term(kind, kind, Schedule(weight, weight), options=tuple(options.items()))


def towers(dtype=torch.float64, **teacher):
    student, tutor = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, **({"tokenizer": TOKENIZER} | teacher))
    for tower in (student, tutor):
        tower.model.to(dtype)
    return student, tutor.freeze()


def tiny_pairs(folder, n=4, **options):
    """`tiny_samples` with a second answer, which differs in length from the first."""
    samples = tiny_samples(folder, n, **options)
    return [dataclasses.replace(s, meta={REJECTED: OTHER_ANSWERS[i % 3] + " no"}) for i, s in enumerate(samples)]


def dataset_of(student, teacher, samples, terms, folder, batch_size=2):
    dataset = PreferenceDataset(samples, student, None, terms)
    fill_reference(dataset, teacher, folder, batch_size=batch_size, chunk_bytes=2**18, pixels_matter=False)
    return dataset


def batch_of(dataset, indices=None):
    indices = range(len(dataset)) if indices is None else indices
    return dataset.collator([dataset[i] for i in indices])["batch"]


def loss_of(dataset, terms, indices=None, counts=None, step_sums=None, chunk_bytes=2**16):
    distiller = Distiller(dataset.student, None, terms, chunk_bytes=chunk_bytes)
    batch = dataclasses.replace(batch_of(dataset, indices), step_sums=step_sums or {})
    distiller.zero_grad()
    loss, log = distiller(batch, counts)
    loss.backward()
    return loss.detach(), log, batch, {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}


def plain_log_prob(tower, sample):
    """Summed log-probability of the last answer's tokens, one sequence by itself, from all logits at once."""
    inputs = tower.prepare([sample])
    out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels)
    start = len(tower.encode(sample, with_answer=False).input_ids)  # the answer's first token
    log_p = out.logits[0, :, : len(tower.tokenizer)].log_softmax(-1)
    chosen = [log_p[t, inputs.targets[0, t]] for t in range(start - 1, inputs.targets.shape[1]) if inputs.targets[0, t] >= 0]
    return torch.stack(chosen).sum()


def plain_loss(kind, student, teacher, samples, beta):
    chosen = torch.stack([plain_log_prob(student, s) - plain_log_prob(teacher, s).detach() for s in samples])
    rejected = [rejected_of(s) for s in samples]
    rejected = torch.stack([plain_log_prob(student, s) - plain_log_prob(teacher, s).detach() for s in rejected])
    if kind == "dpo":
        return -F.logsigmoid(beta * (chosen - rejected)).mean(), chosen, rejected
    kl_chosen, kl_rejected = (x.detach().mean().clamp(min=0) for x in (chosen, rejected))
    both = torch.cat([1 - torch.sigmoid(beta * (chosen - kl_rejected)), 1 - torch.sigmoid(beta * (kl_chosen - rejected))])
    return both.mean(), chosen, rejected


# ---- loss and gradient


def test_M1_sequence_log_probs():
    """Positions 1 and 2 predict the response; the teacher's fifth column is padding of its head."""
    own = torch.tensor([[0.6, 0.9, 0.2, 0.0], [0.1, 0.0, 1.2, 0.8]], dtype=torch.float64)
    other = torch.tensor([[0.3, 1.7, 0.1, -0.4, -2.0], [-0.5, 0.2, 2.5, 0.9, 1.0]], dtype=torch.float64)
    targets = torch.tensor([2, 3])
    student = row_log_probs(own, Head(torch.eye(4, dtype=torch.float64)), targets)
    teacher = row_log_probs(other, Head(torch.eye(5, dtype=torch.float64)), targets, vocabulary=4)
    assert student.sum().item() == pytest.approx(-2.9070967576, abs=1e-9)
    assert teacher.sum().item() == pytest.approx(-3.9532228702, abs=1e-9)


@pytest.mark.parametrize("kind", ["dpo", "kto_pair"])
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_loss_and_gradients_equal_a_plain_float64_computation(tmp_path, kind, head):
    student, teacher = towers()
    samples = tiny_pairs(tmp_path, 2, text_only=1, two_images=1)
    student.head.weight.requires_grad_(head == "trained")
    terms = [term(kind, weight=2.0, beta=0.3)]
    loss, log, _, ours = loss_of(dataset_of(student, teacher, samples, terms, tmp_path / "cache"), terms)
    student.model.zero_grad()
    expected, chosen, rejected = plain_loss(kind, student, teacher, samples, 0.3)
    (2 * expected).backward()
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-9)
    theirs = {f"student.{n}": p.grad for n, p in student.model.named_parameters() if p.grad is not None}
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    margin, pairs = log[f"{kind}_margin"]
    assert margin.item() == pytest.approx(0.3 * (chosen - rejected).sum().item(), rel=1e-6) and pairs.item() == 4
    assert log[f"{kind}_accuracy"][0].item() == (chosen > rejected).sum().item()
    assert log[f"{kind}_chosen_reward"][0].item() == pytest.approx(0.3 * chosen.sum().item(), rel=1e-6)
    assert log[f"{kind}_rejected_reward"][0].item() == pytest.approx(0.3 * rejected.sum().item(), rel=1e-6)


def test_other_terms_count_on_the_chosen_answers(tmp_path):
    student, teacher = towers()
    samples = tiny_pairs(tmp_path, 3)
    terms = [term("dpo"), term("cross_entropy", weight=0.5)]
    dataset = dataset_of(student, teacher, samples, terms, tmp_path / "cache")
    loss, log, batch, _ = loss_of(dataset, terms)
    inputs = batch.student
    logits = student.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits
    entropy = F.cross_entropy(logits[inputs.response], inputs.targets[inputs.response])
    assert (log["cross_entropy"][0] / log["cross_entropy"][1]).item() == pytest.approx(entropy.item(), rel=1e-6)
    assert loss.item() == pytest.approx((log["dpo"][0] / 3 + 0.5 * entropy).item(), rel=1e-6)


def test_only_the_last_answer_of_a_conversation_counts(tmp_path):
    student, teacher = towers()
    picture = tiny_picture(tmp_path, "a.png", 0)
    turns = [Turn("user", "red", 1), Turn("assistant", "A B"), Turn("user", "blue"), Turn("assistant", "C")]
    samples = [Sample("x", (picture,), tuple(turns), {REJECTED: "A A A"}), *tiny_pairs(tmp_path, 1)]
    dataset = dataset_of(student, teacher, samples, [term("dpo")], tmp_path / "cache")
    loss, _, batch, _ = loss_of(dataset, [term("dpo")])
    assert loss.item() == pytest.approx(plain_loss("dpo", student, teacher, samples, 0.1)[0].item(), rel=1e-9)
    answers = [TOKENIZER.decode(row[mask]) for row, mask in zip(batch.student.targets, last_answer(batch.student), strict=True)]
    assert answers[0].removesuffix("<|end|>").strip() == "C"
    assert last_answer(batch.student).sum() < batch.student.response.sum()


@pytest.mark.parametrize("kind", ["dpo", "kto_pair"])
def test_padding_order_and_micro_batches_change_nothing(tmp_path, kind):
    student, teacher = towers()
    samples = tiny_pairs(tmp_path, 3, text_only=1, two_images=1)
    terms = [term(kind), term("cross_entropy")]
    dataset = dataset_of(student, teacher, samples, terms, tmp_path / "cache")
    loss, _, batch, whole = loss_of(dataset, terms)
    again, _, _, turned = loss_of(dataset, terms, indices=[4, 2, 0, 3, 1])
    assert again.item() == pytest.approx(loss.item(), rel=1e-9)
    sums = {name: value.detach() for name, value in Distiller(student, None, terms).forward(batch, step_sums=True).items()}
    assert list(sums) == (["kto_pair"] if kind == "kto_pair" else [])
    assert all(value.shape == (2,) and float(value.max()) > 0 for value in sums.values())
    total, summed = 0.0, {}
    for part in ([0], [1, 3], [2, 4]):  # the first without any padding
        value, _, _, gradients = loss_of(dataset, terms, part, counts=batch.counts, step_sums=sums)
        total += value.item()
        summed = {name: summed.get(name, 0) + gradient for name, gradient in gradients.items()}
    assert total == pytest.approx(loss.item(), rel=1e-9)
    for name, gradient in whole.items():
        torch.testing.assert_close(turned[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
        torch.testing.assert_close(summed[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_accuracy_rises_on_a_preference_that_can_be_learned(tmp_path):
    """Whatever is asked, the chosen answer is "A" or "B" and the rejected one "red"."""
    student, teacher = towers(torch.float32)
    samples = [
        dataclasses.replace(rejected_of(dataclasses.replace(s, meta={REJECTED: "AB"[i % 2]})), meta={REJECTED: "red"})
        for i, s in enumerate(tiny_samples(tmp_path, 8))
    ]
    terms = [term("dpo")]
    dataset = dataset_of(student, teacher, samples, terms, tmp_path / "cache")
    distiller, batch = Distiller(student, None, terms), batch_of(dataset)
    optimiser = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    logs = []
    for _ in range(40):
        loss, log = distiller(batch)
        logs.append({name: float(value) / 8 for name, (value, _) in log.items()})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert logs[0]["dpo_accuracy"] < 0.9 and logs[-1]["dpo_accuracy"] == 1.0
    assert logs[-1]["dpo_margin"] > logs[0]["dpo_margin"] + 0.5 and logs[-1]["dpo"] < logs[0]["dpo"]


def test_answers_that_become_the_same_tokens_are_refused(tmp_path):
    student, _ = towers()
    (sample,) = tiny_pairs(tmp_path, 1)
    sample = dataclasses.replace(sample, turns=(*sample.prompt_turns, Turn("assistant", "A B " * 40)))
    sample = dataclasses.replace(sample, meta={REJECTED: "A B " * 40 + "C"})
    student.max_length = 60
    with pytest.raises(DataError, match="the same 60 tokens, so nothing can be preferred"):
        PreferenceDataset([sample], student, None, [term("dpo")])[0]


# ---- the reference and its cache


def test_the_reference_is_the_teachers_own_tokens_and_pictures(tmp_path):
    """Another tokenizer and image size: only sums over whole answers are compared."""
    other = train_tokenizer(["red green", "blue round", "A B C"], 280)
    finer = VISIONS["vit"] | {"image_size": 24}
    student, teacher = towers(tokenizer=other, vision=finer, image_size=(24, 24))
    samples = tiny_pairs(tmp_path, 2)
    dataset = dataset_of(student, teacher, samples, [term("dpo")], tmp_path / "cache")
    expected = [[plain_log_prob(teacher, s).item() for s in (one, rejected_of(one))] for one in samples]
    torch.testing.assert_close(dataset.reference, torch.tensor(expected, dtype=torch.float64))


def test_a_cached_reference_is_the_very_same_and_the_teacher_does_not_run(tmp_path, monkeypatch):
    student, teacher = towers(torch.float32)
    samples = tiny_pairs(tmp_path, 5)
    first = dataset_of(student, teacher, samples, [], tmp_path / "cache").reference
    monkeypatch.setattr(reference, "_read", None)
    again = dataset_of(student, teacher, samples[::-1], [], tmp_path / "cache", batch_size=3).reference
    assert torch.equal(again.flip(0), first)


def read_pairs(student, teacher, samples, folder):
    dataset = PreferenceDataset(samples, student, None, [])
    count = fill_reference(dataset, teacher, folder, batch_size=1, chunk_bytes=2**18, pixels_matter=False)
    return count, dataset.reference


def test_what_changed_is_read_again_and_nothing_else(tmp_path):
    student, teacher = towers(torch.float32)
    samples = tiny_pairs(tmp_path, 4)
    cache = tmp_path / "cache"
    count, first = read_pairs(student, teacher, samples, cache)
    assert count == 4
    assert read_pairs(student, teacher, [dataclasses.replace(s, id=f"new {s.id}") for s in samples], cache)[0] == 0
    other_answer = dataclasses.replace(samples[1], meta={REJECTED: "blue blue"})
    count, second = read_pairs(student, teacher, [samples[0], other_answer, *samples[2:]], cache)
    assert count == 1 and (first != second).nonzero().tolist() == [[1, 1]]
    tiny_picture(tmp_path, samples[2].images[0].name, 99)  # the same file name, another picture
    count, third = read_pairs(student, teacher, samples, cache)
    assert count == 1 and (first != third).nonzero()[:, 0].tolist() == [2, 2]
    with torch.no_grad():
        teacher.head.weight.mul_(1.5)
    count, fourth = read_pairs(student, teacher, samples, cache)
    assert count == 4 and not torch.isclose(third, fourth).any()


def test_a_killed_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    student, teacher = towers(torch.float32)
    samples = tiny_pairs(tmp_path, 5)
    whole = dataset_of(student, teacher, samples, [], tmp_path / "whole").reference
    run, calls = reference._read, []

    def killed(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(reference, "_read", killed)
    with pytest.raises(KeyboardInterrupt):
        dataset_of(student, teacher, samples, [], tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/rank_0.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 8 and json.loads(lines[0])["answer"] == "chosen" and json.loads(lines[0])["tokens"] > 1
    file.write_text("".join(lines[:7]) + lines[7][:30])  # cut short within the second batch
    calls.clear()
    monkeypatch.setattr(reference, "_read", lambda *a, **o: calls.append(a) or run(*a, **o))
    assert torch.equal(dataset_of(student, teacher, samples, [], tmp_path / "cache").reference, whole)
    assert len(calls) == 2
    assert len(LogProbCache(file.parent).values) == 10 == len(file.read_text().splitlines())


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "rank_0.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"rank_0.jsonl is damaged .* delete it"):
        LogProbCache(tmp_path)


def test_a_teacher_without_eyes_is_found_before_its_reference_is_used(tmp_path, monkeypatch):
    student, teacher = towers(torch.float32)
    dataset = PreferenceDataset(tiny_pairs(tmp_path, 3), student, None, [])
    read = teacher.read
    monkeypatch.setattr(teacher, "read", lambda inputs, seen: read(inputs, [torch.zeros(4, 32)] * 3))
    with pytest.raises(GuardError, match="permuting the pictures changes nothing that the teacher computes"):
        fill_reference(dataset, teacher, tmp_path / "cache", batch_size=3, chunk_bytes=2**18)


# ---- whole runs


@pytest.fixture
def data(tmp_path):
    """Eight pairs on disk, and a teacher and a student as folders."""
    rows = []
    for number in range(8):
        tiny_picture(tmp_path / "data", f"{number}.png", number)
        answers = {"chosen": ("red A", "blue")[number % 2], "rejected": ("C", "left of B")[number % 2]}
        rows.append({"prompt": f"What {'is ' * (number % 3)}it?", "images": [f"{number}.png"], **answers})
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, width in (("student", 16), ("teacher", 32)):
        tiny_tower(width, width, tokenizer=TOKENIZER).save(tmp_path / name)
    return tmp_path


def recipe(data, terms, output="out", micro=4, **changes):
    stage = {
        "data": [{"format": "preference", "root": str(data / "data")}], "terms": terms, "steps": 4, "log_every": 1,
        "optimiser": {"batch_size": 4, "micro_batch_size": micro, "learning_rate": 1e-3},
    }
    return Recipe.model_validate({
        "title": "t", "output": str(data / output), "teacher": {"model": str(data / "teacher")},
        "student": {"model": str(data / "student")}, "stages": {"prefer": stage}, **changes,
    })


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def log_of(run, role="student"):
    return [json.loads(line) for line in (run / "log" / f"{role}.jsonl").read_text().splitlines()]


def test_a_run_of_pairs_and_its_control(data):
    distill(recipe(data, {"dpo": {"beta": 0.2}}))
    rows = log_of(data / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"dpo", "dpo_margin", "dpo_accuracy", "dpo_chosen_reward", "dpo_rejected_reward"} <= rows[0].keys()
    assert rows[0]["dpo_margin"] == pytest.approx(rows[0]["dpo_chosen_reward"] - rows[0]["dpo_rejected_reward"], abs=1e-5)
    assert rows[-1]["dpo_margin"] > rows[0]["dpo_margin"]
    assert all("cross_entropy" in row and "dpo" not in row for row in log_of(data / "out", "control"))
    (cached,) = (data / "references").glob("*/rank_0.jsonl")
    assert len(cached.read_text().splitlines()) == 16
    before = cached.stat().st_mtime_ns
    distill(recipe(data, {"dpo": {"beta": 0.2, "label_smoothing": 0.1}, "cross_entropy": 0.1}, "other", control=False))
    assert cached.stat().st_mtime_ns >= before and len(cached.read_text().splitlines()) == 16
    assert {"dpo", "cross_entropy"} <= log_of(data / "other")[0].keys()


@pytest.mark.parametrize("kind", ["dpo", "kto_pair"])
def test_micro_batches_give_the_same_weights(data, kind):
    from mmkd.runs.towers import build_student

    found = []
    for micro in (4, 2):
        spec = recipe(data, {kind: 1.0}, f"micro{micro}", micro)
        teacher = the_teacher(spec)
        train(spec, "student", build_student(spec, teacher, []), teacher, data / f"micro{micro}")
        found.append(weights(data / f"micro{micro}" / "student"))
    start = weights(data / "student")
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=2e-4, atol=2e-5, msg=name)
    assert any((found[0][name] - start[name]).abs().max() > 1e-3 for name in start)


def test_ktos_reference_point_is_taken_without_dropout_however_a_step_is_split(data, monkeypatch):
    from mmkd.runs.towers import build_student
    from mmkd.terms.preferences import KTOPair

    taken, values = [], KTOPair.values
    monkeypatch.setattr(KTOPair, "values", lambda self, signals: taken.append(signals.step_sums) or values(self, signals))
    first = {}
    for dropout in (0.0, 0.5):
        for micro in (4, 2):
            taken.clear()
            name = f"split{micro}{dropout}"
            spec = recipe(data, {"kto_pair": 1.0}, name, micro)
            teacher, student = the_teacher(spec), build_student(spec, None, [])
            for module in student.model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = dropout
            train(spec, "student", student, teacher, data / name)
            first[dropout, micro] = taken[-4 * (4 // micro)]  # of the first of four steps
    assert first[0.0, 4] is None  # the batch's own pass tells it
    torch.testing.assert_close(first[0.5, 4], first[0.5, 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[0.5, 4], first[0.0, 2], rtol=1e-5, atol=1e-5)


def test_an_attached_kl_needs_the_whole_step_at_once(data):
    distill(recipe(data, {"kto_pair": {"detach_kl": False}}, control=False))
    with pytest.raises(DataError, match=r"terms.kto_pair.detach_kl is false, but a step is 2 micro-batches in 1 processes"):
        distill(recipe(data, {"kto_pair": {"detach_kl": False}}, "other", micro=2, control=False))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"dpo": {"beta": 0}}, "beta is 0; it must be above 0"),
        ({"dpo": {"label_smoothing": 0.5}}, "label_smoothing is 0.5; it must be at least 0 and below 0.5"),
        ({"kto_pair": {"kl": 1.0}}, "kto_pair has no option 'kl'"),
        ({"dpo": {"path": "switch"}}, "dpo cannot run on the visual switch"),
    ],
)
def test_wrong_options_are_found_in_the_recipe(data, terms, message):
    with pytest.raises(ValueError, match=message):
        recipe(data, terms)


def test_data_without_pairs_is_refused_before_anything_is_loaded(data):
    row = {"image": "0.png", "question": "What?", "answer": "red"}
    (data / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
    spec = recipe(data, {"dpo": 1.0}, teacher={"model": "nowhere"})
    spec.stages["prefer"].data[0].format = "jsonl"
    with pytest.raises(DataError, match="has one answer, not a chosen and a rejected one"):
        distill(spec)


# ---- sparse students -------------------------------------------------------------------------------------------------


def test_the_balance_counts_once_over_both_answers(tmp_path):
    """LLaVA-MoD's stage loss: the preference term plus 0.01 times the balance of the chosen and of the rejected reading."""
    dense = tiny_tower(1, language=language_config("qwen3", layers=3), tokenizer=TOKENIZER)
    student = upcycle(dense, experts=4, top_k=2, seed=2)[0]
    teacher = towers()[1]
    samples = tiny_pairs(tmp_path, 3, text_only=1)
    terms = [term("dpo"), term("load_balance", weight=0.01)]
    dataset = dataset_of(student, teacher, samples, terms, tmp_path / "cache")
    loss, log, batch, gradients = loss_of(dataset, terms)
    places, balance = {}, 0.0
    for inputs in (student.prepare(samples), student.prepare([rejected_of(s) for s in samples])):
        mask = inputs.attention_mask.bool()
        with recorded_routing(student) as routing:
            student.read(inputs, student.see(inputs))
        for layer, found in routing.items():
            balance += load_balance(found.logits.double(), mask.flatten()).item()
            chosen = found.logits.view(*mask.shape, -1)[mask].topk(2).indices.flatten()
            places[layer] = places.get(layer, 0) + chosen.bincount(minlength=4)
    total, count = log["load_balance"]
    assert (total / count).item() == pytest.approx(balance, rel=1e-5)
    assert loss.item() == pytest.approx((log["dpo"][0] / 4).item() + 0.01 * balance, rel=1e-5)
    routers = [name for name in gradients if "mlp.gate.weight" in name]
    assert len(routers) == 2 and all(gradients[name].abs().sum() > 0 for name in routers)
    distiller = Distiller(student, None, terms)
    distiller(batch)
    assert {layer: n.tolist() for layer, n in distiller.routed.items()} == {layer: n.tolist() for layer, n in places.items()}


def test_a_sparse_student_is_trained_on_pairs_and_its_experts_are_reported(data):
    dense = tiny_tower(16, 16, tokenizer=TOKENIZER)
    upcycle(dense, experts=3, layers="all")[0].save(data / "sparse")
    spec = recipe(data, {"dpo": 1.0, "load_balance": 0.01}, student={"model": str(data / "sparse")}, control=False)
    distill(spec)
    rows = log_of(data / "out")
    assert all({"dpo", "load_balance", "experts", "dpo_margin", "dpo_accuracy"} <= row.keys() for row in rows)
    student = Tower.load(data / "out" / "student")
    samples = stage_samples(spec, spec.stages["prefer"])
    every = [i for s in samples for x in (s, rejected_of(s)) for i in student.encode(x).input_ids.tolist()]
    assert sum(row["experts"]["tokens"] for row in rows) == 2 * len(every)  # 4 steps of 4 pairs: all 8 twice
    for shares in rows[-1]["experts"]["layers"].values():
        assert sum(shares) == pytest.approx(1, abs=1e-3)
